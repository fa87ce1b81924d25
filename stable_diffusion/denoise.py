"""From a network to D(x, sigma), the estimate of the clean latent that the samplers integrate."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .conditioning import Conditioning, concatenate
from .samplers import Denoiser
from .schedule import Schedule, Steps


@dataclass(frozen=True)
class _Stage:
    """What the UNet is asked during a stretch of a run: ``images[b]`` is the image that row b of its batch belongs to.

    ``mix`` [n, B] are the weights that make n answers out of B; None where they are the same.
    """

    first_step: int
    conditioning: Conditioning
    images: mx.array
    mix: mx.array | None


def denoiser(
    unet: Callable[..., mx.array],
    schedule: Schedule,
    steps: Steps,
    dtype: mx.Dtype,
    n_images: int,
    conditioning: Conditioning,
    negative: Conditioning | None = None,
    guidance: float = 1.0,
) -> Denoiser:
    """D(x, sigma) of a run: scale the input, ask the UNet, mix its answers, and read the mixture as x0.

    Classifier-free guidance (Ho & Salimans 2022): with a ``negative`` conditioning the answer is ``negative + guidance
    * (positive - negative)``. A prompt of several parts is guided by each of them, times its weight (Liu et al. 2022);
    without guidance it is their weighted mean, and ValueError where the weights sum to 0.
    Latents are float32 [n, h, w, 4]; the UNet computes in ``dtype``.
    """
    timesteps = dict(zip(steps.sigmas, steps.timesteps, strict=False))
    stages = _stages(len(steps), n_images, conditioning, negative, guidance)

    def denoise(x: mx.array, sigma: float) -> mx.array:
        t = timesteps[sigma] if sigma in timesteps else schedule.timestep(sigma)
        stage = [s for s in stages if steps.sigmas[s.first_step] >= sigma or s.first_step == 0][-1]
        told = stage.conditioning
        text_time = None if told.pooled is None else (told.pooled, told.time_ids)
        context = told.context if told.values is None else (told.context, told.values)
        scaled = (x / math.sqrt(sigma**2 + 1)).astype(dtype)
        batch = scaled if stage.mix is None else scaled[stage.images]
        out = unet(batch, mx.full((len(batch),), t), context, text_time=text_time, timestep_cond=told.guidance)
        out = out.astype(mx.float32)
        if stage.mix is not None:
            out = (stage.mix @ out.reshape(len(batch), -1)).reshape(x.shape)
        return to_x0(out, x, sigma, schedule.config.prediction_type)

    return denoise


def _stages(
    steps: int, n_images: int, positive: Conditioning, negative: Conditioning | None, guidance: float
) -> list[_Stage]:
    """The stretches of a run between which some prompt changes."""
    both = positive if negative is None else concatenate([positive, negative])
    starts = {0} | {_step_at(row.start, steps) for row in both.rows}
    return [_stage(step, steps, n_images, positive, negative, guidance) for step in sorted(starts) if step < steps]


def _step_at(share: float, steps: int) -> int:
    """The first step that begins at a share of the run or later; the tolerance is for products such as 0.3 * 10."""
    return math.ceil(share * steps - 1e-9)


def _stage(
    step: int, steps: int, n_images: int, positive: Conditioning, negative: Conditioning | None, guidance: float
) -> _Stage:
    batch: list[tuple[int, int, float]] = []  # row of the table, image, weight
    for image in range(n_images):
        wanted = _rows(positive, image * len(positive) // n_images, step, steps)
        if negative is None:
            batch += [(row, image, weight) for row, weight in _mean(wanted)]
            continue
        unwanted = _mean(_rows(negative, image * len(negative) // n_images, step, steps))
        rest = 1 - guidance * sum(weight for _, weight in wanted)
        batch += [(row, image, guidance * weight) for row, weight in wanted]
        batch += [(len(positive.rows) + row, image, rest * weight) for row, weight in unwanted]
    table = positive if negative is None else concatenate([positive, negative])
    rows, images, weights = zip(*batch, strict=True)
    told = table if rows == tuple(range(len(table.rows))) else table.map(lambda a: a[mx.array(rows)])
    if images == tuple(range(n_images)):
        return _Stage(step, told, mx.array(images), None)
    mix = mx.zeros((n_images, len(batch)))
    mix[mx.array(images), mx.arange(len(batch))] = mx.array(weights)
    return _Stage(step, told, mx.array(images), mix)


def _mean(rows: list[tuple[int, float]]) -> list[tuple[int, float]]:
    total = sum(weight for _, weight in rows)
    if abs(total) < 1e-6:
        raise ValueError(f"the weights of the prompt's parts sum to {total:g}; without guidance their mean is taken")
    return [(row, weight / total) for row, weight in rows]


def _rows(conditioning: Conditioning, prompt: int, step: int, steps: int) -> list[tuple[int, float]]:
    """(row, weight) of what a prompt says at a step."""
    return [
        (i, row.weight)
        for i, row in enumerate(conditioning.rows)
        if row.prompt == prompt and _step_at(row.start, steps) <= step < _step_at(row.end, steps)
    ]


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


def guidance_embedding(weight: float, dim: int) -> mx.array:
    """LCM's embedding of the guidance scale (Luo et al. 2023): the waves of ``1000 * (weight - 1)`` [1, dim]."""
    half = dim // 2
    frequencies = mx.exp(mx.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (weight - 1) * frequencies
    return mx.pad(mx.concatenate([mx.sin(angles), mx.cos(angles)]), (0, dim % 2))[None]
