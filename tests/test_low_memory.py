"""One stage's networks at a time: which are in memory when, that they come back as they were, and what is kept."""

import logging
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from oracle import normal, relative_error
from stable_diffusion import StableDiffusion, StableDiffusionXL
from stable_diffusion.weights.quantize import quantize

PROMPT = "the red cat"
RUN = {"num_steps": 2, "latent_size": (6, 8), "seed": 3, "cfg_weight": 4.0, "negative_text": "blue"}
NETWORKS = ("text_encoder_1", "text_encoder_2", "unet", "autoencoder")


def last(latents) -> np.ndarray:
    return np.array(list(latents)[-1])


def held(sd: StableDiffusion) -> set[str]:
    """The networks that are in memory."""
    return {name for name in (*NETWORKS, "text_encoder") if name in vars(sd)}


@pytest.fixture
def low(xl_folder) -> StableDiffusionXL:
    return StableDiffusionXL(xl_folder, low_memory=True)


def test_two_whole_runs_give_what_an_ordinary_pipeline_gives(xl_folder, low):
    plain = StableDiffusionXL(xl_folder)
    plain.rows_at_once = 1
    for prompt in (PROMPT, "a cat on the blue"):
        ours, theirs = (last(sd.generate_latents(prompt, **RUN)) for sd in (low, plain))
        assert np.array_equal(ours, theirs)
        assert np.array_equal(low.decode(mx.array(ours)), plain.decode(mx.array(theirs)))


def test_a_run_from_an_image_too(xl_folder, low):
    image = mx.array(np.clip(normal(48, 64, 3, seed=0, scale=0.3), -1, 1))
    run = {"strength": 0.5, "num_steps": 4, "seed": 1, "cfg_weight": 3.0}
    plain = StableDiffusionXL(xl_folder)
    plain.rows_at_once = 1
    ours, theirs = (last(sd.generate_latents_from_image(image, PROMPT, **run)) for sd in (low, plain))
    assert np.array_equal(ours, theirs) and held(low) == {"unet"}


def test_each_stage_holds_its_networks_alone(low):
    assert held(low) == set()
    latents = low.generate_latents(PROMPT, **RUN)
    assert held(low) == set()
    latents.prepare()
    assert held(low) == {"text_encoder_1", "text_encoder_2"}
    for x_t in latents:
        assert held(low) == {"unet"}
        mx.eval(x_t)
    low.decode(x_t)
    assert held(low) == {"autoencoder"}
    low.encode_prompt(PROMPT)
    assert held(low) == {"text_encoder_1", "text_encoder_2"}
    low.release()
    assert held(low) == set()


def test_the_memory_is_free_again(low):
    """After each stage no more is in use than the network of the stage, whatever was before."""
    sizes = {name: source.size for name, source in low.sources.items()}
    encoders = sizes["text_encoder_1"] + sizes["text_encoder_2"]
    before = mx.get_active_memory()
    for _ in range(2):
        latents = low.generate_latents(PROMPT, **RUN)
        latents.prepare()
        assert 0 <= mx.get_active_memory() - before - encoders < 2**17
        for x_t in latents:
            mx.eval(x_t)
        assert 0 <= mx.get_active_memory() - before - sizes["unet"] < 2**17
        low.decode(x_t)
        assert 0 <= mx.get_active_memory() - before - sizes["autoencoder"] < 2**17
    low.release()
    assert mx.get_active_memory() - before < 2**17


def test_networks_come_back_quantized(xl_folder):
    sd = StableDiffusionXL(xl_folder, low_memory=True, unet_bits=8, text_bits=4)
    want = {name: tree_flatten(getattr(sd, name).parameters()) for name in NETWORKS}
    assert any(isinstance(m, nn.QuantizedLinear) for _, m in sd.unet.named_modules())
    sd.release()
    for name in NETWORKS:
        again = tree_flatten(getattr(sd, name).parameters())
        assert all(a == b and np.array_equal(x, y) for (a, x), (b, y) in zip(want[name], again, strict=True))
        assert sd.sources[name].size == sum(value.nbytes for _, value in again)


def adapter(folder: Path) -> Path:
    """A LoRA for a layer of the UNet, one of the second text encoder, and one that is in no model."""
    layers = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 64,
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": 32,
    }
    tensors = {}
    for i, (layer, width) in enumerate(layers.items()):
        tensors[f"{layer}.lora_A.weight"] = mx.array(normal(4, width, seed=i))
        tensors[f"{layer}.lora_B.weight"] = mx.array(normal(width, 4, seed=10 + i))
    mx.save_safetensors(str(folder / "lora.safetensors"), tensors)
    return folder / "lora.safetensors"


def test_networks_come_back_with_the_loras_in_their_weights(xl_folder, tmp_path):
    options = {"loras": [(adapter(tmp_path), 0.7)], "unet_bits": 8}
    low, plain = (StableDiffusionXL(xl_folder, low_memory=low, **options) for low in (True, False))
    plain.rows_at_once = 1
    want = last(plain.generate_latents(PROMPT, **RUN))
    for _ in range(2):
        assert np.array_equal(last(low.generate_latents(PROMPT, **RUN)), want)
    bare = last(StableDiffusionXL(xl_folder, unet_bits=8).generate_latents(PROMPT, **RUN))
    assert relative_error(bare, want) > 1e-3


@pytest.mark.parametrize("loaded", [True, False])
def test_networks_come_back_with_the_loras_beside_their_weights(low, tmp_path, loaded, caplog):
    none = last(low.generate_latents(PROMPT, **RUN))
    if not loaded:
        low.release()
    before = mx.get_active_memory()
    attachment = low.load_lora(adapter(tmp_path), 0.7)
    assert mx.get_active_memory() - before < 2**16  # no network is read for it
    first = last(low.generate_latents(PROMPT, **RUN))
    assert relative_error(first, none) > 1e-3
    assert np.array_equal(last(low.generate_latents(PROMPT, **RUN)), first)
    attachment.scale = 0.0
    assert np.array_equal(last(low.generate_latents(PROMPT, **RUN)), none)
    attachment.scale = 0.7
    attachment.detach()
    for _ in range(2):
        assert np.array_equal(last(low.generate_latents(PROMPT, **RUN)), none)
    assert "by hand" not in caplog.text


def test_new_words_come_back(low, tmp_path):
    vectors = {"clip_l": mx.array(normal(2, 32, seed=0)), "clip_g": mx.array(normal(2, 32, seed=1))}
    mx.save_safetensors(str(tmp_path / "word.safetensors"), vectors)
    low.load_embedding(tmp_path / "word.safetensors", "word")
    first = low.encode_prompt("a word").context
    low.release()
    assert held(low) == set()
    assert np.array_equal(low.encode_prompt("a word").context, first)
    assert not np.array_equal(low.encode_prompt("a cat").context, first)


def test_deleted_networks_come_back(low):
    first = last(low.generate_latents(PROMPT, **RUN))
    del low.unet
    assert held(low) == set()
    assert np.array_equal(last(low.generate_latents(PROMPT, **RUN)), first)


def test_without_low_memory_released_and_deleted_networks_come_back(xl_folder, tmp_path):
    sd = StableDiffusionXL(xl_folder, unet_bits=8, loras=[(adapter(tmp_path), 0.7)], lora_partial=True)
    first = last(sd.generate_latents(PROMPT, **RUN))
    del sd.text_encoder_1
    sd.release("autoencoder")
    assert held(sd) == {"autoencoder"}
    assert np.array_equal(last(sd.generate_latents(PROMPT, **RUN)), first)


class Doubled:
    """A UNet of one's own: the given one with twice its output."""

    def __init__(self, unet: nn.Module):
        self.unet, self.embed_time = unet, unet.embed_time

    def __call__(self, *args, **options) -> mx.array:
        return 2 * self.unet(*args, **options)


@pytest.mark.parametrize("how", ["quantized", "weights", "replaced"])
def test_a_network_that_was_changed_by_hand_stays(low, how, caplog):
    if how == "quantized":
        quantize(low.unet, 8, 32)
    elif how == "weights":
        low.unet.conv_out.bias = low.unet.conv_out.bias + 1
    else:
        low.unet = Doubled(low.unet)
    changed = low.unet
    first = last(low.generate_latents(PROMPT, **RUN))
    with caplog.at_level(logging.WARNING, "stable_diffusion"):
        low.decode(mx.array(first))
    assert low.unet is changed and "unet was changed by hand" in caplog.text
    assert np.array_equal(last(low.generate_latents(PROMPT, **RUN)), first)
    del low.unet
    assert not np.array_equal(last(low.generate_latents(PROMPT, **RUN)), first)
