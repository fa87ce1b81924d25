"""DeepCache: all of the UNet in every N-th step, and in the others its last layer, on the map of the step before."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from oracle import last, normal, relative_error
from stable_diffusion import Control
from stable_diffusion.models.layers import Context

PROMPT = "the red cat"
SMALL = {"latent_size": (6, 8), "seed": 3, "cfg_weight": 5.0}


def full(unet) -> list[bool]:
    """True for each call in which all of the UNet ran."""
    return [call.full for call in unet.calls]


def inputs(unet, seed: int) -> dict:
    """Arguments of a UNet for two latents of a size that is no multiple of 8."""
    config, text_time = unet.config, None
    if config.addition_embed_type:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text_time = mx.array(normal(2, pooled, seed=8)), mx.ones((2, 6)) * 64
    return {
        "x": mx.array(normal(2, 10, 14, config.in_channels, seed=seed)),
        "temb": unet.embed_time(500.0 + seed, mx.float32, text_time),
        "context": Context(mx.array(normal(2, 77, config.cross_attention_dim[0], seed=7))),
    }


def by_hand(unet, second: dict, first: dict) -> mx.array:
    """The definition: the last layer, at the second latents and time, takes what came into it at the first."""
    *_, last_block = unet.up_blocks
    resnet, seen = last_block.resnets[-1], []
    last_block.resnets[-1] = lambda x, *more: seen.append((x, more)) or resnet(x, *more)
    try:
        unet(**first)
        unet(**second)
    finally:
        last_block.resnets[-1] = resnet
    (before, _), (now, more) = seen
    deep = before.shape[-1] - unet.conv_in.weight.shape[0]
    x = resnet(mx.concatenate([before[..., :deep], now[..., deep:]], axis=-1), *more)
    if "attentions" in last_block:
        x = last_block.attentions[-1](x, second["context"])
    norm = unet.conv_norm_out(x)
    return unet.conv_out(norm * mx.sigmoid(norm))


@pytest.mark.parametrize("model", ["sd", "xl"])
def test_the_last_layer_takes_the_cached_map(request, model):
    unet = request.getfixturevalue(model).unet
    first, second = inputs(unet, seed=0), inputs(unet, seed=1)
    cache: list[mx.array] = []
    assert mx.array_equal(unet(**first, cache=cache), unet(**first)) and len(cache) == 1
    out = unet(**second, cache=cache)
    assert relative_error(out, by_hand(unet, second, first)) <= 1e-5
    assert relative_error(out, unet(**second)) > 1e-3  # it is an approximation
    assert relative_error(out, unet(**first)) > 1e-3  # that sees its own latents
    assert mx.array_equal(unet(**first, cache=cache), unet(**first))  # the cached map is the call's own
    assert len(cache) == 1


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, 9])
def test_all_of_the_unet_runs_in_every_nth_step(sd, unet, every):
    cached = [np.array(x) for x in sd.generate_latents(PROMPT, num_steps=5, deep_cache=every, **SMALL)]
    assert full(unet) == [step % every == 0 for step in range(5)]
    exact = [np.array(x) for x in sd.generate_latents(PROMPT, num_steps=5, deep_cache=1, **SMALL)]
    assert all(full(unet)[5:])
    assert np.array_equal(cached[0], exact[0]) and relative_error(cached[1], exact[1]) > 1e-5


def test_where_the_rows_change_all_of_the_unet_runs(sd, unet):
    last(sd.generate_latents(PROMPT, num_steps=8, deep_cache=3, guidance_interval=(0.25, 0.75), **SMALL))
    assert full(unet) == [True, False, True, False, False, True, True, False]
    assert [call.rows for call in unet.calls] == [1, 1, 2, 2, 2, 2, 1, 1]


def test_each_part_of_a_batch_has_its_map(sd, unet, monkeypatch):
    together = last(sd.generate_latents(PROMPT, num_steps=4, deep_cache=2, **SMALL))
    assert full(unet) == [True, False] * 2
    monkeypatch.setattr(sd, "rows_at_once", 1)
    parts = last(sd.generate_latents(PROMPT, num_steps=4, deep_cache=2, **SMALL))
    assert full(unet)[4:] == [True, True, False, False] * 2
    assert relative_error(parts, together) <= 1e-4


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde"])
def test_samplers_with_two_evaluations(sd, unet, sampler):
    """A cycle has two evaluations for each of its steps, of which the first is full."""
    cached = last(sd.generate_latents(PROMPT, num_steps=6, sampler=sampler, deep_cache=3, **SMALL))
    assert np.isfinite(cached).all() and sum(full(unet)) == 2 and len(unet.calls) == 11


class Net:
    """Stands in for a ControlNet. From its second call on, its residuals of the deeper maps are not a number."""

    config = SimpleNamespace(global_pool_conditions=False)

    def __init__(self, unet, outermost: float):
        self._unet, self._outermost, self._calls = unet, outermost, 0
        self.embed_time, self.embed = unet.embed_time, lambda image: image

    def __call__(self, x, temb, context, embedded):
        (first, *rest), middle = self._unet.encode(self._unet.conv_in(x), temb, context)
        deeper = 0.1 if self._calls == 0 else float("nan")
        self._calls += 1
        return [mx.full(first.shape, self._outermost), *(mx.full(r.shape, deeper) for r in rest)], middle * deeper


def test_controlnets_act_where_something_is_computed(sd, unet):
    def latents(outermost: float) -> list[np.ndarray]:
        control = Control(Net(unet.network, outermost), mx.ones((48, 64, 3)))
        run = sd.generate_latents(PROMPT, num_steps=2, deep_cache=2, controls=[control], **SMALL)
        return [np.array(x) for x in run]

    quiet, loud = latents(0.0), latents(1.0)
    assert full(unet) == [True, False] * 2
    assert all(relative_error(a, b) > 1e-4 for a, b in zip(loud, quiet, strict=True))
