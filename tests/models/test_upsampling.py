"""Doubling followed by a convolution, against torch: by sums of weights, or as two operations."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from oracle import SCALES, nchw, nhwc, normal, relative_error
from stable_diffusion.lora.delta import LoRADelta
from stable_diffusion.lora.layers import LoRALayer
from stable_diffusion.models import layers, tiling
from stable_diffusion.models.layers import Conv2d
from stable_diffusion.models.upsampling import Upsample2D, UpsampledConv2d


@pytest.fixture
def kernels(monkeypatch) -> list[int]:
    """The side of the kernel of each convolution."""
    sides: list[int] = []
    convolve = layers._convolve

    def watched(x, weight, *args):
        sides.append(weight.shape[1])
        return convolve(x, weight, *args)

    monkeypatch.setattr(layers, "_convolve", watched)
    return sides


@pytest.fixture(params=["cpu", "gpu"])
def device(request, monkeypatch) -> str:
    """The default device, as the layers see it."""
    device = mx.Device(getattr(mx, request.param))
    monkeypatch.setattr(mx, "default_device", lambda: device)
    return request.param


def layer(c: int = 5, o: int | None = None) -> Upsample2D | UpsampledConv2d:
    result = Upsample2D(c) if o is None else UpsampledConv2d(c, o, bias=False)
    conv = getattr(result, "conv", result)
    conv.weight = mx.array(normal(o or c, 3, 3, c, seed=3))
    if "bias" in conv:
        conv.bias = mx.array(normal(c, seed=4))
    return result


def by_torch(conv: Conv2d, x: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    weight = torch.from_numpy(np.array(conv.weight)).permute(0, 3, 1, 2).double()
    bias = torch.from_numpy(np.array(conv.bias)).double() if "bias" in conv else None
    doubled = F.interpolate(nchw(x).double(), **({"scale_factor": 2} if size is None else {"size": size}))
    return nhwc(F.conv2d(doubled, weight, bias, padding=1))


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (1, 64), (12, 17), (7, 9), (1, 1), (3, 5)])
def test_equals_torch(size, device, kernels):
    for scale in SCALES:
        x = normal(2, *size, 5, scale=scale)
        for up in (layer(), layer(o=6)):
            kernels.clear()
            assert relative_error(up(mx.array(x)), by_torch(getattr(up, "conv", up), x)) <= 1e-6
            assert set(kernels) == {2 if size[0] * size[1] >= 64 else 3}


@pytest.mark.parametrize("size, side", [((18, 20), 2), ((17, 20), 3), ((18, 19), 3), ((17, 19), 3)])
def test_a_cut_map_ends_in_zeros(size, side, device, kernels):
    x, up = normal(2, 9, 10, 5), layer()
    assert relative_error(up(mx.array(x), size), by_torch(up.conv, x, size)) <= 1e-6
    assert set(kernels) == {side}


@pytest.mark.parametrize("c, size, side", [(128, (31, 33), 2), (128, (32, 32), 3), (96, (32, 32), 2), (64, (7, 9), 3)])
def test_on_a_gpu_winograd_has_fewer_products(c, size, side, kernels, monkeypatch):
    """From 4096 positions of a doubled map and 256 channels of both sides on; lazily, as shapes decide."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    Upsample2D(c)(mx.zeros((3, *size, c)))
    assert set(kernels) == {side}


@pytest.mark.parametrize("c, size, side", [(64, (8, 8), 3), (128, (8, 8), 2), (128, (12, 12), 3), (63, (32, 32), 2)])
def test_on_a_cpu_winograd_has_fewer_products(c, size, side, kernels):
    """From 64 channels on, and from four positions of a doubled map for each."""
    Upsample2D(c)(mx.zeros((1, *size, c)))
    assert set(kernels) == {side}


def test_the_weights_are_those_of_the_call():
    x, up = normal(1, 8, 9, 5), layer()
    before = up(mx.array(x))
    up.conv.weight *= 2
    assert relative_error(up(mx.array(x)), by_torch(up.conv, x)) <= 1e-6
    assert relative_error(up(mx.array(x)), before) > 0.1


def test_a_lora_beside_the_weights(kernels):
    """The factors see the doubled map; without the LoRA's scale the layer is as it was."""
    x, up, factors = normal(1, 8, 9, 5), layer(), {"down": normal(2, 5, 3, 3, seed=5), "up": normal(5, 2, 1, 1, seed=6)}
    change = np.einsum("or,rchw->ohwc", factors["up"][..., 0, 0], factors["down"])
    lora = type("LoRA", (), {"scale": 0.5})
    wrapper, bare = LoRALayer(up.conv), layer()
    wrapper.loras.append(LoRADelta("unet", "conv", {k: mx.array(v) for k, v in factors.items()}, 1.0, lora))
    up.conv, bare.conv.weight = wrapper, bare.conv.weight + 0.5 * mx.array(change)
    assert relative_error(up(mx.array(x)), by_torch(bare.conv, x)) <= 1e-6
    assert set(kernels) == {3}


def test_gradients(device):
    x, change, up = normal(2, 9, 8, 5), normal(2, 18, 16, 5, seed=7), layer()

    def loss(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        up.conv.weight, up.conv.bias = weight, bias
        return (up(x) * mx.array(change)).sum()

    ours = mx.grad(loss, (0, 1, 2))(mx.array(x), up.conv.weight, up.conv.bias)
    inputs = [nchw(x).double(), nchw(normal(5, 3, 3, 5, seed=3)).double(), torch.from_numpy(normal(5, seed=4)).double()]
    inputs = [t.requires_grad_() for t in inputs]
    y = F.conv2d(F.interpolate(inputs[0], scale_factor=2), *inputs[1:], padding=1)
    y.backward(nchw(change).double())
    for got, want in zip(ours, (nhwc(inputs[0].grad), nhwc(inputs[1].grad), inputs[2].grad.numpy()), strict=True):
        assert relative_error(got, want) <= 1e-6


@pytest.mark.parametrize("dtype, bound", [(mx.float16, 2e-3), (mx.bfloat16, 1.6e-2)])
def test_half_precision(dtype, bound, device):
    x, up = mx.array(normal(1, 8, 9, 32)).astype(dtype), layer(32)
    up.set_dtype(dtype)
    y = up(x)
    assert y.dtype == dtype
    up.set_dtype(mx.float32)
    assert relative_error(y.astype(mx.float32), up(x.astype(mx.float32))) <= bound


@pytest.mark.parametrize("rows", [1, 3, 5, 12, 64])
@pytest.mark.parametrize("o", [None, 6])
def test_slices_are_exact_and_of_equal_height(rows, o, device):
    """Whatever the height of those that come in."""
    x, up = mx.array(normal(1, 13, 24, 5)), layer(o=o)
    slices = list(tiling._RUN[type(up)](up, mx.split(x, [4, 5, 11], axis=1), rows))
    assert relative_error(mx.concatenate(slices, axis=1), up(x)) <= 1e-6
    assert {len(y[0]) for y in slices[:-1]} <= {rows} and len(slices[-1][0]) <= rows
