"""One stage's networks at a time: which are in memory when, that they come back as they were, and what is kept."""

import logging
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from oracle import last, normal, picture, relative_error
from peaks import pages
from stable_diffusion import StableDiffusionXL
from stable_diffusion.lora.files import read_lora
from stable_diffusion.lora.layers import attach

PROMPT = "the red cat"
RUN = {"num_steps": 2, "latent_size": (6, 8), "seed": 3, "cfg_weight": 4.0, "negative_text": "blue"}
NETWORKS = ("text_encoder_1", "text_encoder_2", "unet", "autoencoder")


def drawn(sd: StableDiffusionXL, prompt: str = PROMPT) -> np.ndarray:
    return last(sd.generate_latents(prompt, **RUN))


def held(sd: StableDiffusionXL) -> set[str]:
    """The networks that are in memory, or that would be read into it where they stand."""
    return {name for name in NETWORKS if name in vars(sd)}


@pytest.fixture
def low(xl_folder) -> StableDiffusionXL:
    return StableDiffusionXL(xl_folder, low_memory=True)


def plain(folder: Path, **options) -> StableDiffusionXL:
    """A pipeline that keeps its networks, and whose UNet runs as in low memory."""
    sd = StableDiffusionXL(folder, **options)
    sd.rows_at_once = 1
    return sd


def adapter(folder: Path, seed: int = 0) -> Path:
    """A LoRA for a layer of the UNet, and one of the second text encoder."""
    tensors = {}
    for layer, width in (
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 64),
        ("text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj", 32),
    ):
        tensors[f"{layer}.lora_A.weight"] = mx.array(normal(4, width, seed=seed))
        tensors[f"{layer}.lora_B.weight"] = mx.array(normal(width, 4, seed=10 + seed))
    mx.save_safetensors(str(folder / f"{seed}.safetensors"), tensors)
    return folder / f"{seed}.safetensors"


# --- which are in memory ---------------------------------------------------------------------------------------------


def test_each_stage_holds_its_networks_alone(low):
    """And after each stage no more is in use than they take, whatever was before."""
    before, room = mx.get_active_memory(), 2**17 + pages(*(getattr(low, name) for name in low.sources))

    def check(*names: str) -> None:
        assert held(low) == set(names)
        more = mx.get_active_memory() - before - sum(low.sources[name].size for name in names)
        assert 0 <= more < room

    for _ in range(2):
        latents = low.generate_latents(PROMPT, **RUN)
        assert hasattr(low, "unet") and low.unet.config.in_channels == 4
        assert mx.get_active_memory() - before < low.sources["autoencoder"].size + room  # nothing is read for it
        latents.prepare()
        check("text_encoder_1", "text_encoder_2")
        for x_t in latents:
            mx.eval(x_t)
            assert held(low) == {"unet"}
        check("unet")
        low.decode(x_t)
        check("autoencoder")
    low.encode_prompt(PROMPT)
    check("text_encoder_1", "text_encoder_2")
    low.release()
    check()


# --- what comes back -------------------------------------------------------------------------------------------------


def test_runs_give_what_an_ordinary_pipeline_gives(xl_folder, low):
    run = {"strength": 0.5, "num_steps": 4, "seed": 1, "cfg_weight": 3.0}
    other = plain(xl_folder)
    for prompt in (PROMPT, "a cat on the blue"):
        ours, theirs = drawn(low, prompt), drawn(other, prompt)
        assert np.array_equal(ours, theirs)
        assert np.array_equal(low.decode(mx.array(ours)), other.decode(mx.array(theirs)))
        ours, theirs = (last(sd.generate_latents_from_image(picture(), prompt, **run)) for sd in (low, other))
        assert np.array_equal(ours, theirs) and held(low) == {"unet"}


@pytest.mark.parametrize("options", [{"unet_bits": 8}, {"float16": True}], ids=str)
def test_networks_come_back_with_the_loras_in_their_weights(xl_folder, tmp_path, options):
    loras = [(adapter(tmp_path), 0.7), (adapter(tmp_path, seed=5), -0.4)]  # for the same layers: rounded once
    low, other = StableDiffusionXL(xl_folder, low_memory=True, loras=loras, **options), plain(xl_folder, **options)
    want = drawn(plain(xl_folder, loras=loras, **options))
    assert relative_error(drawn(other), want) > 1e-3
    for _ in range(2):
        assert np.array_equal(drawn(low), want)


@pytest.mark.parametrize("loaded", [True, False])
def test_networks_come_back_with_the_loras_beside_their_weights(low, tmp_path, loaded, caplog):
    none = drawn(low)
    if not loaded:
        low.release()
    before = mx.get_active_memory()
    attachment = low.load_lora(adapter(tmp_path), 0.7)
    assert mx.get_active_memory() - before < 2**16  # no network is read for it
    first = drawn(low)
    assert relative_error(first, none) > 1e-3
    assert np.array_equal(drawn(low), first)
    attachment.scale = 0.0
    assert np.array_equal(drawn(low), none)
    attachment.scale = 0.7
    attachment.detach()
    for _ in range(2):
        assert np.array_equal(drawn(low), none)
    assert "by hand" not in caplog.text


def test_factors_come_back_as_they_were_trained(low, tmp_path):
    low.load_lora(adapter(tmp_path))
    first = drawn(low)
    factors = {name: 2 * factor for name, factor in tree_flatten(low.unet.trainable_parameters())}
    assert len(factors) == 2
    low.unet.load_weights(list(factors.items()), strict=False)
    trained = drawn(low)
    low.release()
    assert held(low) == set()
    assert np.array_equal(drawn(low), trained) and not np.array_equal(trained, first)


def test_new_words_come_back(low, tmp_path):
    vectors = {"clip_l": mx.array(normal(2, 32, seed=0)), "clip_g": mx.array(normal(2, 32, seed=1))}
    mx.save_safetensors(str(tmp_path / "word.safetensors"), vectors)
    low.load_embedding(tmp_path / "word.safetensors", "word")
    first = low.encode_prompt("a word").context
    low.release()
    assert held(low) == set()
    assert np.array_equal(low.encode_prompt("a word").context, first)
    assert not np.array_equal(low.encode_prompt("a cat").context, first)


@pytest.mark.parametrize("low_memory", [True, False])
def test_released_and_deleted_networks_come_back(xl_folder, low_memory, tmp_path):
    options = {"unet_bits": 8, "text_bits": 4, "loras": [(adapter(tmp_path), 0.7)]}
    sd = StableDiffusionXL(xl_folder, low_memory=low_memory, **options)
    first = drawn(sd)
    del sd.unet
    assert "unet" not in held(sd)
    assert np.array_equal(drawn(sd), first)
    sd.release(keep=["autoencoder"])
    assert held(sd) <= {"autoencoder"}
    assert np.array_equal(drawn(sd), first)


# --- what is kept ----------------------------------------------------------------------------------------------------


class Doubled:
    """A UNet of one's own: the given one with twice its output."""

    def __init__(self, unet: nn.Module):
        self.unet, self.embed_time = unet, unet.embed_time

    def __call__(self, *args, **options) -> mx.array:
        return 2 * self.unet(*args, **options)


@pytest.mark.parametrize("how", ["weights", "replaced", "LoRA"])
def test_a_network_that_was_changed_by_hand_stays(low, how, caplog, tmp_path):
    if how == "weights":
        low.unet.conv_out.bias = low.unet.conv_out.bias + 1
    elif how == "replaced":
        low.unet = Doubled(low.unet)
    else:
        attach({"unet": low.unet}, read_lora(adapter(tmp_path)), partial=True)
    changed = low.unet
    first = drawn(low)
    with caplog.at_level(logging.WARNING, "stable_diffusion"):
        low.decode(mx.array(first))
    assert low.unet is changed and "unet was modified and stays loaded" in caplog.text
    assert np.array_equal(drawn(low), first)
    del low.unet
    assert not np.array_equal(drawn(low), first)
