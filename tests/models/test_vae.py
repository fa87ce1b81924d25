"""The autoencoder against diffusers."""

import mlx.core as mx
import numpy as np
import pytest
from diffusers import AutoencoderKL as Oracle

from oracle import SCALES, nchw, nhwc, normal, pair, relative_error, tensors
from stable_diffusion.models.config import AutoencoderConfig
from stable_diffusion.models.vae import AutoencoderKL
from stable_diffusion.weights.formats.original import to_diffusers
from stable_diffusion.weights.load import fill

SD = {"block_out_channels": [16, 32, 32, 32], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 8}
SD |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
CONFIGS = {
    "sd": SD,
    "xl": SD | {"scaling_factor": 0.13025, "force_upcast": True},
    "no-quant-conv": SD | {"use_quant_conv": False, "use_post_quant_conv": False},
    "normalized": SD
    | {"latents_mean": [-1.6, 1.1, 3.3, -2.6], "latents_std": [8.4, 5.9, 4.9, 5.2], "scaling_factor": 0.5},
    "no-attention": SD | {"mid_block_add_attention": False, "layers_per_block": 1},
}


def vaes(config: dict) -> tuple[AutoencoderKL, Oracle]:
    return pair("vae", config, lambda: Oracle(**config))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_diffusers(config):
    ours, oracle = vaes(config)
    factor, center = oracle.config.scaling_factor, 0.0
    if "latents_std" in config:  # which diffusers' pipelines compute with
        factor, center = factor / np.float32(config["latents_std"]), np.float32(config["latents_mean"])
    for i, (scale, size) in enumerate(zip(SCALES, [(16, 40), (35, 52), (8, 9)], strict=True)):
        x = normal(i + 1, *size, 3, seed=i, scale=scale)
        posterior = oracle.encode(nchw(x)).latent_dist
        mean, logvar = ours.encode(mx.array(x))
        assert relative_error(mean, (nhwc(posterior.mean) - center) * factor) <= 1e-4
        assert relative_error(mx.exp(logvar / 2), nhwc(posterior.std) * factor) <= 1e-4
        z = normal(i + 1, 3, 5, 4, seed=i, scale=scale)
        assert relative_error(ours.decode(mx.array(z)), nhwc(oracle.decode(nchw(z / factor + center)).sample)) <= 1e-4


@pytest.mark.parametrize("as_convolution", [False, True])
def test_attention_names_of_old_files(as_convolution):
    ours, oracle = vaes(SD)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in tensors(oracle).items():
        for new, legacy in names.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, legacy)
                if as_convolution and value.ndim == 2:
                    value = value[:, :, None, None]
        old[name] = value
    assert any("proj_attn" in name for name in old)
    again = AutoencoderKL(AutoencoderConfig.from_dict(SD))
    fill(again, to_diffusers("vae", old))
    z = mx.array(normal(1, 2, 2, 4))
    assert np.array_equal(again.decode(z), ours.decode(z))
