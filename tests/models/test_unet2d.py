"""The UNet of models without prompts against diffusers: configs in the manner of those that are published."""

import mlx.core as mx
import pytest
import torch
from diffusers import UNet2DModel as Oracle
from mlx.utils import tree_flatten

from oracle import SCALES, nchw, nhwc, normal, pair, relative_error, tensors, twin
from stable_diffusion.models.unet2d import UNet2DConfig
from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.load import build

_PLAIN, _ATTN = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")


def layout(widths: list[int], attends: list[int], **values) -> dict:
    """A config with attention at some levels."""
    kinds = [_ATTN if i in attends else _PLAIN for i in range(len(widths))]
    types = {"down_block_types": [k[0] for k in kinds], "up_block_types": [k[1] for k in reversed(kinds)]}
    return {"_class_name": "UNet2DModel", "block_out_channels": widths, "norm_num_groups": 8} | types | values


_DDPM = {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1}
_DDPM |= {"center_input_sample": False, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "act_fn": "silu"}
UNETS_2D = {
    "ddpm": layout([16, 32, 32], [1], **_DDPM, sample_size=16),  # google/ddpm-*
    "butterflies": layout([16, 16, 32], [1], sample_size=16),  # diffusers' example of training
    "ldm": layout([16, 32, 32], [1, 2], attention_head_dim=16, sample_size=8, resnet_time_scale_shift="default"),
    "short": layout([16, 32], [0, 1], layers_per_block=1, mid_block_type=None, sample_size=(16, 24)),
}
# The values of the published configs that decide shapes.
_CATS = layout([128, 128, 256, 256, 512, 512], [4], **_DDPM, sample_size=256, norm_num_groups=32)
PUBLISHED = {
    "google/ddpm-cat-256": _CATS,
    "google/ddpm-cifar10-32": _CATS | layout([128, 256, 256, 256], [1], sample_size=32, norm_num_groups=32),
    "CompVis/ldm-celebahq-256": layout([224, 448, 672, 896], [1, 2, 3], attention_head_dim=32, norm_num_groups=32),
    "anton-l/ddpm-butterflies-128": layout([128, 128, 256, 256, 512, 512], [4], norm_num_groups=32),
}


def oracle_of(config: dict) -> Oracle:
    return Oracle(**{name: value for name, value in config.items() if name != "_class_name"})


def run_ours(unet, x, t) -> mx.array:
    return unet(mx.array(x), unet.embed_time(mx.array(t), mx.float32))


@pytest.mark.parametrize("config", UNETS_2D.values(), ids=UNETS_2D)
def test_equals_diffusers(config):
    ours, oracle = pair("unet", config, lambda: oracle_of(config))
    for i, (scale, size) in enumerate(zip(SCALES, [(8, 16), (12, 8), (16, 20)], strict=True)):
        x, t = normal(i + 1, *size, 3, seed=i, scale=scale), [999.0, 500.0, 1.0][: i + 1]
        assert relative_error(run_ours(ours, x, t), nhwc(oracle(nchw(x), torch.tensor(t)).sample)) <= 1e-4


def test_on_a_gpu(gpu):
    ours, oracle = pair("unet", UNETS_2D["butterflies"], lambda: oracle_of(UNETS_2D["butterflies"]))
    x = normal(2, 8, 12, 3)
    assert relative_error(run_ours(ours, x, [9.0, 5.0]), nhwc(oracle(nchw(x), torch.tensor([9.0, 5.0])).sample)) <= 1e-4


def test_names_of_old_files():
    _, oracle = pair("unet", UNETS_2D["ddpm"], lambda: oracle_of(UNETS_2D["ddpm"]))
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    named = tensors(oracle)
    for new, name in old.items():
        named = {key.replace(new, name): value for key, value in named.items()}
    assert "mid_block.attentions.0.proj_attn.weight" in named
    assert {name: value.shape for name, value in to_diffusers("unet", named).items()} == {
        name: value.shape for name, value in tensors(oracle).items()
    }


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_published_sizes(config):
    with torch.device("meta"):
        oracle = oracle_of(config)
    theirs = {name: value.numel() for name, value in oracle.state_dict().items()}
    ours = {name: value.size for name, value in tree_flatten(build("unet", config).parameters())}
    assert ours == theirs


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"down_block_types": ["SkipDownBlock2D"] * 3}, ["SkipDownBlock2D"]),
        ({"time_embedding_type": "fourier"}, ["time_embedding_type='fourier'"]),
        ({"resnet_time_scale_shift": "scale_shift"}, ["scale_shift"]),
        ({"num_class_embeds": 10}, ["num_class_embeds=10"]),
        ({"downsample_type": "resnet"}, ["downsample_type='resnet'"]),
        ({"mid_block_scale_factor": 1.41}, ["mid_block_scale_factor=1.41"]),
        ({"attention_head_dim": 12}, ["attention_head_dim=12", "16"]),
        ({"attention_head_dim": "wide"}, ["attention_head_dim='wide'"]),
        ({"attention_head_dim": 0}, ["attention_head_dim=0"]),
    ],
)
def test_what_is_not_computed_is_refused(values, words):
    with pytest.raises(ValueError) as refusal:
        UNet2DConfig.from_dict(UNETS_2D["butterflies"] | values)
    assert all(word in str(refusal.value) for word in words)
    assert "\n" not in str(refusal.value)


def test_half_precision():
    config = UNETS_2D["butterflies"]
    ours, oracle = pair("unet", config, lambda: oracle_of(config))
    half = twin(build("unet", config), oracle)
    half.set_dtype(mx.float16)
    x = normal(1, 8, 8, 3)
    y = half(mx.array(x, dtype=mx.float16), half.embed_time(7.0, mx.float16))
    assert y.dtype == mx.float16 and relative_error(y, run_ours(ours, x, [7.0])) <= 1e-2
