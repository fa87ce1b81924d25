"""Convolutions that pad by the opposite edge: the edges of a picture meet, and without them all is as before."""

from functools import partial

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch

from oracle import relative_error
from stable_diffusion import Options, StableDiffusion
from stable_diffusion.models import tiling
from stable_diffusion.models.layers import Context
from stable_diffusion.models.seamless import SEAMLESS, seamless

AXES = {"x": 2, "y": 1}


@pytest.fixture(scope="module")
def sd(sd1_folder) -> StableDiffusion:
    return StableDiffusion(sd1_folder)


def circular(network: torch.nn.Module) -> torch.nn.Module:
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.padding_mode = "circular"
    return network


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def unet(sd, x: mx.array, context: mx.array) -> mx.array:
    return sd.unet(x, sd.unet.embed_time(500.0, mx.float32, None, None), Context(context))


def test_networks_are_those_of_diffusers_with_circular_convolutions(sd, sd1_folder):
    theirs = circular(diffusers.UNet2DConditionModel.from_pretrained(sd1_folder / "unet"))
    vae = circular(diffusers.AutoencoderKL.from_pretrained(sd1_folder / "vae"))
    context = noise(1, 77, sd.unet_config.cross_attention_dim[0])
    for scale in (1, 1e-3):
        x = noise(1, 8, 12, 4) * np.float32(scale)
        with torch.no_grad():
            nchw = torch.from_numpy(x).permute(0, 3, 1, 2)
            wanted = theirs(nchw, 500, torch.from_numpy(context)).sample.permute(0, 2, 3, 1).numpy()
            decoded = vae.decode(nchw / vae.config.scaling_factor).sample.permute(0, 2, 3, 1).numpy()
        with seamless("xy"):
            assert relative_error(unet(sd, mx.array(x), mx.array(context)), wanted) <= 1e-4
            assert relative_error(sd.autoencoder.decode(mx.array(x)), decoded) <= 1e-4


@pytest.mark.parametrize("axes", SEAMLESS)
def test_rolling_goes_through_the_networks(sd, axes):
    """A shift of the input along an axis is one of the output, whole and in slices, and along the other it is not."""
    x, context = mx.array(noise(1, 8, 12, 4)), mx.array(noise(1, 77, sd.unet_config.cross_attention_dim[0]))
    pixels = mx.array(noise(1, 32, 48, 3))
    scale = sd.vae_config.scale
    encoder, decoder = sd.autoencoder.encoder, sd.autoencoder.decoder
    levels = 2 ** (len(sd.unet_config.block_out_channels) - 1)
    for name, run, value, step, up in (
        ("unet", lambda x: unet(sd, x, context), x, levels, levels),
        ("decoder", decoder, x, 3, 3 * scale),
        ("encoder", encoder, pixels, 3 * scale, 3),
        ("decoder in slices", lambda x: tiling.in_slices(decoder.layers, x, 3), x, 3, 3 * scale),
        ("encoder in slices", lambda x: tiling.in_slices(encoder.layers, x, 8), pixels, 3 * scale, 3),
    ):
        for axis, along in AXES.items():
            with seamless(axes):
                made, rolled = run(value), run(mx.roll(value, step, along))
            error = relative_error(mx.roll(made, up, along), np.array(rolled))
            assert error <= 1e-5 if axis in axes else error > 1e-3, (name, axis, error)


def test_tiles_know_the_other_edge(sd):
    x, layers = mx.array(noise(1, 20, 28, 4)), sd.autoencoder.decoder.layers
    scale, run = sd.vae_config.scale, partial(tiling.in_slices, layers, rows=8)
    with seamless("xy"):
        made, rolled = (tiling.blend_tiles(run, z, 16, 1, scale) for z in (x, mx.roll(x, 14, 2)))
    assert made.shape == (1, 20 * scale, 28 * scale, 3)
    rolled = mx.roll(rolled, -14 * scale, 2)
    jump = mx.abs(made[:, :, 0] - made[:, :, -1]).mean() / mx.abs(rolled[:, :, 0] - rolled[:, :, -1]).mean()
    assert jump.item() < 1.2


def test_off_is_as_before_and_nothing_stays(sd):
    def draw(**options) -> np.ndarray:
        *_, x = sd.generate_latents("the red cat", num_steps=2, latent_size=(8, 8), seed=1, cfg_weight=1, **options)
        return np.array(sd.decode(x, seamless=options.get("seamless")))

    before, without, made = draw(), draw(seamless=None), draw(seamless="xy")
    assert np.array_equal(before, without) and np.array_equal(before, draw())
    assert np.abs(made - before).max() > 0.01
    with pytest.raises(ValueError, match="seamless 'z' is unknown; choose one of x, y, xy"):
        Options(seamless="z")
