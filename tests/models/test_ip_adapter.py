"""IP-Adapters and CLIP's image encoder against diffusers and transformers."""

import diffusers
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from configs import REAL_UNETS, UNETS
from image_prompts import KINDS, flat, image_encoder, random_adapter
from oracle import SCALES, nchw, nhwc, normal, relative_error, tensors
from stable_diffusion.images.image import clip_pixels
from stable_diffusion.models.config import UNetConfig
from stable_diffusion.models.ip_adapter import IPAdapterConfig, attention_widths
from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.formats.shapes import READERS
from stable_diffusion.weights.load import build, fill
from test_full_size import check, oracle_shapes

# The published encoders: ViT-H, bigG, and the one of the safety checker, as their config.json spells them.
REAL = {
    "ViT-H": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    | {"image_size": 224, "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu"},
    "bigG": {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16}
    | {"image_size": 224, "patch_size": 14, "projection_dim": 1280, "hidden_act": "gelu"},
    "ViT-L": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"image_size": 224, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu"},
}


def twin(oracle: CLIPVisionModelWithProjection) -> nn.Module:
    """The image encoder with the weights of transformers'."""
    ours = build("image_encoder", oracle.config.to_dict())
    fill(ours, to_diffusers("image_encoder", tensors(oracle)))
    return ours


@pytest.mark.parametrize("values", [{}, {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}], ids=["gelu", "quick"])
def test_the_image_encoder_equals_transformers(values):
    oracle = image_encoder(**values)
    ours = twin(oracle)
    for batch, scale in enumerate(SCALES, start=1):
        x = normal(batch, 42, 42, 3, seed=batch, scale=scale)
        embeddings, states = ours(mx.array(x))
        want = oracle(nchw(x), output_hidden_states=True)
        assert relative_error(embeddings, want.image_embeds) <= 1e-4
        for mine, theirs in zip(states, want.hidden_states, strict=True):
            assert relative_error(mine, theirs) <= 1e-4
    with pytest.raises(ValueError, match=r"takes pixels \[B, 42, 42, 3\], not .* resize them"):
        ours(mx.zeros((1, 32, 42, 3)))


@pytest.mark.parametrize("name", REAL)
def test_parameters_are_those_of_the_published_encoders(name):
    oracle = oracle_shapes(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**REAL[name])))
    check("image_encoder", REAL[name], oracle)
    stored = {key: mx.zeros(shape) for key, shape in oracle.items()}
    assert READERS["image_encoder"](stored) == REAL[name]  # so a file alone is read with the same


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_diffusers(kind):
    unet = diffusers.UNet2DConditionModel(**UNETS["sd1"])
    nested = random_adapter(unet, kind)
    named = {name: mx.array(value.numpy()) for name, value in flat(nested).items()}
    ours = build("ip_adapter", READERS["ip_adapter"](named))
    fill(ours, to_diffusers("ip_adapter", named))
    unet._load_ip_adapter_weights([nested], low_cpu_mem_usage=False)
    (project,) = unet.encoder_hid_proj.image_projection_layers
    encoder = image_encoder()
    pixels = normal(3, 42, 42, 3)
    tokens, negative = ours.encode(twin(encoder), mx.array(pixels))
    run = encoder(torch.cat([nchw(pixels), torch.zeros(1, 3, 42, 42)]), output_hidden_states=True)
    features, zero = run.hidden_states[-2][:3], run.hidden_states[-2][3:]
    if kind == "plain":
        features, zero = run.image_embeds[:3], torch.zeros_like(run.image_embeds[:1])
    with torch.no_grad():
        assert relative_error(tokens, project(features)) <= 1e-4
        assert relative_error(negative, project(zero)) <= 1e-4
        for scale in SCALES:
            assert relative_error(ours.embed(mx.array((scale * features).numpy())), project(scale * features)) <= 1e-4
    processors = [p for name, p in unet.attn_processors.items() if name.endswith("attn2.processor")]
    for pair, processor in zip(ours.keys_and_values, processors, strict=True):  # in diffusers' order
        for mine, theirs in zip(pair, (processor.to_k_ip[0], processor.to_v_ip[0]), strict=True):
            assert np.array_equal(mine.weight, theirs.weight.detach())


@pytest.mark.parametrize("name, configs", [*((n, UNETS) for n in UNETS), *((n, REAL_UNETS) for n in REAL_UNETS)])
def test_the_order_of_cross_attentions_is_that_of_diffusers(name, configs):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**configs[name])
    names = [name.removesuffix(".processor") for name in unet.attn_processors if ".attn2." in name]
    want = [unet.get_submodule(name).to_k.weight.shape[0] for name in names]
    assert list(attention_widths(UNetConfig.from_dict(configs[name]))) == want


_PLUS = {"image_proj": "resampler", "image_width": 1280, "num_tokens": 16}
_XL_PLUS = _PLUS | {"hidden_size": 1280, "attention_size": 1280, "intermediate_size": 5120}
PUBLISHED = {  # what a file of h94/IP-Adapter holds, and its megabytes there, in half precision
    "ip-adapter_sd15": ("sd15", {"image_proj": "linear", "image_width": 1024, "num_tokens": 4}, 44.6),
    "ip-adapter_sd15_vit-G": ("sd15", {"image_proj": "linear", "image_width": 1280, "num_tokens": 4}, 46.2),
    "ip-adapter-plus_sd15": ("sd15", _PLUS, 98.2),
    "ip-adapter-full-face_sd15": ("sd15", {"image_proj": "mlp", "image_width": 1280}, 43.6),
    "ip-adapter_sdxl": ("sdxl-base", {"image_proj": "linear", "image_width": 1280, "num_tokens": 4}, 703),
    "ip-adapter-plus_sdxl_vit-h": ("sdxl-base", _XL_PLUS, 848),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_adapters_have_the_size_of_the_published_files(name):
    model, values, megabytes = PUBLISHED[name]
    unet = UNetConfig.from_dict(REAL_UNETS[model])
    config = {"context_width": max(unet.cross_attention_dim), "attention_widths": list(attention_widths(unet))} | values
    adapter = build("ip_adapter", config)
    shapes = {key: mx.zeros(value.shape) for key, value in tree_flatten(adapter.parameters())}
    assert abs(2e-6 * sum(value.size for value in shapes.values()) - megabytes) <= (0.1 if megabytes < 100 else 1)
    assert IPAdapterConfig.from_dict(READERS["ip_adapter"](shapes)) == adapter.config
    adapter.config.check_fits(unet)


def test_an_adapter_for_another_family_is_refused():
    config = IPAdapterConfig("linear", image_width=8, context_width=32, attention_widths=(32,))
    messages = {
        "xl": "32 channels, the model's prompts 64",
        "sd1": r"1 cross-attentions of \[32\] channels, the model has 11 .* \[32, 64\]",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            config.check_fits(UNetConfig.from_dict(UNETS[name]))


# --- pictures ------------------------------------------------------------------------------------------------------


def test_pixels_equal_transformers():
    processor = CLIPImageProcessorPil(size=42, crop_size=42)
    levels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    pictures = [
        Image.fromarray(levels[:h, :w]) for h, w in ((42, 42), (61, 97), (120, 33), (20, 31), (51, 42), (42, 200))
    ]
    want = processor(images=pictures, return_tensors="pt").pixel_values
    got = clip_pixels(pictures, 42)
    assert got.shape == (6, 42, 42, 3) and got.dtype == mx.float32
    assert np.abs(np.array(got) - nhwc(want)).max() <= 1e-5
    one = np.asarray(pictures[1], np.float32) / 255 * 2 - 1
    for given in (one, mx.array(one), pictures[1].convert("RGBA")):
        assert np.array_equal(clip_pixels(given, 42), got[1:2])
    with pytest.raises(ValueError, match="200 x 4 pixels is too narrow"):
        clip_pixels(Image.fromarray(levels[:4]), 42)
