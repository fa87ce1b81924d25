"""The text encoder against transformers."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig as OracleConfig
from transformers import CLIPTextModel as Oracle
from transformers import CLIPTextModelWithProjection as OracleWithProjection

from oracle import perturb, relative_error, twin
from stable_diffusion.models.clip import CLIPTextModel
from stable_diffusion.models.config import CLIPTextConfig

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 1000,
    "eos_token_id": 999,
    "bos_token_id": 998,
    "pad_token_id": 999,
}
CONFIGS = {
    "sd1": SMALL | {"hidden_act": "quick_gelu", "architectures": ["CLIPTextModel"]},
    "sd2": SMALL | {"hidden_act": "gelu", "architectures": ["CLIPTextModel"]},
    "xl-2": SMALL | {"hidden_act": "gelu", "projection_dim": 48, "architectures": ["CLIPTextModelWithProjection"]},
    "old": SMALL | {"eos_token_id": 2, "architectures": ["CLIPTextModel"]},
}


def pair(config: dict) -> tuple[CLIPTextModel, torch.nn.Module]:
    torch.manual_seed(0)
    oracle_class = OracleWithProjection if "Projection" in config["architectures"][0] else Oracle
    oracle = perturb(oracle_class(OracleConfig(**config)))
    return twin(CLIPTextModel(CLIPTextConfig.from_dict(config)), oracle), oracle


def prompt_ids(batch: int, length: int, pad: int) -> np.ndarray:
    """Start, words, end, and padding, as the tokenizers write it."""
    ids = np.random.default_rng(batch).integers(3, 990, (batch, length))
    ids[:, 0] = 998
    for row in range(batch):
        end = length // 2 + row
        ids[row, end], ids[row, end + 1 :] = 999, pad
    return ids


@pytest.mark.parametrize("pad", [0, 999])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name, pad):
    ours, oracle = pair(CONFIGS[name])
    for batch, length in ((1, 77), (3, 20)):
        ids = prompt_ids(batch, length, pad)
        out, want = ours(mx.array(ids)), oracle(torch.from_numpy(ids), output_hidden_states=True)
        assert relative_error(out.last_hidden_state, want.last_hidden_state) <= 1e-4
        for mine, theirs in zip(out.hidden_states, want.hidden_states[: len(out.hidden_states)], strict=True):
            assert relative_error(mine, theirs) <= 1e-4
        pooled = want.text_embeds if "text_embeds" in want else want.pooler_output
        assert relative_error(out.pooled_output, pooled) <= 1e-4


def test_clip_skip_state_is_normalised_like_diffusers():
    ours, oracle = pair(CONFIGS["sd1"])
    ids = prompt_ids(1, 77, 999)
    states = oracle(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    want = getattr(oracle, "text_model", oracle).final_layer_norm(states[-2])
    assert relative_error(ours.text_model.final_layer_norm(ours(mx.array(ids)).hidden_states[-2]), want) <= 1e-4


def test_any_table_may_be_quantized():
    ours, _ = pair(CONFIGS["sd1"])
    ids = mx.array(prompt_ids(1, 77, 999))
    before = ours(ids).last_hidden_state
    nn.quantize(ours, bits=8, group_size=32)
    assert relative_error(ours(ids).last_hidden_state, before) <= 5e-2


def test_more_tokens_than_positions_is_refused():
    ours, _ = pair(CONFIGS["sd1"])
    with pytest.raises(ValueError, match="78 tokens do not fit into the text encoder's 77 positions"):
        ours(mx.zeros((1, 78), dtype=mx.int32))
