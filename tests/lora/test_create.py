"""A new LoRA changes nothing, and has the layers that kohya's scripts train."""

import math
import re

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

import loras
from configs import REAL_TEXT_ENCODERS, REAL_UNETS
from stable_diffusion.lora.create import new_lora
from stable_diffusion.lora.layers import attach
from stable_diffusion.weights.files import open_checkpoint
from stable_diffusion.weights.load import build, load_component
from stable_diffusion.weights.quantize import quantize

# Classes of the oracles whose matrices and kernels kohya's scripts train, networks/lora.py.
TRANSFORMERS = {"Transformer2DModel", "CLIPAttention", "CLIPMLP"}
RESNETS = {"ResnetBlock2D", "Downsample2D", "Upsample2D"}
# Numbers of modules in the logs of kohya's scripts.
PUBLISHED = {"sd15": 192, "sd21": 192, "sdxl-base": 722}
PUBLISHED_TEXT = {"sd15": 72, "sd21": 138, "sdxl-2": 192}


def kohyas(model: torch.nn.Module, classes: set[str]) -> dict[str, bool]:
    """Paths of the layers in modules of these classes, and whether they are kernels of 3 x 3."""
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ in classes:
            for child, layer in module.named_modules():
                if type(layer).__name__ in ("Linear", "Conv2d", "LoRACompatibleLinear", "LoRACompatibleConv"):
                    found[f"{name}.{child}"] = getattr(layer, "kernel_size", (1, 1)) != (1, 1)
    return found


def layers(networks, ranks, **options) -> dict[str, set[str]]:
    """Layers of a new LoRA, with underscores."""
    found = {name: set() for name in networks}
    for delta in new_lora(networks, ranks, **options).deltas:
        found[delta.network].add(delta.layer)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_of_a_unet_are_kohyas(name):
    unet = build("unet", REAL_UNETS[name])
    with torch.device("meta"):
        oracle = diffusers.UNet2DConditionModel(**REAL_UNETS[name])
    plain = {path.replace(".", "_") for path, kernel in kohyas(oracle, TRANSFORMERS).items() if not kernel}
    both = {path.replace(".", "_") for path in kohyas(oracle, TRANSFORMERS | RESNETS)}
    before = mx.get_active_memory()
    (found,) = layers({"unet": unet}, {"unet": 1}, targets="all").values()
    assert len(found) == PUBLISHED[name] and found == plain
    (found,) = layers({"unet": unet}, {"unet": 1}, targets="all", conv_rank=1).values()
    assert found == both
    assert mx.get_active_memory() - before < 2**26  # no weight was read
    blocks = sum(path.endswith("attn1_to_q") for path in plain)
    (found,) = layers({"unet": unet}, {"unet": 1}).values()
    assert len(found) == 8 * blocks
    (found,) = layers({"unet": unet}, {"unet": 1}, targets="attention+ff").values()
    assert len(found) == 10 * blocks and found < plain


@pytest.mark.parametrize("name", PUBLISHED_TEXT)
def test_layers_of_a_text_encoder_are_kohyas(name):
    config = REAL_TEXT_ENCODERS[name]
    with torch.device("meta"):
        oracle = getattr(transformers, config["architectures"][0])(transformers.CLIPTextConfig(**config))
    theirs = {path.removeprefix("text_model.").replace(".", "_") for path in kohyas(oracle, TRANSFORMERS)}
    encoder = build("text_encoder", config)
    for targets in ("all", "attention+ff"):
        (found,) = layers({"text_encoder": encoder}, {"text_encoder": 1}, targets=targets).values()
        assert len(found) == PUBLISHED_TEXT[name]
        assert {layer.removeprefix("text_model_") for layer in found} == theirs
    (found,) = layers({"text_encoder": encoder}, {"text_encoder": 1}).values()
    assert len(found) == PUBLISHED_TEXT[name] * 4 // 6


def test_a_pattern_is_searched_in_the_paths_of_matrices(model):
    (found,) = layers({"unet": model.networks["unet"]}, {"unet": 2}, targets=r"mid_block.*to_[kv]$").values()
    assert found and all(re.fullmatch(r"mid_block_.*to_[kv]", layer) for layer in found)
    (found,) = layers({"unet": model.networks["unet"]}, {"unet": 2}, targets=r"^time_embedding", conv_rank=2).values()
    assert {"time_embedding_linear_1", "mid_block_resnets_0_conv1"} <= found
    assert not any("attn" in layer or layer in ("conv_in", "conv_out") for layer in found)


def test_factors_are_initialized_as_in_kohyas_scripts(model):
    """Down is Kaiming uniform with a = √5, within ±1/√(width · kernel), and up 0."""
    lora = new_lora(model.networks, dict.fromkeys(model.networks, 4), targets="all", conv_rank=3, alpha=2)
    for delta in lora.deltas:
        down, up = np.array(delta["down"]), np.array(delta["up"])
        assert down.dtype == up.dtype == np.float32 and not up.any()
        bound = torch.nn.init.calculate_gain("leaky_relu", math.sqrt(5)) * math.sqrt(3 / np.prod(down.shape[1:]))
        assert 0.75 * bound < np.abs(down).max() <= bound and abs(down.mean()) < 0.3 * bound
        assert down.shape[0] == up.shape[1] == (3 if down.ndim == 4 else 4)
        assert delta.multiplier == pytest.approx(2 / down.shape[0])
    assert len({np.array(delta["down"]).tobytes() for delta in lora.deltas}) == len(lora.deltas)


def test_factors_depend_on_the_name_and_the_seed_only(model):
    ranks = dict.fromkeys(model.networks, 4)
    few, many, other = (
        {delta.name: np.array(delta["down"]) for delta in new_lora(networks, ranks, **options).deltas}
        for networks, options in (
            ({"unet": model.networks["unet"]}, {"seed": 7}),
            (model.networks, {"seed": 7, "targets": "all", "conv_rank": 2, "dora": True}),
            (model.networks, {"seed": 8}),
        )
    )
    assert few.keys() < many.keys()
    assert all(np.array_equal(value, many[name]) for name, value in few.items())
    assert not any(np.array_equal(value, other[name]) for name, value in few.items())


@pytest.mark.parametrize("kind", ["float32", "float16", "8 bits", "wrapped"])
@pytest.mark.parametrize("dora", [False, True])
def test_nothing_changes_before_the_training(request, model, kind, dora):
    """Every bit is kept; only DoRA over packed weights multiplies by the unpacked ones, which rounds otherwise."""
    parts = open_checkpoint(request.getfixturevalue(f"{model.family}_folder")).components
    own = {name: load_component(parts[name]) for name in model.networks}
    for network in own.values():
        network.set_dtype(mx.float16 if kind == "float16" else mx.float32)
        if kind == "8 bits":
            quantize(network, 8, 32)
    mine = loras.Model(model.family, model.pipe, own)
    ranks = dict.fromkeys(own, 4)
    if kind == "wrapped":
        attach(own, new_lora(own, ranks, seed=1))
    before = mine.ours()
    lora = attach(own, new_lora(own, ranks, targets="all", conv_rank=4, dora=dora))
    after = mine.ours()
    for name, value in before.items():
        if kind == "8 bits" and dora:
            assert np.abs(after[name] - value).max() <= 1e-4 * np.abs(value).max()
        else:
            assert np.array_equal(after[name], value), name
    lora.detach()


BAD = {
    "rank 33 is above the width 32 of unet.*choose at most 32": {"ranks": {"unet": 33}},
    "rank 40 is above the width 32 of unet.*conv2; choose at most 32": {"conv_rank": 40},
    r"targets 'to_q\(' is not a regular expression .*; choose attention, .*": {"targets": "to_q("},
    "targets 'nothing' match no layer of the unet; choose attention, .*": {"targets": "nothing", "conv_rank": 2},
    "targets 'attn1' match no layer of the text_encoder; .*": {
        "targets": "attn1",
        "ranks": {"unet": 2, "text_encoder": 2},
    },
    "alpha 0 must be above 0.*": {"alpha": 0},
    "alpha nan must be above 0.*": {"alpha": math.nan},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_settings_are_said_in_one_line(sd1, message):
    with pytest.raises(ValueError) as error:
        new_lora(sd1.networks, **{"ranks": {"unet": 2}} | BAD[message])
    assert re.fullmatch(message, str(error.value)) and len(str(error.value)) <= 300
