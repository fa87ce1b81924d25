"""The text encoder against transformers."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig as OracleConfig
from transformers import CLIPTextModel as Oracle
from transformers import CLIPTextModelWithProjection as OracleWithProjection

from oracle import pair, relative_error
from stable_diffusion.models.clip import CLIPTextModel

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"vocab_size": 1000, "eos_token_id": 999, "bos_token_id": 998, "pad_token_id": 999}
CONFIGS = {
    "sd1": SMALL | {"hidden_act": "quick_gelu", "architectures": ["CLIPTextModel"]},
    "sd2": SMALL | {"hidden_act": "gelu", "architectures": ["CLIPTextModel"]},
    "xl-2": SMALL | {"hidden_act": "gelu", "projection_dim": 48, "architectures": ["CLIPTextModelWithProjection"]},
    "old": SMALL | {"eos_token_id": 2, "architectures": ["CLIPTextModel"]},
}


def encoders(name: str) -> tuple[CLIPTextModel, torch.nn.Module]:
    config = CONFIGS[name]
    oracle = OracleWithProjection if "Projection" in config["architectures"][0] else Oracle
    return pair("text_encoder", config, lambda: oracle(OracleConfig(**config)))


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
    ours, oracle = encoders(name)
    for batch, length in ((1, 77), (3, 20)):
        ids = prompt_ids(batch, length, pad)
        out, want = ours(mx.array(ids)), oracle(torch.from_numpy(ids), output_hidden_states=True)
        assert relative_error(out.last_hidden_state, want.last_hidden_state) <= 1e-4
        for mine, theirs in zip(out.hidden_states, want.hidden_states[: len(out.hidden_states)], strict=True):
            assert relative_error(mine, theirs) <= 1e-4
        # SD 1 and 2 normalise the state of a skipped layer, as diffusers does.
        norms = ours.text_model.final_layer_norm, getattr(oracle, "text_model", oracle).final_layer_norm
        assert relative_error(norms[0](out.hidden_states[-2]), norms[1](want.hidden_states[-2])) <= 1e-4
        pooled = want.text_embeds if "text_embeds" in want else want.pooler_output
        assert relative_error(out.pooled_output, pooled) <= 1e-4


def test_any_table_may_be_quantized():
    ours, _ = encoders("sd1")
    ids = mx.array(prompt_ids(1, 77, 999))
    before = ours(ids).last_hidden_state
    nn.quantize(ours, bits=8, group_size=32)
    assert relative_error(ours(ids).last_hidden_state, before) <= 5e-2


def test_more_tokens_than_positions_is_refused():
    ours, _ = encoders("sd1")
    with pytest.raises(ValueError, match="78 tokens do not fit into 77 positions"):
        ours(mx.zeros((1, 78), dtype=mx.int32))
