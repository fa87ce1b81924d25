"""Single operations against torch: relative error at most 1e-6."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch.nn import functional as F

from oracle import SCALES, nchw, nhwc, normal, relative_error
from stable_diffusion.models.layers import Attention, Context, GroupNorm
from stable_diffusion.models.unet import timestep_embedding


@pytest.mark.parametrize("eps, offset", [(1e-5, 0.0), (1e-6, 3.0)])
def test_group_norm(eps, offset):
    weight, bias = normal(32, seed=1), normal(32, seed=2)
    norm = GroupNorm(8, 32, eps)
    norm.weight, norm.bias = mx.array(weight), mx.array(bias)
    for scale in SCALES:
        x = (normal(2, 24, 16, 32) + offset).astype(np.float32) * np.float32(scale)
        want = F.group_norm(nchw(x).double(), 8, *(torch.from_numpy(t).double() for t in (weight, bias)), eps)
        assert relative_error(norm(mx.array(x)), nhwc(want)) <= 1e-6


def test_group_norm_of_a_large_map():
    x = np.maximum(normal(1, 256, 256, 32), -0.5)  # of values that add up
    want = F.group_norm(nchw(x).double(), 8, eps=1e-5)
    assert relative_error(GroupNorm(8, 32, 1e-5)(mx.array(x)), nhwc(want)) <= 1e-6


def test_group_norm_in_half_precision_does_not_overflow():
    x = mx.array(1000 * normal(1, 16, 16, 32)).astype(mx.float16)
    y = GroupNorm(8, 32, 1e-5)(x)
    assert y.dtype == mx.float16
    assert abs(float(y.astype(mx.float32).std()) - 1) < 1e-2


@pytest.mark.parametrize("flip, shift", [(True, 0), (False, 1)])
@pytest.mark.parametrize("dim", [320, 33])
def test_timestep_embedding(dim, flip, shift, monkeypatch):
    t = np.array([0, 1, 37.5, 500, 966.66669, 999], dtype=np.float32)
    ours = timestep_embedding(mx.array(t), dim, flip_sin_to_cos=flip, freq_shift=shift)
    # torch's exp errs in the last bit of some frequency, which at t = 999 is worth 999 * 2^-24 of the embedding
    monkeypatch.setattr(torch, "exp", lambda x: x.double().exp_().float())
    want = get_timestep_embedding(torch.from_numpy(t), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    assert relative_error(ours, want) <= 1e-6


def test_the_keys_and_values_of_a_prompt_are_computed_once_but_not_in_training():
    layer, other = Attention(16, 2, 32).eval(), Attention(16, 2, 32).eval()
    prompt = Context(mx.array(normal(1, 7, 32)))
    x = mx.array(normal(5, 16, seed=1))
    first = layer(x, 1, prompt)
    assert relative_error(first, layer(x, 1, Context(prompt.encoded))) <= 1e-6
    assert relative_error(other(x, 1, prompt), first) > 1e-2  # each layer has its own
    layer.to_k.weight = mx.zeros_like(layer.to_k.weight)
    assert np.array_equal(layer(x, 1, prompt), first)
    layer.train()
    assert relative_error(layer(x, 1, prompt), first) > 1e-2
