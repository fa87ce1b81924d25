"""The factors of attached LoRAs can be trained: their gradients are those of torch with peft."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from peft import LoraConfig, get_peft_model_state_dict

import loras
from loras import make
from oracle import nchw, normal, relative_error
from stable_diffusion.lora.files import read_lora
from stable_diffusion.lora.layers import attach
from stable_diffusion.weights.quantize import quantize

TOLERANCE = 1e-4
LAYERS = ["attn1.to_q", "attn2.to_k", "to_out.0", "resnets.1.conv1", "proj_in", "time_emb_proj"]


@pytest.fixture(params=["sd1", "xl"])
def model(request) -> loras.Model:
    """One of the test's own, whose torch networks get adapters and gradients."""
    return loras.load(request.getfixturevalue(f"{request.param}_folder"), request.param)


WEIGHTS = normal(2, 8, 6, 4, seed=9)  # of the UNet's outputs in a loss


def gradients(model, lora) -> dict[str, np.ndarray]:
    """Of a loss of the UNet's output, by the factors of a LoRA."""
    unet = model.networks["unet"]
    attached = attach({"unet": unet}, lora)
    value, grads = nn.value_and_grad(unet, lambda: (mx.array(WEIGHTS) * model.our_noise()).mean())()
    attached.detach()
    assert np.isfinite(value.item())
    return {name: np.array(grad) for name, grad in tree_flatten(grads)}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_gradients_equal_pefts(model, settings, tmp_path):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, init_lora_weights=False, **settings)
    unet = model.pipe.unet
    unet.add_adapter(config, "it")
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            noise = 0.1 * torch.randn(parameter.shape)
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    saved = get_peft_model_state_dict(unet, adapter_name="it")
    metadata = unet.peft_config["it"].to_dict()
    type(model.pipe).save_lora_weights(tmp_path, unet_lora_layers=saved, unet_lora_adapter_metadata=metadata)
    (nchw(WEIGHTS) * model.their_noise()).mean().backward()
    roles = {"lora_A.it.weight": "down", "lora_B.it.weight": "up", "lora_magnitude_vector.it.weight": "dora_scale"}
    wanted = {
        f"{name.removesuffix(suffix)}loras.0.{role}": parameter.grad
        for name, parameter in unet.named_parameters()
        for suffix, role in roles.items()
        if name.endswith(suffix)
    }
    grads = gradients(model, read_lora(tmp_path))
    assert grads.keys() == wanted.keys() and len(grads) > 30
    for name, grad in wanted.items():
        assert relative_error(grads[name].reshape(-1), grad.numpy().reshape(-1)) <= TOLERANCE, name


def test_factors_are_trained_over_quantized_and_half_precision_weights(sd1_folder, write):
    model = loras.load(sd1_folder, "sd1")
    tensors, _ = make(model, only=lambda network, path: "attn" in path and network == "unet")
    lora = read_lora(write(tensors))
    exact = gradients(model, lora)
    model.networks["unet"].set_dtype(mx.float16)
    quantize(model.networks["unet"], 8, 32)
    grads = gradients(model, lora)
    assert grads.keys() == exact.keys()
    largest = max(np.abs(grad).max() for grad in exact.values())
    for name, grad in grads.items():
        assert grad.dtype == np.float32, "the factors keep their own type"
        assert np.abs(grad - exact[name]).max() <= 0.02 * largest, name
