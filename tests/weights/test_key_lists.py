"""The names of published files: each list maps one to one onto the modules, as diffusers maps it."""

import gzip
import json
from pathlib import Path

import diffusers
import mlx.core as mx
import pytest
import torch
from mlx.utils import tree_flatten

from configs import REAL_TEXT_ENCODERS, REAL_UNETS, REAL_VAE
from original_layout import diffusers_names, tree_of, unet_tree
from stable_diffusion.models.config import CLIPTextConfig, UNetConfig
from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.formats.single_file import find, read_checkpoint, read_config
from stable_diffusion.weights.load import build, fill

LISTS = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "published_names.json.gz").read_bytes()))
LISTS["UNET-SSD-1B"] = unet_tree(  # its transformers, by the published config
    [320, 640, 1280],
    [[0, 0], [2, 2], [4, 4]],
    None,
    [[4, 4, 10], [2, 1, 1], [0, 0, 0]],
    context=2048,
    linear=True,
    vector=2816,
)
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
XL = {
    VAE: "VAE-v1-SD",
    "conditioner.embedders.0.transformer.text_model.": "CLIP-v1-SD",
    "conditioner.embedders.1.model.": "CLIP-XL-SD",
}
SD1 = {VAE: "VAE-v1-SD", f"{CLIP}transformer.text_model.": "CLIP-v1-SD"}
SD2 = {VAE: "VAE-v1-SD", f"{CLIP}model.": "CLIP-v2-SD"}
EMA = "model_ema.diffusion_model"

# The networks of each file by prefix; its pipeline, and the published configs that it must come to.
FILES = {
    "sd15": (SD1 | {UNET: "UNET-v1-SD"}, "StableDiffusion", "sd15"),
    "sd15-full": (SD1 | {UNET: "UNET-v1-SD", EMA: "UNET-v1-EMA"}, "StableDiffusion", "sd15"),
    "sd15-no-prefix": (
        {UNET: "UNET-v1-SD", VAE: "VAE-v1-SD", f"{CLIP}transformer.": "CLIP-v1-SD"},
        "StableDiffusion",
        "sd15",
    ),
    "inpainting": (SD1 | {UNET: "UNET-v1-Inpainting"}, "StableDiffusionInpaint", "sd15-inpainting"),
    "pix2pix": (SD1 | {UNET: "UNET-v1-Pix2Pix", EMA: "UNET-v1-EMA"}, "StableDiffusionInstructPix2Pix", "sd15"),
    "sd21": (SD2 | {UNET: "UNET-v2-SD"}, "StableDiffusion", "sd21"),
    "sd21-pruned": (SD2 | {UNET: "UNET-v2-SD", f"{CLIP}model.": "CLIP-v2-WD"}, "StableDiffusion", "sd21"),
    "sd2-inpainting": (SD2 | {UNET: "UNET-v2-Inpainting"}, "StableDiffusionInpaint", "sd21"),
    "sd2-depth": (
        SD2 | {UNET: "UNET-v2-Depth", "depth_model.model.": "Depth-v2-SD"},
        "StableDiffusionDepth2Img",
        "sd21",
    ),
    "xl": (XL | {UNET: "UNET-XL-SD"}, "StableDiffusionXL", "sdxl-base"),
    "refiner": (
        {UNET: "UNET-XL-Refiner", VAE: "VAE-v1-SD", "conditioner.embedders.0.model.": "CLIP-XL-SD"},
        "StableDiffusionXLImg2Img",
        "sdxl-refiner",
    ),
    "ssd-1b": (XL | {UNET: "UNET-SSD-1B"}, "StableDiffusionXL", "ssd-1b"),
}
BUFFERS = ("alphas_cumprod", "betas", "posterior_variance", "sqrt_recipm1_alphas_cumprod", "model_ema.num_updates")


def arrays(networks: dict[str, str]) -> dict[str, mx.array]:
    """Tensors of a whole file, of which none is ever computed."""
    found = {prefix + name: mx.zeros(shape) for prefix, part in networks.items() for name, shape in LISTS[part].items()}
    return found | {name: mx.zeros(1000) for name in BUFFERS}


def own(tensors: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def shapes(module) -> dict[str, tuple]:
    return {name: value.shape for name, value in tree_flatten(module.parameters())}


@pytest.mark.parametrize("file", FILES)
def test_published_file_maps_one_to_one(file):
    networks, pipeline, published = FILES[file]
    tensors = arrays(networks)
    checkpoint = read_checkpoint(Path(file), file, tensors, {}, {}, None)
    assert checkpoint.pipeline == f"{pipeline}Pipeline"
    assert len(checkpoint.components) == (4 if pipeline == "StableDiffusionXL" else 3)
    for kind, component in checkpoint.components.items():
        config, prefix = component.config, component.prefix
        module = build(kind, config)
        fill(module, to_diffusers(kind, own(tensors, prefix)))  # raises for whatever is left over
        if kind == "unet":
            expected = REAL_UNETS[published] | {"in_channels": config["in_channels"]}
            same = (
                "num_attention_heads cross_attention_dim use_linear_projection addition_time_embed_dim upcast_attention"
            )
        elif kind == "vae":
            expected, same = REAL_VAE, "norm_num_groups"
        else:
            second = kind == "text_encoder_2"
            expected = REAL_TEXT_ENCODERS["sdxl-2" if second else "sd21" if published == "sd21" else "sd15"]
            same = "num_attention_heads hidden_act layer_norm_eps eos_token_id"
        model = build(kind, expected)
        assert shapes(model) == shapes(module)
        if kind.startswith("text_encoder"):
            ours, theirs = CLIPTextConfig.from_dict(config), CLIPTextConfig.from_dict(expected)
        else:
            ours, theirs = module.config, model.config
        for key in same.split():
            assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize(
    ("kind", "part", "config"),
    [
        ("unet", "UNET-v1-SD", REAL_UNETS["sd15"]),
        ("unet", "UNET-v2-SD", REAL_UNETS["sd21"]),
        ("unet", "UNET-XL-SD", REAL_UNETS["sdxl-base"]),
        ("unet", "UNET-XL-Refiner", REAL_UNETS["sdxl-refiner"]),
        ("vae", "VAE-v1-SD", REAL_VAE),
        ("controlnet", "ControlNet-v1-SD", REAL_UNETS["sd15"]),
    ],
)
def test_names_are_those_that_diffusers_makes(kind, part, config):
    names = {name: mx.array(i) for i, name in enumerate(LISTS[part])}
    ours = {new: int(value) for new, value in to_diffusers(kind, names).items()}
    theirs = diffusers_names(kind, list(names), config)
    assert ours == {new: list(names).index(name) for new, name in theirs.items()}
    assert len(ours) == len(names)


@pytest.mark.parametrize(
    ("part", "published"),
    [
        ("UNET-v1-SD", "sd15"),
        ("UNET-v1-Inpainting", "sd15-inpainting"),
        ("UNET-v2-SD", "sd21"),
        ("UNET-XL-SD", "sdxl-base"),
        ("UNET-XL-Refiner", "sdxl-refiner"),
    ],
)
def test_the_tree_of_the_original_code_is_that_of_the_published_files(part, published):
    assert tree_of(REAL_UNETS[published]) == LISTS[part]


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_published_controlnet(prefix):
    tensors = {prefix + name: mx.zeros(shape) for name, shape in LISTS["ControlNet-v1-SD"].items()}
    assert find(tensors, "file", "controlnet") == {"controlnet": prefix}
    config = read_config("controlnet", tensors, prefix, "file")
    module = build("controlnet", config)
    fill(module, to_diffusers("controlnet", own(tensors, prefix)))
    assert module.config.num_attention_heads == (8,) * 4 and module.config.scale == 8


@pytest.mark.parametrize("layers", [[1, 2, 10], [1, 1, 1], 0])
def test_xl_controlnets_in_diffusers_names(layers):
    """canny-sdxl-1.0, its "mid" and its "small" variant, as diffusers builds them from the published configs."""
    keys = (
        "act_fn addition_embed_type addition_time_embed_dim attention_head_dim block_out_channels cross_attention_dim "
        "projection_class_embeddings_input_dim use_linear_projection down_block_types transformer_layers_per_block"
    )
    config = {key: REAL_UNETS["sdxl-base"][key] for key in keys.split()}
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
