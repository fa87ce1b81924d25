"""The path of a GPU, computed on the CPU, against torch and diffusers."""

import mlx.core as mx
import pytest
import torch

from models import test_controlnet as controlnet
from models import test_half_precision as half
from models import test_layers as layers
from models import test_lllite as lllite
from models import test_unet as unet
from models import test_vae as vae
from oracle import nchw, nhwc, normal, relative_error
from stable_diffusion.models import layers as attention
from stable_diffusion.models.layers import GroupNorm

pytestmark = pytest.mark.usefixtures("gpu")
FAMILIES = ("sd1", "sd2-v", "xl")


@pytest.mark.parametrize("eps, offset", [(1e-5, 0.0), (1e-6, 3.0)])
def test_group_norm(eps, offset):
    layers.test_group_norm(eps, offset)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_group_norm_adds_shifts_to_what_it_normalizes(offset):
    """Those of channels and of maps. Mean and distances are computed in float32, whatever the mean and the type are."""
    mx.enable_compile()
    x, shifts = normal(2, 24, 16, 32) + offset, [normal(32, seed=1), normal(2, 32, seed=2)]
    for dtype, bound in ((mx.float32, 1e-5), (mx.float16, 2e-3)):
        norm = GroupNorm(8, 32, 1e-5)
        norm.set_dtype(dtype)
        norm.weight, norm.bias = (mx.array(normal(32, seed=seed)).astype(dtype) for seed in (3, 4))
        arrays = [mx.array(array).astype(dtype) for array in (x, *shifts)]
        total = arrays[0] + (arrays[1] + arrays[2][:, None, None])
        affine = (torch.tensor(p.tolist(), dtype=torch.float64) for p in (norm.weight, norm.bias))
        want = torch.nn.functional.group_norm(nchw(total).double(), 8, *affine, 1e-5)
        y = norm.activated(*arrays)
        assert y.dtype == dtype
        assert relative_error(y.astype(mx.float32), nhwc(torch.nn.functional.silu(want))) <= bound


@pytest.mark.parametrize("width, dtype", [(64, mx.bfloat16), (160, mx.float32)])
def test_attention_upcast_has_scores_in_float32(width, dtype, monkeypatch):
    """A fused kernel has, from bfloat16, and so does its gradient; other heads become float32."""
    types = []
    monkeypatch.setattr(attention, "_attend", lambda q, k, v: types.append(q.dtype) or q)
    layer = attention.Attention(2 * width, 2, upcast=True)
    layer.set_dtype(mx.bfloat16)
    assert layer(mx.zeros((9, 2 * width), mx.bfloat16), 1).dtype == mx.bfloat16
    assert types == [dtype]


def test_gradients_of_attention_upcast():
    """Of scores up to 60, which bfloat16 rounds by up to 0.1."""
    arrays = [normal(1, 2, n, 64, seed=n, scale=s) for n, s in ((30, 4.0), (40, 4.0), (40, 1.0), (30, 1.0))]
    *inputs, change = (mx.array(x).astype(mx.bfloat16) for x in arrays)
    exact = [torch.tensor(x.tolist(), dtype=torch.float64, requires_grad=True) for x in (*inputs, change)]
    (torch.nn.functional.scaled_dot_product_attention(*exact[:3]) * exact[3]).sum().backward()
    _, gradients = mx.vjp(lambda *qkv: attention.attention(*qkv, upcast=True), inputs, [change])
    for gradient, x in zip(gradients, exact[:3], strict=True):
        assert gradient.dtype == mx.bfloat16
        assert relative_error(gradient.astype(mx.float32), x.grad.numpy()) <= 8e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_unet(name):
    unet.test_equals_diffusers(name)


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_gradients_of_a_unet(name):
    unet.test_gradients_of_all_parameters_equal_torch(name)


def test_controlnet():
    controlnet.test_equals_diffusers("sd1")


def test_autoencoder():
    vae.test_equals_diffusers(vae.SD)


def test_half_precision():
    types = half.TYPES["float16"]
    half.test_unet("sd2-v", types)
    half.test_autoencoder(vae, vae.SD, types)


def test_inputs_of_joined_layers_are_changed():
    lllite.test_equals_the_formula()
