"""Decoding and encoding by bands and by tiles, against the whole."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from models.test_taesd import SMALL as TINY
from models.test_vae import SD
from oracle import normal, relative_error
from peaks import peaks
from stable_diffusion.models import tiling
from stable_diffusion.models.config import AutoencoderConfig
from stable_diffusion.models.taesd import AutoencoderTiny, AutoencoderTinyConfig
from stable_diffusion.models.tiling import Way, decode, encode, in_bands, in_tiles, peak_as_a_whole, peak_in_bands, way
from stable_diffusion.models.vae import AutoencoderKL
from stable_diffusion.weights.files import open_part
from stable_diffusion.weights.load import load_component

AHEAD = 10**12  # bytes: with this limit MLX need not wait for what it computes
BUNDLED = tiling.__file__.replace("tiling.py", "tiny")


def make(name: str) -> AutoencoderKL | AutoencoderTiny:
    mx.random.seed(0)
    if name == "tiny":
        return AutoencoderTiny(AutoencoderTinyConfig.from_dict(TINY))
    if name == "bundled":
        return load_component(open_part(BUNDLED, "vae"), mx.float32)
    return AutoencoderKL(AutoencoderConfig.from_dict(SD if name == "sd" else SD | {"mid_block_add_attention": False}))


@pytest.fixture
def bands(monkeypatch):
    """Nothing is left to one graph, and bands have the fewest rows that they can have."""
    monkeypatch.setattr(tiling, "_WHOLE", dict.fromkeys(tiling._WHOLE, 0))
    monkeypatch.setattr(tiling, "_BANDS", dict.fromkeys(tiling._BANDS, (1,)))


# Latents of one row, fewer rows than a band has, odd sides, and a batch.
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 9, 5), (2, 6, 11)])
@pytest.mark.parametrize("name", ["sd", "no-attention", "bundled", "tiny"])
def test_bands_give_the_whole(name, shape, bands):
    vae = make(name)
    z = mx.array(normal(*shape, vae.latent_channels))
    assert relative_error(decode(vae, z), vae.decode(z)) <= 3e-6
    # Pixels need not be a multiple of latents.
    x = mx.array(normal(shape[0], shape[1] * 8 + 3, shape[2] * 8 + 6, 3))
    for ours, whole in zip(encode(vae, x), vae.encode(x), strict=True):
        assert relative_error(1 + mx.exp(ours), 1 + mx.exp(whole)) <= 3e-6  # the variance of the tiny one is 0


def test_bands_of_any_height_give_the_whole():
    vae, z = make("sd"), mx.array(normal(1, 12, 10, 4))
    whole = vae.decode(z)
    heights = set()
    for size in (2**14, 2**18, 2**20):
        how = Way(0, size)
        heights.add(next(tiling._cut([mx.zeros((1, 96, 80, 16))], 16, how)).shape[1])
        assert relative_error(vae.decode(z, partial(in_bands, vae.decoder.layers, how=how)), whole) <= 3e-6
    assert len(heights) == 3


def test_half_precision_by_bands(bands):
    vae = make("sd")
    whole, z = vae.decode(mx.array(normal(1, 9, 7, 4))), mx.array(normal(1, 9, 7, 4))
    vae.set_dtype(mx.float16)
    pixels = decode(vae, z.astype(mx.float16))
    assert pixels.dtype == mx.float16
    assert relative_error(pixels, whole) <= 1e-2


def test_small_pictures_stay_lazy():
    vae, z = make("sd"), mx.array(normal(2, 4, 6, 4))
    mx.eval(vae.parameters(), z)
    before = mx.get_active_memory()
    pixels = decode(vae, z)
    assert mx.get_active_memory() - before < pixels.nbytes  # nothing was computed yet
    assert np.array_equal(pixels, vae.decode(z))
    x = mx.array(normal(1, 24, 40, 3))
    assert all(np.array_equal(a, b) for a, b in zip(encode(vae, x), vae.encode(x), strict=True))


@pytest.mark.parametrize("name", ["sd", "tiny"])
def test_one_tile_is_the_whole(name):
    vae = make(name)
    z = mx.array(normal(1, 5, 9, vae.latent_channels))
    how, scale = Way(0, 2**21, side=20), vae.config.scale
    assert relative_error(in_tiles(vae.decoder, z, how, 1, scale), vae.decoder(z)) <= 1e-6
    x = mx.array(normal(1, 43, 70, 3))
    assert relative_error(in_tiles(vae.encoder, x, how, scale, 1), vae.encoder(x)) <= 1e-6


@pytest.mark.parametrize("length, side", [(10, 10), (10, 16), (11, 10), (64, 16), (100, 24), (35, 16)])
def test_weights_of_tiles_add_up_to_one(length, side):
    total, ends = np.zeros(length * 8), []
    for start, end, weights in tiling._spans(length, side, 8):
        assert end - start == min(side, length) and (np.array(weights) > 0).all()
        assert not ends or ends[-1] - start >= side // 4
        total[start * 8 : end * 8] += np.array(weights)
        ends.append(end)
    assert ends[-1] == length
    assert np.abs(total - 1).max() <= 1e-6


def test_tiles_show_no_seam():
    """With the bundled model's pictures: close to the whole, and no step where one tile ends."""
    vae = make("bundled")
    x = mx.cos(mx.arange(256)[:, None] / 40) * mx.sin(mx.arange(384)[None] / 60)
    x = mx.broadcast_to((0.7 * x)[None, :, :, None], (1, 256, 384, 3))
    z = vae.encode(x)[0]
    whole = np.array(vae.decode(z))
    scale = vae.config.scale
    side = 32
    tiles = np.array(vae.decode(z, lambda z: in_tiles(vae.decoder, z, Way(0, 2**23, True, side), 1, scale)))
    assert np.abs(tiles - whole).mean() < 4 / 127.5
    for axis, length in ((1, 256), (2, 384)):
        jumps = np.abs(np.diff(tiles, axis=axis)).mean(axis=(0, 3 - axis, 3))
        spans = tiling._spans(length // scale, side, scale)
        assert len(spans) > 1
        seams = {edge * scale - 1 for start, end, _ in spans for edge in (start, end)} & set(range(length - 1))
        assert max(jumps[i] for i in seams) <= max(jumps[i] for i in range(length - 1) if i not in seams)


SIZES = [(256, 256), (200, 344), (384, 256)]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("name", ["sd", "wide", "tiny"])
def test_the_expected_peak_is_that_of_mlx(name, height, width):
    if name == "tiny":
        vae = AutoencoderTiny(AutoencoderTinyConfig())
    else:
        widths = [16, 32, 32, 32] if name == "sd" else [32, 64, 128, 128]
        vae = AutoencoderKL(AutoencoderConfig.from_dict(SD | {"block_out_channels": widths}))
    mx.eval(vae.parameters())
    z, x = mx.zeros((1, height // 8, width // 8, 4)), mx.zeros((1, height, width, 3))
    for network, given in ((vae.decoder, z), (vae.encoder, x)):
        for how in (Way(0, 2**23), Way(0, 2**21, halved=True))[: 1 if name == "tiny" else 2]:
            expected = peak_in_bands(network, given, how.band, how.halved)
            assert 0.85 <= max(peaks(in_bands, network.layers, given, how, runs=2, limit=AHEAD)) / expected <= 1.15
        if height == 256:
            part = given[:, : given.shape[1] // 2, : given.shape[2] // 2]
            assert 0.75 <= max(peaks(network, part, runs=5, limit=AHEAD)) / peak_as_a_whole(network, part) <= 1.1


def test_maps_in_half_precision_change_no_level():
    vae = make("bundled")
    z = vae.encode(mx.array(np.clip(normal(1, 96, 128, 3, scale=0.4), -1, 1)))[0]
    whole = np.array(vae.decode(z))
    halved = np.array(vae.decode(z, partial(in_bands, vae.decoder.layers, how=Way(0, 2**18, halved=True))))
    assert 0 < 127.5 * np.abs(halved - whole).max() < 0.5
    # Nor do values that float16 has no numbers for.
    band = mx.array(normal(1, 4, 5, 6, scale=1e6))
    (kept,) = tiling._Map([band], Way(0, 1, halved=True))
    assert relative_error(kept, band) < 3e-4 and kept.dtype == mx.float32
    assert not np.any(np.array(next(tiling._Map([0 * band], Way(0, 1, halved=True)).used_up())))


def test_memory_stays_below_the_budget():
    widths = {"block_out_channels": [32, 32, 32, 32], "mid_block_add_attention": False}
    vae = AutoencoderKL(AutoencoderConfig.from_dict(SD | widths))
    z, x = mx.array(normal(1, 40, 24, 4)), mx.array(normal(1, 320, 192, 3))
    mx.eval(vae.parameters(), z, x)
    bands, thin, halved = (peak_in_bands(vae.decoder, z, *how) for how in ((2**23,), (2**21,), (2**21, True)))
    ways = []
    for budget in (1.11 * bands, 1.11 * thin, 1.11 * halved, 0.9 * halved):
        ways.append(way(vae.decoder, z, 1, budget))
        assert max(peaks(decode, vae, z, budget, runs=1, limit=AHEAD)) <= budget
        assert max(peaks(encode, vae, x, budget, runs=1, limit=AHEAD)) <= budget
    assert [(how.band, how.halved) for how in ways] == [(2**23, False), (2**21, False), (2**21, True), (2**21, True)]
    assert ways[2].side is None and 16 <= ways[3].side < 40


def test_where_no_tile_fits_the_smallest_are_taken(caplog):
    vae = make("sd")
    pixels = decode(vae, mx.zeros((1, 32, 32, 4)), 1e6)
    assert pixels.shape == (1, 256, 256, 3)
    assert "memory is short: the autoencoder may take 0.00 GB" in caplog.text
