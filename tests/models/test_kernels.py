"""Attention, GELU and SiLU against torch, on every way that the backends take."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from oracle import normal, relative_error
from stable_diffusion.models import kernels
from stable_diffusion.models.kernels import attention, gelu, layer_norm, scaled, scaled_silu, silu, sum_positions
from stable_diffusion.models.layers import Attention

# From far below what the polynomial covers to far above, with 0, -0 and the smallest numbers.
RANGE = np.concatenate([np.linspace(-200, 200, 40001), np.linspace(-1e-3, 1e-3, 101), [-0.0, 1e-38]]).astype(np.float32)


@pytest.fixture(params=["cpu", "gpu"])
def way(request, monkeypatch):
    """The CPU's way, and what a GPU would be given."""
    monkeypatch.setattr(kernels, "_on_cpu", lambda x: request.param == "cpu")


@pytest.mark.parametrize("ours, theirs", [(silu, torch.nn.functional.silu), (gelu, torch.nn.functional.gelu)])
def test_activations(way, ours, theirs):
    for x in (RANGE, RANGE * 1e-2, RANGE * 1e-4):
        want = theirs(torch.from_numpy(x).double()).numpy()
        assert relative_error(ours(mx.array(x)), want) <= 1e-6


@pytest.mark.parametrize("width", [8, 40, 64, 80, 160, 512])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_attention(way, width, scale):
    """Up to scores in the thousands, where the last bit of a score counts: it moves a weight by so much."""
    q, k, v = (normal(2, 3, n, width, seed=i, scale=s) for i, (n, s) in enumerate([(50, scale), (77, scale), (77, 1)]))
    scores = np.abs(q.astype(np.float64) @ k.swapaxes(-1, -2)).max() / np.sqrt(width)
    want = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(t).double() for t in (q, k, v)))
    ours = attention(mx.array(q), mx.array(k), mx.array(v))
    assert relative_error(ours, want) <= 1e-6 + 4 * scores * 2.0**-24


def test_attention_to_many_positions(way):
    """Where each weighs little, the floor of the exponential must not add up."""
    q = mx.array([[[[40.0] * 8]]])
    k = mx.concatenate([mx.ones((1, 1, 1, 8)), -mx.ones((1, 1, 100_000, 8))], axis=2)
    v = mx.concatenate([mx.zeros((1, 1, 1, 8)), mx.ones((1, 1, 100_000, 8))], axis=2)
    assert float(attention(q, k, v).max()) < 1e-8


def test_what_is_not_finite_stays_so(way):
    bad = mx.array([[[[float("nan"), 0.0]]]])
    good = mx.ones((1, 1, 1, 2))
    assert mx.isnan(attention(bad, good, good)).all() and mx.isnan(silu(bad)).any() and mx.isnan(gelu(bad)).any()


def test_half_precision_takes_the_kernels_of_mlx():
    x = mx.array([-1.0, 2.0], dtype=mx.float16)
    assert silu(x).dtype == gelu(x).dtype == mx.float16


@pytest.mark.parametrize("size", [1, 1e-2, 1e-3])
def test_norms(way, size):
    """The pieces of GroupNorm, and LayerNorm, of values whose mean is not zero."""
    x, (scale, shift) = size * (normal(2, 6, 5, 24) + 2), normal(2, 2, 1, 1, 24)
    line = torch.from_numpy(x).double() * torch.from_numpy(scale) + torch.from_numpy(shift)
    given = [mx.array(value) for value in (x, scale, shift)]
    assert relative_error(scaled(*given), line.numpy()) <= 1e-6
    assert relative_error(scaled_silu(*given), torch.nn.functional.silu(line).numpy()) <= 1e-6
    assert relative_error(sum_positions(given[0]), x.astype(float).sum(axis=(1, 2), keepdims=True)) <= 1e-6
    weight, bias = scale[0, 0, 0], shift[0, 0, 0]
    told = (torch.from_numpy(value).double() for value in (weight, bias))
    want = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (24,), *told, 1e-5)
    assert relative_error(layer_norm(given[0], mx.array(weight), mx.array(bias), 1e-5), want.numpy()) <= 1e-6


def test_queries_in_pieces(monkeypatch):
    """They are where the scores would be in memory, and make no difference."""
    asked, in_pieces = [], kernels._in_pieces
    monkeypatch.setattr(
        kernels, "_in_pieces", lambda look, q, rows: in_pieces(lambda p: asked.append(p) or look(p), q, rows)
    )
    whole, pieces = Attention(32, 2), Attention(32, 2, largest_scores=4 * 2 * 50 * 8)
    pieces.update(whole.parameters())
    x = mx.array(normal(1, 50, 32))
    assert relative_error(pieces(x), whole(x)) <= 1e-6
    assert [q.shape[2] for q in asked] == [8, 8, 8, 8, 8, 8, 2, 50]
    monkeypatch.setattr("stable_diffusion.models.layers.keeps_scores", lambda q: False)
    assert relative_error(pieces(x), whole(x)) <= 1e-6 and asked[-2].shape[2] == 50
