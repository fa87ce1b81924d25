"""Networks in float16 and bfloat16 against torch in float32, with the same rounded weights and inputs.

A type rounds by at most half its ``eps``. Norms and residual streams keep the roundings of many layers from adding up:
the results of most networks here are wrong by 1.1 to 2.1 eps of their largest value. The bound is twice that.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch

from models import test_clip as clip
from models import test_controlnet as controlnet
from models import test_taesd as taesd
from models import test_unet as unet
from models import test_vae as vae
from oracle import nchw, nhwc, normal, relative_error, twin

FACTOR = 4  # of eps
TYPES = {"float16": (mx.float16, torch.float16), "bfloat16": (mx.bfloat16, torch.bfloat16)}


@pytest.fixture(params=TYPES)
def types(request) -> tuple[mx.Dtype, torch.dtype]:
    return TYPES[request.param]


def rounded(x: np.ndarray, types: tuple) -> np.ndarray:
    return torch.from_numpy(x).to(types[1]).float().numpy()


def in_half(pair: tuple, types: tuple) -> tuple:
    """A network in half precision, and its oracle with the same values in float32."""
    ours, oracle = pair
    twin(ours, oracle.to(types[1]).float()).set_dtype(types[0])
    return ours, oracle


def check(ours: mx.array, want, types: tuple) -> None:
    assert ours.dtype == types[0]
    assert relative_error(ours.astype(mx.float32), want) <= FACTOR * torch.finfo(types[1]).eps


def rounded_inputs(given: dict, types: tuple) -> dict:
    return {key: value if key in ("time_ids", "image") else rounded(value, types) for key, value in given.items()}


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "xl"])
def test_unet(name, types):
    ours, oracle = in_half(unet.unets(name), types)
    given, t = rounded_inputs(unet.inputs(name, 2, 8, 8), types), [999.0, 3.0]
    check(unet.run_ours(ours, given, t), nhwc(unet.run_oracle(oracle, given, t)), types)


def test_controlnet(types):
    ours, oracle = in_half(controlnet.controlnets.__wrapped__("xl-small"), types)  # not the one that other tests use
    given, t = rounded_inputs(controlnet.inputs("xl-small", 2, 8, 8), types), [999.0, 3.0]
    half = {key: mx.array(value).astype(mx.float32 if key == "time_ids" else types[0]) for key, value in given.items()}
    (down, middle), (want, want_middle) = controlnet.run_ours(ours, half, t), controlnet.run_oracle(oracle, given, t)
    for mine, theirs in zip((*down, middle), (*want, want_middle), strict=True):
        check(mine, nhwc(theirs), types)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_text_encoder(name, types):
    ours, oracle = in_half(clip.encoders(name), types)
    ids = clip.prompt_ids(2, 77, 999)
    check(ours(mx.array(ids)).last_hidden_state, oracle(torch.from_numpy(ids)).last_hidden_state, types)


@pytest.mark.parametrize("module, config", [(vae, vae.SD), (taesd, taesd.PUBLISHED)])
def test_autoencoder(module, config, types):
    ours, oracle = in_half(module.vaes(config), types)
    factor = oracle.config.scaling_factor
    x, z = (rounded(normal(2, *shape), types) for shape in ((24, 40, 3), (3, 5, 4)))
    encoded = oracle.encode(nchw(x))
    mean = encoded.latents if module is taesd else encoded.latent_dist.mean
    check(ours.encode(mx.array(x).astype(types[0]))[0], nhwc(mean) * factor, types)
    check(ours.decode(mx.array(z).astype(types[0])), nhwc(oracle.decode(nchw(z) / factor).sample), types)
