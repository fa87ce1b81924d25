"""The path of a GPU, computed on the CPU, against torch and diffusers."""

import mlx.core as mx
import pytest
import torch

from models import test_controlnet as controlnet
from models import test_half_precision as half
from models import test_layers as layers
from models import test_unet as unet
from models import test_vae as vae
from oracle import nchw, nhwc, normal, relative_error
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
