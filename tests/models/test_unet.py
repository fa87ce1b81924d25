"""The UNet of every family against diffusers, at three input scales, odd sizes and batches."""

import mlx.core as mx
import pytest
import torch
from diffusers import UNet2DConditionModel as Oracle

from configs import UNETS
from oracle import SCALES, nchw, nhwc, normal, perturb, relative_error, twin
from stable_diffusion.models.config import UNetConfig
from stable_diffusion.models.layers import Context
from stable_diffusion.models.unet import UNet2DConditionModel


def pair(config: dict) -> tuple[UNet2DConditionModel, Oracle]:
    torch.manual_seed(0)
    oracle = perturb(Oracle(**config))
    return twin(UNet2DConditionModel(UNetConfig.from_dict(config)), oracle), oracle


def inputs(config: dict, batch: int, height: int, width: int, scale: float) -> dict:
    """NumPy inputs of one call; the conditioning stays at scale 1, as encoders produce it."""
    given = {"x": normal(batch, height, width, config.get("in_channels", 4), seed=1, scale=scale)}
    context = config["cross_attention_dim"]
    given["context"] = normal(batch, 5, context[0] if isinstance(context, list) else context, seed=2)
    if config.get("addition_embed_type"):
        pooled = 32
        count = (config["projection_class_embeddings_input_dim"] - pooled) // config["addition_time_embed_dim"]
        given["pooled"], given["time_ids"] = normal(batch, pooled, seed=3), 500 * abs(normal(batch, count, seed=4))
    if dim := config.get("time_cond_proj_dim"):
        given["cond"] = normal(batch, dim, seed=5)
    return given


def run_oracle(oracle: Oracle, given: dict, t: list[float]):
    extra = {k: torch.from_numpy(given[k]) for k in ("context", "cond", "pooled", "time_ids") if k in given}
    added = {"text_embeds": extra["pooled"], "time_ids": extra["time_ids"]} if "pooled" in extra else None
    out = oracle(
        nchw(given["x"]),
        torch.tensor(t),
        extra["context"],
        timestep_cond=extra.get("cond"),
        added_cond_kwargs=added,
    )
    return nhwc(out.sample)


def run_ours(unet: UNet2DConditionModel, given: dict, t: list[float] | float, context: Context | None = None):
    a = {k: mx.array(v) for k, v in given.items()}
    text_time = (a["pooled"], a["time_ids"]) if "pooled" in a else None
    temb = unet.embed_time(mx.array(t) if isinstance(t, list) else t, a["x"].dtype, text_time, a.get("cond"))
    return unet(a["x"], temb, context or a["context"])


@pytest.mark.parametrize("name", UNETS)
def test_equals_diffusers(name):
    ours, oracle = pair(UNETS[name])
    for i, scale in enumerate(SCALES):
        given = inputs(UNETS[name], batch=i + 1, height=8, width=16, scale=scale)
        t = [999.0, 500.0, 1.0][: i + 1]
        assert relative_error(run_ours(ours, given, t), run_oracle(oracle, given, t)) <= 1e-4


@pytest.mark.parametrize("size", [(7, 9), (5, 8), (10, 13)])
def test_odd_sizes_upsample_to_the_skip(size):
    ours, oracle = pair(UNETS["sd1"])
    given = inputs(UNETS["sd1"], 1, *size, scale=1.0)
    assert relative_error(run_ours(ours, given, [37.0]), run_oracle(oracle, given, [37.0])) <= 1e-4


def test_half_precision_stays_half_and_close():
    config = UNETS["sd2-v"]
    ours, oracle = pair(config)
    ours.set_dtype(mx.float16)
    given = inputs(config, 2, 8, 8, scale=1.0)
    half = {k: v.astype("float16") for k, v in given.items()}
    out = run_ours(ours, half, [999.0, 3.0])
    assert out.dtype == mx.float16
    assert relative_error(out.astype(mx.float32), run_oracle(oracle, given, [999.0, 3.0])) <= 2e-2


@pytest.mark.parametrize("name", ["sd1", "lcm", "refiner"])
def test_one_timestep_and_one_context_serve_a_batch_and_all_calls(name):
    unet, _ = pair(UNETS[name])
    given = inputs(UNETS[name], 2, 8, 16, scale=1.0)
    context = Context(mx.array(given["context"]))
    for t in (500.25, 999.0, 1.0):
        assert relative_error(run_ours(unet, given, t, context), run_ours(unet, given, [t, t])) <= 1e-6


def test_xl_without_sizes_is_refused():
    ours, _ = pair(UNETS["xl"])
    with pytest.raises(ValueError, match="text_time"):
        ours.embed_time(1.0, mx.float32)
