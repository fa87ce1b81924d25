"""The UNet of every family against diffusers, at three input scales, odd sizes and batches."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as Oracle
from mlx.utils import tree_flatten

from configs import UNETS
from oracle import SCALES, nchw, nhwc, normal, pair, relative_error
from stable_diffusion.models.layers import Context
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.weights.load import build, fill


def unets(name: str) -> tuple[UNet2DConditionModel, Oracle]:
    return pair("unet", UNETS[name], lambda: Oracle(**UNETS[name]))


def inputs(name: str, batch: int, height: int, width: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """NumPy inputs of one call; the conditioning stays at scale 1, as encoders produce it."""
    config = UNETS[name]
    given = {"x": normal(batch, height, width, config.get("in_channels", 4), seed=1, scale=scale)}
    context = config["cross_attention_dim"]
    given["context"] = normal(batch, 5, context[0] if isinstance(context, list) else context, seed=2)
    if config.get("addition_embed_type"):
        pooled = 32
        count = (config["projection_class_embeddings_input_dim"] - pooled) // config["addition_time_embed_dim"]
        given |= {"text_embeds": normal(batch, pooled, seed=3), "time_ids": 500 * abs(normal(batch, count, seed=4))}
    if dim := config.get("time_cond_proj_dim"):
        given["cond"] = normal(batch, dim, seed=5)
    return given


def run_oracle(oracle: Oracle, given: dict, t: list[float], **added) -> torch.Tensor:
    """Call diffusers' UNet, with what ControlNets and adapters have ``added``: -> [B, C, h, w]."""
    tensors = {key: torch.from_numpy(value) for key, value in given.items() if key != "x"}
    added["added_cond_kwargs"] = {key: tensors[key] for key in ("text_embeds", "time_ids") if key in given} or None
    added["timestep_cond"] = tensors.get("cond")
    return oracle(nchw(given["x"]), torch.tensor(t), tensors["context"], **added).sample


def run_ours(unet: UNet2DConditionModel, given: dict, t: list[float] | float, context=None, **added) -> mx.array:
    """Call our UNet, in the type of its weights."""
    dtype = unet.conv_in.weight.dtype
    a = {key: mx.array(value).astype(mx.float32 if key == "time_ids" else dtype) for key, value in given.items()}
    text_time = (a["text_embeds"], a["time_ids"]) if "time_ids" in a else None
    temb = unet.embed_time(mx.array(t) if isinstance(t, list) else t, dtype, text_time, a.get("cond"))
    return unet(a["x"], temb, context or a["context"], **added)


@pytest.mark.parametrize("name", UNETS)
def test_equals_diffusers(name):
    ours, oracle = unets(name)
    for i, (scale, size) in enumerate(zip(SCALES, [(8, 13), (7, 9), (4, 6)], strict=True)):
        given = inputs(name, i + 1, *size, scale)
        t = [999.0, 500.0, 1.0][: i + 1]
        assert relative_error(run_ours(ours, given, t), nhwc(run_oracle(oracle, given, t))) <= 1e-4


@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_gradients_of_all_parameters_equal_torch(name):
    ours, oracle = unets(name)
    given, t, weights = inputs(name, 2, 6, 9), [700.0, 3.0], normal(2, 6, 9, 4, seed=9)
    oracle.requires_grad_(True)
    (run_oracle(oracle, given, t) * nchw(weights)).sum().backward()
    ours.train()
    loss = nn.value_and_grad(ours, lambda: (run_ours(ours, given, t) * mx.array(weights)).sum())
    gradients = dict(tree_flatten(loss()[1]))
    expected = build("unet", UNETS[name])
    fill(expected, {key: mx.array(parameter.grad.numpy()) for key, parameter in oracle.named_parameters()})
    for key, want in tree_flatten(expected.parameters()):
        assert relative_error(gradients[key], want) <= 1e-4, key


@pytest.mark.parametrize("name", ["sd1", "lcm", "refiner"])
def test_one_timestep_and_one_context_serve_a_batch_and_all_calls(name):
    unet, _ = unets(name)
    given = inputs(name, 2, 4, 8)
    context = Context(mx.array(given["context"]))
    for t in (500.25, 999.0, 1.0):
        assert relative_error(run_ours(unet, given, t, context), run_ours(unet, given, [t, t])) <= 1e-6


def test_what_does_not_fit_is_refused():
    """Sizes that XL needs, and the maps of ControlNets and adapters for another UNet."""
    with pytest.raises(ValueError, match="text_time"):
        unets("xl")[0].embed_time(1.0, mx.float32)
    unet, given, one = unets("sd1")[0], inputs("sd1", 1, 8, 8), mx.zeros((1, 1, 1, 1))
    with pytest.raises(ValueError, match="5 residuals for 9 maps: the ControlNet does not fit"):
        run_ours(unet, given, 1.0, residuals=([one] * 5, one))
    with pytest.raises(ValueError, match="5 features for 3 down blocks: the adapter does not fit"):
        run_ours(unet, given, 1.0, features=[one] * 5)
