"""The names of published files: each list maps one to one onto the modules, as diffusers maps it."""

import inspect
import json
from functools import cache
from pathlib import Path

import diffusers
import mlx.core as mx
import mlx.nn as nn
import pytest
import torch
from mlx.utils import tree_flatten

from configs import REAL_TEXT_ENCODERS, REAL_UNETS, REAL_VAE
from original_layout import PUBLISHED, diffusers_names
from stable_diffusion.models.config import CLIPTextConfig, UNetConfig
from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.formats.single_file import find, read_checkpoint, read_config
from stable_diffusion.weights.load import build, fill

UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
XL = {
    VAE: "VAE-v1-SD",
    "conditioner.embedders.0.transformer.text_model.": "CLIP-v1-SD",
    "conditioner.embedders.1.model.": "CLIP-XL-SD",
}
SD1 = {VAE: "VAE-v1-SD", f"{CLIP}transformer.text_model.": "CLIP-v1-SD"}
SD1_BARE = {VAE: "VAE-v1-SD", f"{CLIP}transformer.": "CLIP-v1-SD"}
SD2 = {VAE: "VAE-v1-SD", f"{CLIP}model.": "CLIP-v2-SD"}
REFINER = {VAE: "VAE-v1-SD", "conditioner.embedders.0.model.": "CLIP-XL-SD"}
EMA, DEPTH = "model_ema.diffusion_model", "depth_model.model."

# The networks of each file by prefix; its pipeline, and the published configs that it must come to.
FILES = {
    "sd15": (SD1 | {UNET: "UNET-v1-SD"}, "StableDiffusion", "sd15"),
    "sd15-full": (SD1 | {UNET: "UNET-v1-SD", EMA: "UNET-v1-EMA"}, "StableDiffusion", "sd15"),
    "sd15-no-prefix": (SD1_BARE | {UNET: "UNET-v1-SD"}, "StableDiffusion", "sd15"),
    "inpainting": (SD1 | {UNET: "UNET-v1-Inpainting"}, "StableDiffusionInpaint", "sd15-inpainting"),
    "pix2pix": (SD1 | {UNET: "UNET-v1-Pix2Pix", EMA: "UNET-v1-EMA"}, "StableDiffusionInstructPix2Pix", "sd15"),
    "sd21": (SD2 | {UNET: "UNET-v2-SD"}, "StableDiffusion", "sd21"),
    "sd21-pruned": (SD2 | {UNET: "UNET-v2-SD", f"{CLIP}model.": "CLIP-v2-WD"}, "StableDiffusion", "sd21"),
    "sd2-inpainting": (SD2 | {UNET: "UNET-v2-Inpainting"}, "StableDiffusionInpaint", "sd21"),
    "sd2-depth": (SD2 | {UNET: "UNET-v2-Depth", DEPTH: "Depth-v2-SD"}, "StableDiffusionDepth2Img", "sd21"),
    "xl": (XL | {UNET: "UNET-XL-SD"}, "StableDiffusionXL", "sdxl-base"),
    "refiner": (REFINER | {UNET: "UNET-XL-Refiner"}, "StableDiffusionXLImg2Img", "sdxl-refiner"),
    "ssd-1b": (XL | {UNET: "UNET-SSD-1B"}, "StableDiffusionXL", "ssd-1b"),
}
BUFFERS = ["alphas_cumprod", "betas", "posterior_variance", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef2"]
BUFFERS += ["model_ema.num_updates", "model_ema.diffusion_modelout2bias", "first_stage_model.loss.logvar"]


def own(tensors: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@cache
def built(kind: str, config: str) -> nn.Module:
    """The module of a config in JSON; files have the same ones in common."""
    return build(kind, json.loads(config))


def shapes(module) -> dict[str, tuple]:
    return {name: value.shape for name, value in tree_flatten(module.parameters())}


@pytest.mark.parametrize("file", FILES)
def test_published_file_maps_one_to_one(file):
    networks, pipeline, published = FILES[file]
    tensors = {prefix + n: mx.zeros(s) for prefix, part in networks.items() for n, s in PUBLISHED[part].items()}
    tensors |= {name: mx.zeros(1000) for name in BUFFERS}  # none of them is ever computed
    checkpoint = read_checkpoint(Path(file), file, tensors, {}, {}, None)
    assert checkpoint.pipeline == f"{pipeline}Pipeline"
    assert len(checkpoint.components) == (4 if pipeline == "StableDiffusionXL" else 3)
    for kind, component in checkpoint.components.items():
        module = built(kind, json.dumps(component.config))
        fill(module, to_diffusers(kind, own(tensors, component.prefix)))  # raises for whatever is left over
        if kind == "unet":
            expected = REAL_UNETS[published] | {"in_channels": component.config["in_channels"]}
            same = "num_attention_heads cross_attention_dim use_linear_projection addition_time_embed_dim"
            same += " upcast_attention"
        elif kind == "vae":
            expected, same = REAL_VAE, "norm_num_groups"
        else:
            second = kind == "text_encoder_2"
            expected = REAL_TEXT_ENCODERS["sdxl-2" if second else "sd21" if published == "sd21" else "sd15"]
            same = "num_attention_heads hidden_act layer_norm_eps eos_token_id"
        model = built(kind, json.dumps(expected))
        assert shapes(model) == shapes(module)
        if kind.startswith("text_encoder"):
            ours, theirs = CLIPTextConfig.from_dict(component.config), CLIPTextConfig.from_dict(expected)
        else:
            ours, theirs = module.config, model.config
        for key in same.split():
            assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize(
    ("kind", "network"),
    [
        *(("unet", f"UNET-{version}") for version in ("v1-SD", "v2-SD", "XL-SD", "XL-Refiner")),
        *(("vae", "VAE-v1-SD"), ("controlnet", "ControlNet-v1-SD")),
    ],
)
def test_names_are_those_that_diffusers_makes(kind, network):
    numbered = {name: mx.array(i) for i, name in enumerate(PUBLISHED[network])}
    ours = {new: list(PUBLISHED[network])[int(i)] for new, i in to_diffusers(kind, numbered).items()}
    assert ours == diffusers_names(kind, network) and len(ours) == len(numbered)


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_published_controlnet(prefix):
    tensors = {prefix + name: mx.zeros(shape) for name, shape in PUBLISHED["ControlNet-v1-SD"].items()}
    assert find(tensors, "file", "controlnet") == {"controlnet": prefix}
    config = read_config("controlnet", tensors, prefix, "file")
    module = build("controlnet", config)
    fill(module, to_diffusers("controlnet", own(tensors, prefix)))
    assert module.config.num_attention_heads == (8,) * 4 and module.config.scale == 8


@pytest.mark.parametrize("layers", [[1, 2, 10], [1, 1, 1], 0])
def test_xl_controlnets_in_diffusers_names(layers):
    """canny-sdxl-1.0, its "mid" and its "small" variant, as diffusers builds them from the published configs."""
    known = inspect.signature(diffusers.ControlNetModel).parameters
    config = {key: value for key, value in REAL_UNETS["sdxl-base"].items() if key in known}
    if layers:
        config["transformer_layers_per_block"] = layers
    else:
        config |= {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D"}
    with torch.device("meta"):
        theirs = diffusers.ControlNetModel(**config).state_dict()
    tensors = {name: mx.zeros(tuple(value.shape)) for name, value in theirs.items()}
    assert find(tensors, "file", "controlnet") == {"controlnet": ""}
    module = build("controlnet", read_config("controlnet", tensors, "", "file"))
    fill(module, to_diffusers("controlnet", tensors))
    module.config.check_fits(UNetConfig.from_dict(REAL_UNETS["sdxl-base"]))
