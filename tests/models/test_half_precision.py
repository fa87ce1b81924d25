"""Networks in float16 and bfloat16 against torch in float32, with the same rounded weights and inputs.

A type rounds by at most half its ``eps``. Norms and residual streams keep the roundings of many layers from adding up:
the results of all networks here are wrong by 1.1 to 2.1 eps of their largest value. The bound is twice that.
"""

import mlx.core as mx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers import UNet2DConditionModel as OracleUNet
from transformers import CLIPTextConfig, CLIPTextModel

from configs import UNETS
from models.test_clip import CONFIGS, prompt_ids
from models.test_unet import inputs, run_oracle, run_ours
from models.test_vae import SD
from oracle import nchw, nhwc, normal, perturb, relative_error, twin
from stable_diffusion.weights.load import build

FACTOR = 4  # of eps
TYPES = {"float16": (mx.float16, torch.float16), "bfloat16": (mx.bfloat16, torch.bfloat16)}


@pytest.fixture(params=TYPES)
def types(request) -> tuple[mx.Dtype, torch.dtype]:
    return TYPES[request.param]


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(x).to(dtype).float().numpy()


def pair(part: str, config: dict, oracle: torch.nn.Module, types: tuple):
    """Build a network in half precision, and its oracle with the same values in float32."""
    oracle = perturb(oracle).to(types[1]).float()
    network = twin(build(part, config), oracle)
    network.set_dtype(types[0])
    return network, oracle


def check(ours: mx.array, want, types: tuple) -> None:
    assert ours.dtype == types[0]
    assert relative_error(ours.astype(mx.float32), want) <= FACTOR * torch.finfo(types[1]).eps


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "xl"])
def test_unet(name, types):
    torch.manual_seed(0)
    ours, oracle = pair("unet", UNETS[name], OracleUNet(**UNETS[name]), types)
    given = inputs(name, 2, 8, 8)
    given = {key: value if key == "time_ids" else rounded(value, types[1]) for key, value in given.items()}
    t = [999.0, 3.0]
    check(run_ours(ours, given, t), nhwc(run_oracle(oracle, given, t)), types)


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_text_encoder(name, types):
    torch.manual_seed(0)
    ours, oracle = pair("text_encoder", CONFIGS[name], CLIPTextModel(CLIPTextConfig(**CONFIGS[name])), types)
    ids = prompt_ids(2, 77, 999)
    want = oracle(torch.from_numpy(ids)).last_hidden_state
    check(ours(mx.array(ids)).last_hidden_state, want, types)


def test_autoencoder(types):
    torch.manual_seed(0)
    ours, oracle = pair("vae", SD, AutoencoderKL(**SD), types)
    factor = oracle.config.scaling_factor
    x, z = (rounded(normal(2, *shape), types[1]) for shape in ((24, 40, 3), (3, 5, 4)))
    mean, _ = ours.encode(mx.array(x).astype(types[0]))
    check(mean, nhwc(oracle.encode(nchw(x)).latent_dist.mean) * factor, types)
    check(ours.decode(mx.array(z).astype(types[0])), nhwc(oracle.decode(nchw(z) / factor).sample), types)
