"""Decoding and encoding in slices and in tiles, against one graph."""

from functools import partial
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import stable_diffusion
from models.test_taesd import PUBLISHED, SMALL
from models.test_vae import SD
from oracle import normal, relative_error
from peaks import peaks
from stable_diffusion.models import tiling
from stable_diffusion.models.taesd import AutoencoderTiny
from stable_diffusion.models.tiling import blend_tiles, decode, encode, in_slices, plan, spans
from stable_diffusion.models.vae import AutoencoderKL
from stable_diffusion.weights.files import open_part
from stable_diffusion.weights.load import build, load_component

AHEAD = 10**12  # bytes: with this limit MLX need not wait for what it computes


NO_ATTENTION = {"mid_block_add_attention": False}
CONFIGS = {
    "sd": SD,
    "no-attention": SD | NO_ATTENTION,
    "narrow": SD | NO_ATTENTION | {"block_out_channels": [32, 32, 32, 32]},
    "wide": SD | {"block_out_channels": [32, 64, 128, 128]},
    "tiny": SMALL,
    "published tiny": PUBLISHED,
}


def autoencoder(name: str) -> AutoencoderKL | AutoencoderTiny:
    mx.random.seed(0)
    if name == "bundled":
        return load_component(open_part(Path(stable_diffusion.__file__).parent / "tiny", "vae"), mx.float32)
    vae = build("vae", CONFIGS[name])
    mx.eval(vae.parameters())
    return vae


@pytest.fixture
def sliced(monkeypatch):
    """Nothing is left to one graph, and slices have one row."""
    monkeypatch.setattr(tiling, "_LARGEST_GRAPH", dict.fromkeys(tiling._LARGEST_GRAPH, 0))
    monkeypatch.setattr(tiling, "_SLICE", dict.fromkeys(tiling._SLICE, 1))


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 3)])
@pytest.mark.parametrize("name", ["sd", "no-attention", "bundled", "tiny"])
def test_slices_are_exact(name, shape, sliced):
    vae = autoencoder(name)
    z = mx.array(normal(*shape, vae.latent_channels))
    assert relative_error(decode(vae, z), vae.decode(z)) <= 3e-6
    # Pixels need not be a multiple of latents.
    x = mx.array(normal(shape[0], shape[1] * 8 + 3, shape[2] * 8 + 6, 3))
    for ours, exact in zip(encode(vae, x), vae.encode(x), strict=True):
        assert relative_error(1 + mx.exp(ours), 1 + mx.exp(exact)) <= 3e-6  # the variance of the tiny one is 0


@pytest.mark.parametrize("name", ["sd", "tiny"])
def test_slices_of_any_height_and_one_tile_are_exact(name):
    vae = autoencoder(name)
    z, x = mx.array(normal(1, 12, 10, vae.latent_channels)), mx.array(normal(1, 43, 70, 3))
    for rows in (2, 5, 64):
        assert relative_error(in_slices(vae.decoder.layers, z, rows), vae.decoder(z)) <= 3e-6
        assert relative_error(in_slices(vae.encoder.layers, x, rows), vae.encoder(x)) <= 3e-6
    scale, x = vae.config.scale, x[:, :40, :64]
    for half, pixels, down, up in ((vae.decoder, z, 1, scale), (vae.encoder, x, scale, 1)):
        one_tile = blend_tiles(partial(in_slices, half.layers, rows=80), pixels, 20, down, up)
        assert relative_error(one_tile, half(pixels)) <= 1e-6


def test_half_precision_in_slices(sliced):
    vae = autoencoder("sd")
    exact, z = vae.decode(mx.array(normal(1, 9, 7, 4))), mx.array(normal(1, 9, 7, 4))
    vae.set_dtype(mx.float16)
    pixels = decode(vae, z.astype(mx.float16))
    assert pixels.dtype == mx.float16
    assert relative_error(pixels, exact) <= 1e-2


def test_small_pictures_stay_lazy():
    vae, z = autoencoder("sd"), mx.array(normal(2, 4, 6, 4))
    mx.eval(z)
    before = mx.get_active_memory()
    pixels = decode(vae, z)
    assert mx.get_active_memory() - before < pixels.nbytes  # nothing was computed yet
    assert np.array_equal(pixels, vae.decode(z))
    x = mx.array(normal(1, 24, 40, 3))
    assert all(np.array_equal(a, b) for a, b in zip(encode(vae, x), vae.encode(x), strict=True))


@pytest.mark.parametrize("length, side", [(10, 10), (1, 16), (11, 10), (64, 16), (100, 24)])
def test_tiles_overlap_by_a_quarter_and_cover_all(length, side):
    tiles = spans(length, side)
    assert tiles[0][0] == 0 and tiles[-1][1] == length
    assert {end - start for start, end in tiles} == {min(side, length)}
    assert all(before[1] - after[0] >= side // 4 for before, after in pairwise(tiles))


def test_tiles_show_no_seam():
    """With the bundled model's pictures: close to the exact ones, and no step where one tile ends."""
    vae = autoencoder("bundled")
    x = mx.cos(mx.arange(256)[:, None] / 40) * mx.sin(mx.arange(384)[None] / 60)
    x = mx.broadcast_to((0.7 * x)[None, :, :, None], (1, 256, 384, 3))
    z = vae.encode(x)[0]
    exact = np.array(vae.decode(z))
    scale, side = vae.config.scale, 32
    in_rows = partial(in_slices, vae.decoder.layers, rows=8)
    tiles = np.array(vae.decode(z, lambda z: blend_tiles(in_rows, z, side, 1, scale)))
    assert np.abs(tiles - exact).mean() < 4 / 127.5
    for axis, length in ((1, 256), (2, 384)):
        jumps = np.abs(np.diff(tiles, axis=axis)).mean(axis=(0, 3 - axis, 3))
        ends = spans(length // scale, side)
        assert len(ends) > 1
        seams = {edge * scale - 1 for start, end in ends for edge in (start, end)} & set(range(length - 1))
        assert max(jumps[i] for i in seams) <= max(jumps[i] for i in range(length - 1) if i not in seams)


@pytest.mark.parametrize("name", ["sd", "wide", "published tiny"])
def test_the_expected_peak_is_that_of_mlx(name, monkeypatch):
    """Of one graph, and of slices."""
    vae = autoencoder(name)
    for half, shape in (("decoder", (1, 12, 14, 4)), ("encoder", (1, 96, 112, 3))):
        expected = plan(vae.config, half, shape)
        assert expected.rows is None
        assert 0.75 <= max(peaks(vae[half], mx.zeros(shape), runs=5, limit=AHEAD)) / expected.peak <= 1.1
    monkeypatch.setattr(tiling, "_LARGEST_GRAPH", dict.fromkeys(tiling._LARGEST_GRAPH, 0))
    for half, shape in (("decoder", (1, 25, 43, 4)), ("encoder", (1, 200, 344, 3))):
        expected = plan(vae.config, half, shape)
        peak = max(peaks(in_slices, vae[half].layers, mx.zeros(shape), expected.rows, runs=2, limit=AHEAD))
        assert (0.6 if name == "published tiny" else 0.75) <= peak / expected.peak <= 1.1


def test_memory_stays_below_the_budget():
    vae = autoencoder("narrow")
    z, x = mx.array(normal(1, 40, 24, 4)), mx.array(normal(1, 320, 192, 3))
    mx.eval(z, x)
    exact = plan(vae.config, "decoder", z.shape).peak
    plans = []
    for budget in (1.11 * exact, 0.9 * exact, 0.7 * exact):
        plans.append(plan(vae.config, "decoder", z.shape, budget))
        assert max(peaks(decode, vae, z, budget, runs=1, limit=AHEAD)) <= budget
        assert max(peaks(encode, vae, x, budget, runs=1, limit=AHEAD)) <= budget
    assert [chosen.tile for chosen in plans[:1]] == [None] and 16 <= plans[2].tile <= plans[1].tile < 40


def test_where_no_tile_fits_the_smallest_are_taken(caplog):
    vae = autoencoder("sd")
    pixels = decode(vae, mx.zeros((1, 24, 24, 4)), 1e6)
    assert pixels.shape == (1, 192, 192, 3)
    assert "memory is short: the autoencoder needs 0.0" in caplog.text
