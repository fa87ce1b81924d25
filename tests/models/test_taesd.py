"""The tiny autoencoder against diffusers."""

import json

import mlx.core as mx
import numpy as np
import pytest
from diffusers import AutoencoderTiny as Oracle

from oracle import SCALES, nchw, nhwc, normal, pair, relative_error
from stable_diffusion.models.taesd import AutoencoderTiny
from stable_diffusion.weights.files import open_part
from stable_diffusion.weights.load import load_component

PUBLISHED = json.loads(Oracle().to_json_string())  # TAESD's and TAESDXL's are the defaults
SMALL = PUBLISHED | {"encoder_block_out_channels": [8, 8, 8], "num_encoder_blocks": [1, 2, 1], "latent_channels": 5}
SMALL |= {"decoder_block_out_channels": [16, 16, 16], "num_decoder_blocks": [2, 1, 3]}
CONFIGS = {"published": PUBLISHED, "small": SMALL, "scaled": SMALL | {"scaling_factor": 0.7}}


def vaes(config: dict) -> tuple[AutoencoderTiny, Oracle]:
    return pair("vae", config, lambda: Oracle.from_config(config))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
    ours, oracle = vaes(CONFIGS[name])
    factor, scale = oracle.config.scaling_factor, ours.config.scale
    assert scale == (8 if name == "published" else 4)
    for i, size in enumerate((*SCALES, 10.0)):  # the last is beyond what the decoder lets through
        x = normal(i + 1, 2 * scale, 5 * scale, 3, seed=i, scale=size)
        latents, logvar = ours.encode(mx.array(x))
        assert latents.shape == (i + 1, 2, 5, ours.latent_channels) == logvar.shape
        assert not mx.exp(logvar / 2).any()  # a sample of the posterior is its mean
        assert relative_error(latents, nhwc(oracle.encode(nchw(x)).latents) * factor) <= 1e-4
        z = normal(i + 1, 3, 5, ours.latent_channels, seed=i, scale=size)
        assert relative_error(ours.decode(mx.array(z)), nhwc(oracle.decode(nchw(z) / factor).sample)) <= 1e-4


def test_a_folder_of_diffusers_is_loaded(tmp_path):
    ours, oracle = vaes(SMALL)
    oracle.save_pretrained(tmp_path)
    loaded = load_component(open_part(tmp_path, "vae"))
    z = mx.array(normal(1, 2, 3, 5))
    assert type(loaded) is AutoencoderTiny and np.array_equal(loaded.decode(z), ours.decode(z))
