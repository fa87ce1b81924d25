"""The autoencoder with a codebook against diffusers."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import VQModel as Oracle
from mlx.utils import tree_flatten

from oracle import SCALES, nchw, nhwc, normal, pair, relative_error
from stable_diffusion.models import tiling
from stable_diffusion.models.vq import VQConfig
from stable_diffusion.weights.load import build

VQ = {"_class_name": "VQModel", "block_out_channels": [16, 32, 32], "layers_per_block": 1, "norm_num_groups": 8}
VQ |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
VQ |= {"num_vq_embeddings": 64, "scaling_factor": 1.0}
CONFIGS = {
    "ldm": VQ,
    "scaled": VQ | {"scaling_factor": 0.2, "latent_channels": 4},
    "narrow codes": VQ | {"vq_embed_dim": 2, "mid_block_add_attention": False},
}


def oracle_of(config: dict) -> Oracle:
    oracle = Oracle(**{name: value for name, value in config.items() if name != "_class_name"})
    with torch.no_grad():
        oracle.quantize.embedding.weight.copy_(torch.randn(oracle.quantize.embedding.weight.shape))
    return oracle


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_diffusers(config):
    ours, oracle = pair("vae", config, lambda: oracle_of(config))
    factor = config["scaling_factor"]
    for i, (scale, size) in enumerate(zip(SCALES, [(16, 24), (12, 8), (8, 8)], strict=True)):
        x = normal(i + 1, *size, 3, seed=i, scale=scale)
        latents, logvar = ours.encode(mx.array(x))
        assert relative_error(latents, factor * nhwc(oracle.encode(nchw(x)).latents)) <= 1e-4
        assert mx.exp(logvar).max() == 0
        z = normal(i + 1, 3, 5, ours.latent_channels, seed=i, scale=scale)
        decoded = nhwc(oracle.decode(nchw(z) / factor).sample)
        assert relative_error(ours.decode(mx.array(z)), decoded) <= 1e-4
        assert relative_error(tiling.decode(ours, mx.array(z)), decoded) <= 1e-4


def test_latents_become_the_nearest_vectors_of_the_codebook():
    ours, _ = pair("vae", VQ, lambda: oracle_of(VQ))
    codes = np.array(ours.quantize.embedding.weight)
    z = normal(2, 3, 4, 3)
    nearest = np.argmin(((z[..., None, :] - codes) ** 2).sum(axis=-1), axis=-1)
    assert np.array_equal(ours.nearest(mx.array(z)), codes[nearest])


def test_files_without_a_scale_are_not_scaled():
    config = {name: value for name, value in VQ.items() if name not in ("scaling_factor", "_class_name")}
    assert VQConfig.from_dict(config).scaling_factor == 1.0
    with pytest.raises(ValueError, match="norm_type='spatial'"):
        VQConfig.from_dict(config | {"norm_type": "spatial"})


def test_published_sizes():
    """Of CompVis/ldm-celebahq-256."""
    config = VQ | {"block_out_channels": [128, 256, 512], "layers_per_block": 2, "norm_num_groups": 32}
    config |= {"num_vq_embeddings": 8192}
    with torch.device("meta"):
        oracle = Oracle(**{name: value for name, value in config.items() if name != "_class_name"})
    theirs = {name: value.numel() for name, value in oracle.state_dict().items()}
    assert {name: value.size for name, value in tree_flatten(build("vae", config).parameters())} == theirs
