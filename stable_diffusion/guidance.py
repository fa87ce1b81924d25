"""Guidance: which questions the UNet is asked at a step, and how its answers are mixed into one for each image."""

import math
from dataclasses import dataclass

import mlx.core as mx

from .conditioning import Conditioning, concatenate


@dataclass(frozen=True)
class Stage:
    """What the UNet is asked during a stretch of a run: ``images[b]`` is the image that row b of its batch belongs to.

    ``mix`` [n, B] are the weights that make n answers out of B; None where they are the same.
    """

    first_step: int
    conditioning: Conditioning
    images: mx.array
    mix: mx.array | None


def stages(
    steps: int, n_images: int, positive: Conditioning, negative: Conditioning | None, guidance: float
) -> list[Stage]:
    """The stretches of a run between which some prompt changes.

    Classifier-free guidance (Ho & Salimans 2022): with a ``negative`` conditioning the mixture is ``negative + guidance
    * (positive - negative)``. A prompt of several parts is guided by each of them, times its weight (Liu et al. 2022);
    without guidance it is their weighted mean, and ValueError where the weights sum to 0.
    """
    both = positive if negative is None else concatenate([positive, negative])
    starts = {0} | {_step_at(row.start, steps) for row in both.rows}
    return [_stage(step, steps, n_images, positive, negative, guidance) for step in sorted(starts) if step < steps]


def _step_at(share: float, steps: int) -> int:
    """The first step that begins at a share of the run or later; the tolerance is for products such as 0.3 * 10."""
    return math.ceil(share * steps - 1e-9)


def _stage(
    step: int, steps: int, n_images: int, positive: Conditioning, negative: Conditioning | None, guidance: float
) -> Stage:
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
        return Stage(step, told, mx.array(images), None)
    mix = mx.zeros((n_images, len(batch)))
    mix[mx.array(images), mx.arange(len(batch))] = mx.array(weights)
    return Stage(step, told, mx.array(images), mix)


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


def guidance_embedding(weight: float, dim: int) -> mx.array:
    """LCM's embedding of the guidance scale (Luo et al. 2023): the waves of ``1000 * (weight - 1)`` [1, dim]."""
    half = dim // 2
    frequencies = mx.exp(mx.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (weight - 1) * frequencies
    return mx.pad(mx.concatenate([mx.sin(angles), mx.cos(angles)]), (0, dim % 2))[None]
