"""Attention, GELU and SiLU against torch, on every way that the backends take."""

import mlx.core as mx
import numpy as np
import pytest
import torch

from oracle import normal, relative_error
from peaks import peaks
from stable_diffusion.models import layers
from stable_diffusion.models.layers import attention, gelu, layer_norm, scaled, scaled_silu, silu

# From far below what the polynomial covers to far above, with 0, -0 and the smallest numbers.
RANGE = np.concatenate([np.linspace(-200, 200, 40001), np.linspace(-1e-3, 1e-3, 101), [-0.0, 1e-38]]).astype(np.float32)


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    """The kernels of the CPU, and a GPU's."""
    if request.param == "gpu":
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    return request.param


@pytest.mark.parametrize("ours, theirs", [(silu, torch.nn.functional.silu), (gelu, torch.nn.functional.gelu)])
def test_activations(backend, ours, theirs):
    for x in (RANGE, RANGE * 1e-2, RANGE * 1e-4):
        want = theirs(torch.from_numpy(x).double()).numpy()
        assert relative_error(ours(mx.array(x)), want) <= 1e-6


def affine_silu(x, mean, scale, shift):
    return torch.nn.functional.silu((x - mean) * scale + shift)


@pytest.mark.parametrize(
    "ours, theirs, inputs",
    [
        (silu, torch.nn.functional.silu, [RANGE]),
        (gelu, torch.nn.functional.gelu, [RANGE]),
        (scaled_silu, affine_silu, [normal(2, 6, 5, 24), *normal(3, 2, 1, 1, 24)]),
    ],
)
def test_gradients_of_activations(backend, ours, theirs, inputs):
    arrays = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    y = theirs(*arrays)
    weights = normal(*y.shape, seed=1)
    (y * torch.from_numpy(weights)).sum().backward()
    gradients = mx.vjp(ours, [mx.array(x) for x in inputs], [mx.array(weights)])[1]
    for gradient, x in zip(gradients, arrays, strict=True):
        assert relative_error(gradient, x.grad.numpy()) <= 1e-6


@pytest.mark.parametrize("width, scale", [(40, 1e-3), (64, 1.0), (160, 30.0), (512, 1.0)])
def test_attention(backend, width, scale):
    """Up to scores in the thousands, where the last bit of a score counts: it moves a weight by so much."""
    q, k, v = (normal(2, 3, n, width, seed=i, scale=s) for i, (n, s) in enumerate([(50, scale), (77, scale), (77, 1)]))
    scores = np.abs(q.astype(np.float64) @ k.swapaxes(-1, -2)).max() / np.sqrt(width)
    want = torch.nn.functional.scaled_dot_product_attention(*(torch.from_numpy(t).double() for t in (q, k, v)))
    ours = attention(mx.array(q), mx.array(k), mx.array(v))
    assert relative_error(ours, want) <= 1e-6 + 4 * scores * 2.0**-24


def test_attention_to_many_positions(backend):
    """Where each weighs little, the floor of the exponential must not add up."""
    q = mx.array([[[[40.0] * 8]]])
    k = mx.concatenate([mx.ones((1, 1, 1, 8)), -mx.ones((1, 1, 100_000, 8))], axis=2)
    v = mx.concatenate([mx.zeros((1, 1, 1, 8)), mx.ones((1, 1, 100_000, 8))], axis=2)
    assert float(attention(q, k, v).max()) < 1e-8


def test_what_is_not_finite_stays_so(backend):
    bad = mx.array([[[[float("nan"), 0.0]]]])
    good = mx.ones((1, 1, 1, 2))
    assert mx.isnan(attention(bad, good, good)).all() and mx.isnan(silu(bad)).any() and mx.isnan(gelu(bad)).any()


@pytest.mark.parametrize("size", [1, 1e-2, 1e-3])
def test_norms(backend, size):
    """The pieces of GroupNorm, and LayerNorm, of values whose mean is not zero."""
    x, (mean, scale, shift) = size * (normal(2, 6, 5, 24) + 2), normal(3, 2, 1, 1, 24)
    line = (torch.from_numpy(x).double() - torch.from_numpy(mean)) * torch.from_numpy(scale) + torch.from_numpy(shift)
    given = [mx.array(value) for value in (x, mean, scale, shift)]
    assert relative_error(scaled(*given), line.numpy()) <= 1e-6
    assert relative_error(scaled_silu(*given), torch.nn.functional.silu(line).numpy()) <= 1e-6
    far = x + np.float32(1000)
    for kernel, activation in ((scaled, lambda y: y), (scaled_silu, torch.nn.functional.silu)):
        want = activation((torch.from_numpy(far).double() - 1000) * torch.from_numpy(scale))
        y = kernel(mx.array(far), mx.array(1000.0), mx.array(scale), mx.array(0.0))
        assert relative_error(y, want.numpy()) <= 1e-6
    weight, bias = scale[0, 0, 0], shift[0, 0, 0]
    affine = (torch.from_numpy(value).double() for value in (weight, bias))
    want = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (24,), *affine, 1e-5)
    assert relative_error(layer_norm(given[0], mx.array(weight), mx.array(bias), 1e-5), want.numpy()) <= 1e-6


@pytest.mark.parametrize(
    "rows, sizes",  # of queries, whose scores may be in memory at once
    [
        (299, [(2, 2, 50), (1, 2, 50)]),
        (99, [(1, 1, 50)] * 6),
        (49, [(1, 1, 49), (1, 1, 1)] * 6),
        (0.5, [(1, 1, 1)] * 300),
    ],
)
def test_scores_in_pieces(backend, rows, sizes, monkeypatch):
    """They are where the scores would be in memory, and make no difference."""
    calls = []
    attend = layers._attend
    monkeypatch.setattr(layers, "_QUERIES", 1)
    monkeypatch.setattr(layers, "_attend", lambda q, *kv: calls.append(q.shape[:3]) or attend(q, *kv))
    for width, expected in ((160, sizes), (32, sizes if backend == "cpu" else [(3, 2, 50)])):
        q, k, v = (mx.array(normal(3, 2, n, width, seed=n)) for n in (50, 77, 77))
        assert relative_error(attention(q, k, v, rows * 77 * 4), attention(q, k, v)) <= 1e-6
        assert calls == [*expected, (3, 2, 50)]
        calls.clear()


def test_products_of_scores_have_many_rows(monkeypatch):
    """On a CPU, also where their scores take more than they may; products with few rows are slow."""
    calls, attend = [], layers._attend
    monkeypatch.setattr(layers, "_attend", lambda q, *kv: calls.append(q.shape[:3]) or attend(q, *kv))
    q, k, v = (mx.array(normal(1, 2, n, 8, seed=n)) for n in (300, 77, 77))
    assert relative_error(attention(q, k, v, 1), attention(q, k, v)) <= 1e-6
    assert calls == [*[(1, 1, 128), (1, 1, 128), (1, 1, 44)] * 2, (1, 2, 300)]


@pytest.mark.parametrize(
    "width, heads, sizes",  # how many heads, of six in all, are as much work as one kernel may do
    [
        (40, 2, [(1, 2, 50), (1, 1, 50)] * 2),
        (64, 5, [(1, 3, 50)] * 2),
        (64, 0.5, [(1, 1, 25)] * 12),
        (160, 3, [(1, 3, 50)] * 2),
    ],
)
def test_long_kernels_are_cut(backend, width, heads, sizes, monkeypatch):
    """By products of the width that heads are padded to; macOS ends what runs for long. On a CPU nothing is cut."""
    monkeypatch.setattr(layers, "_LONGEST", heads * 2 * 50 * 77 * {40: 64}.get(width, width))
    q, k, v = (mx.array(normal(2, 3, n, width, seed=n)) for n in (50, 77, 77))
    want, calls, attend = attention(q, k, v), [], layers._attend
    monkeypatch.setattr(layers, "_attend", lambda q, *kv: calls.append(q.shape[:3]) or attend(q, *kv))
    assert relative_error(attention(q, k, v), want) <= 1e-6
    assert calls == ([(2, 3, 50)] if backend == "cpu" else sizes)


@pytest.mark.parametrize("width, size, count", [(40, 1024, 1), (40, 1536, 4), (64, 2048, 1)])
def test_long_kernels_at_full_size(width, size, count, monkeypatch):
    """SD 1.5 from 1536 × 1536 on; XL with its ten heads of 64 at a sixteenth of the pixels never."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    calls, heads, positions = [], {40: 8, 64: 10}[width], (size // {40: 8, 64: 16}[width]) ** 2
    monkeypatch.setattr(layers, "_attend", lambda q, *kv: calls.append(q) or q)
    q = mx.zeros((2, heads, positions, width))
    attention(q, q, q)
    assert len(calls) == count


@pytest.mark.parametrize("shape", [(1, 16, 256, 8), (4, 4, 256, 8), (1, 1, 1024, 8)])
def test_pieces_of_scores_are_not_in_memory_together(shape):
    q = mx.array(normal(*shape))
    mx.eval(q)
    assert max(peaks(attention, q, q, q, 2**18)) < 8 * 2**18  # of 16 pieces, of which each has more than one array
