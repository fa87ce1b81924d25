"""Winograd's algorithm on a CPU, against a convolution by torch in float64."""

import mlx.core as mx
import numpy as np
import pytest
from torch.nn import functional as F

from oracle import SCALES, nchw, nhwc, normal, relative_error
from stable_diffusion.models import winograd
from stable_diffusion.models.layers import Conv2d


def by_torch(x: np.ndarray, weight: np.ndarray, padding: int) -> np.ndarray:
    return nhwc(F.conv2d(nchw(x).double(), nchw(weight).double(), padding=padding))


@pytest.mark.parametrize("shape, o", [((1, 34, 66, 128), 64), ((2, 7, 11, 65), 3), ((1, 3, 3, 64), 64)])
def test_equals_torch(shape, o):
    """Sides need not be whole tiles; a mean of maps costs no more than it does others."""
    weight = normal(o, 3, 3, shape[-1], seed=1)
    transformed = winograd.transform(mx.array(weight))
    assert transformed.nbytes == 4 * 36 * o * shape[-1]
    for scale in SCALES:
        for mean in (0, 10):
            x = scale * (normal(*shape) + np.float32(mean))
            assert relative_error(winograd.convolve(mx.array(x), transformed), by_torch(x, weight, 0)) <= 5e-6


@pytest.mark.parametrize(
    "c, o, size, stride, dtype, is_taken",
    [
        (64, 64, (16, 16), 1, mx.float32, True),
        (64, 65, (16, 16), 1, mx.float32, False),
        (64, 16, (5, 13), 1, mx.float32, True),
        (63, 64, (16, 16), 1, mx.float32, False),
        (64, 64, (16, 16), 2, mx.float32, False),
        (64, 64, (16, 16), 1, mx.float16, False),
    ],
)
def test_large_maps_of_many_channels_go_so(c, o, size, stride, dtype, is_taken, monkeypatch):
    taken, convolve = [], winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda x, u: taken.append(x.shape) or convolve(x, u))
    conv, x = Conv2d(c, o, 3, stride=stride, padding=1), normal(1, *size, c)
    conv.set_dtype(dtype)
    y = conv(mx.array(x).astype(dtype)) - conv.bias
    assert bool(taken) == is_taken
    if is_taken:
        assert relative_error(y, by_torch(x, np.array(conv.weight), 1)) <= 5e-6
    taken.clear()
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    conv(mx.array(x).astype(dtype))
    assert not taken


def test_gradients():
    conv, x, change = Conv2d(64, 16, 3, padding=1), normal(1, 9, 8, 64), normal(1, 9, 8, 16, seed=1)

    def loss(x: mx.array, weight: mx.array) -> mx.array:
        conv.weight = weight
        return (conv(x) * mx.array(change)).sum()

    ours = mx.grad(loss, (0, 1))(mx.array(x), conv.weight)
    inputs = [nchw(a).double().requires_grad_() for a in (x, np.array(conv.weight))]
    F.conv2d(*inputs, padding=1).backward(nchw(change).double())
    for got, want in zip(ours, inputs, strict=True):
        assert relative_error(got, nhwc(want.grad)) <= 1e-6
