"""From a network to D(x, sigma), the estimate of the clean latent that the samplers integrate."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.lanes import ONE, Lanes
from ..models.layers import Context
from .controls import Control, Steering
from .deep_cache import DeepCache
from .guidance import Stage, in_parts
from .samplers import Denoiser, Sampler, keywords
from .schedule import Schedule, Steps


def denoiser(
    unet: Callable[..., mx.array],
    schedule: Schedule,
    steps: Steps,
    dtype: mx.Dtype,
    stages: Sequence[Stage],
    controls: Sequence[Control] = (),
    rows_at_once: int | None = None,
    deep_cache: int = 1,
    token_merging: float = 0.0,
    lanes: Lanes = ONE,
) -> Denoiser:
    """D(x, sigma) of a run: scale the input, ask the UNet, mix its answers, and read the mixture as x0.

    Latents are float32 [n, h, w, 4]; the networks compute in ``dtype``. With ``rows_at_once`` they are asked so many
    questions at a time, one part after the other, which takes less memory; None asks all of them together.
    All of the UNet runs in every ``deep_cache``-th step only; ``token_merging`` is the share of positions that its
    largest self-attentions merge. Shares of the questions are asked side by side in ``lanes``.
    """

    def context_of(part: Stage) -> Context:
        return Context(part.conditioning.context, part.conditioning.values, token_merging, steps.timesteps)

    def parts_of(stage: Stage) -> list[tuple[Stage, Context]]:
        count = len(stage.images)
        return [(part, context_of(part)) for part in in_parts(stage, rows_at_once or count // lanes.shares(count))]

    parts = [(stage, parts_of(stage)) for stage in stages]
    timestep = _timesteps(schedule, steps)
    steer = Steering(controls, len(steps), dtype)
    cache = DeepCache(deep_cache)

    def ask(scaled: mx.array, sigma: float, step: int, stage: Stage, context: Context) -> mx.array:
        """The networks' answers to the questions of a stage, or of a part of one."""
        told = stage.conditioning
        text_time = None if told.pooled is None else (told.pooled, told.time_ids)
        batch = scaled[stage.images]
        t = timestep(sigma)
        steered = steer(step, batch, t, context, stage, text_time) | cache(step - stage.first_step, context)
        if told.channels is not None:
            batch = mx.concatenate([batch, told.channels.astype(dtype)], axis=-1)
        return unet(batch, t, context, text_time=text_time, timestep_cond=told.guidance, **steered)

    def denoise(x: mx.array, sigma: float) -> mx.array:
        step = max(sum(level >= sigma for level in steps.sigmas[:-1]) - 1, 0)
        stage, asked = [entry for entry in parts if entry[0].first_step <= step][-1]
        scaled = (x / math.sqrt(sigma**2 + 1)).astype(dtype)
        answers: list[mx.array] = []
        for i, part in enumerate(asked):
            if rows_at_once is not None and answers:
                # Each waits for the one before, or MLX would compute them together, in the memory of all.
                scaled = mx.depends(scaled, answers[-1])
            with lanes.enter(i, len(asked)):
                answers.append(ask(scaled, sigma, step, *part))
        out = mx.concatenate(answers).astype(mx.float32)
        if stage.mix is not None:
            out = (stage.mix @ out.reshape(len(out), -1)).reshape(x.shape)
        return to_x0(out, x, sigma, schedule.config.prediction_type)

    return denoise


@dataclass(frozen=True)
class Kept:
    """What a run leaves as it is: the clean latents ``x0`` where ``mask`` [1, h, w, 1] is 0, under the run's ``noise``.

    At 1 everything is new; between 0 and 1 old and new are blended.
    """

    x0: mx.array
    mask: mx.array
    noise: mx.array

    def at(self, x: mx.array, sigma: float) -> mx.array:
        """The latents ``x`` with what is kept put in its place, at a noise level."""
        return self.mask * x + (1 - self.mask) * (self.x0 + sigma * self.noise)


def inpainting(denoise: Denoiser, kept: Kept, steps: Steps) -> Denoiser:
    """D of a run that keeps a part of an image (Lugmayr et al. 2022, without its resampling).

    The network sees what is kept under the noise of the level, and answers with it where it is kept.
    """

    def answer(x: mx.array, sigma: float) -> mx.array:
        # The first latents are as the run wants them: at full strength, noise alone.
        seen = x if sigma == steps.sigmas[0] else kept.at(x, sigma)
        return kept.at(denoise(seen, sigma), 0.0)

    return answer


def consistency(denoise: Denoiser, schedule: Schedule, steps: Steps) -> Denoiser:
    """D of a consistency model (Song et al. 2023, eq. 5): what D leaps to, and near timestep 0 the latent itself.

    ``c_skip * x / sqrt(sigma^2 + 1) + c_out * D``, with the scalings of LCM (Luo et al. 2023, appendix) over the
    timestep times ``timestep_scaling``, and the data's standard deviation taken as 0.5.
    """
    timestep = _timesteps(schedule, steps)

    def leap(x: mx.array, sigma: float) -> mx.array:
        s = schedule.config.timestep_scaling * timestep(sigma)
        c_skip, c_out = 0.25 / (s**2 + 0.25), s / math.sqrt(s**2 + 0.25)
        return c_out * denoise(x, sigma) + (c_skip / math.sqrt(sigma**2 + 1)) * x

    return leap


def given(sampler: Sampler, schedule: Schedule, steps: Steps, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a sampler is told about the run besides the ``options`` chosen for it, by the names of its keywords."""
    known = {
        "velocity": lambda: schedule.config.prediction_type == "v_prediction",
        "targets": lambda: schedule.targets(steps),
        "again": lambda: schedule.start_of_repeat(steps),
        "stops": lambda: schedule.stops(steps, options.get("eta", 0.3)),
        "lower_order_final": lambda: schedule.config.lower_order_final and steps.total < 15,  # as in diffusers
    }
    return {name: known[name]() for name in keywords(sampler.run) & known.keys() if len(steps)}


def _timesteps(schedule: Schedule, steps: Steps) -> Callable[[float], float]:
    """The timestep of a sigma: the run's own where it is one of its levels."""
    known = dict(zip(steps.sigmas, steps.timesteps, strict=False))
    return lambda sigma: known[sigma] if sigma in known else schedule.timestep(sigma)


def to_x0(out: mx.array, x: mx.array, sigma: float, prediction: str) -> mx.array:
    """Read a network's output as the clean latent.

    ``epsilon`` is the noise (Ho et al. 2020), ``v_prediction`` is ``(noise - sigma * x0) / sqrt(sigma^2 + 1)``
    (Salimans & Ho 2022), ``sample`` is x0 itself.
    """
    if prediction == "epsilon":
        return x - sigma * out
    if prediction == "v_prediction":
        return x / (sigma**2 + 1) - (sigma / math.sqrt(sigma**2 + 1)) * out
    return out
