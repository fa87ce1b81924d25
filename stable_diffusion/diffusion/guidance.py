"""Guidance: which questions the UNet is asked at a step, and how its answers are mixed into one for each image."""

import math
from dataclasses import dataclass, replace

import mlx.core as mx

from ..text.encode import Conditioning, concatenate


@dataclass(frozen=True)
class Stage:
    """What the UNet is asked during a stretch of a run: ``images[b]`` is the image that row b of its batch belongs to.

    ``mix`` [n, B] are the weights that make n answers out of B; None where they are the same. ``wanted[b]`` is 1 for
    rows of the prompt and 0 for those of the negative prompt.
    """

    first_step: int
    conditioning: Conditioning
    images: mx.array
    wanted: mx.array
    mix: mx.array | None


def stages(
    steps: int,
    n_images: int,
    positive: Conditioning,
    negative: Conditioning | None,
    guidance: float,
    *,
    blank: Conditioning | None = None,
    image_guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> list[Stage]:
    """The stretches of a run between which some prompt changes.

    Classifier-free guidance (Ho & Salimans 2022): with a ``negative`` conditioning the mixture is ``negative + guidance
    * (positive - negative)``. A prompt of several parts is guided by each of them, times its weight (Liu et al. 2022);
    without guidance it is their weighted mean, and ValueError where the weights sum to 0.

    With ``blank``, which is told neither prompt nor image, there are two scales (Brooks et al. 2023, eq. 3):
    ``blank + image_guidance * (negative - blank) + guidance * (positive - negative)``.

    Outside the ``interval``, in shares of the steps, there is no guidance (Kynkäänniemi et al. 2024): the UNet is asked
    for the prompt alone.
    """
    image_guidance = 1.0 if blank is None else image_guidance
    tables = [table for table in (positive, negative, blank) if table is not None]
    both = concatenate(tables)
    guided = range(*(_step_at(share, steps) for share in interval)) if negative is not None else range(0)
    starts = {0, guided.start, guided.stop} | {_step_at(row.start, steps) for row in both.rows}

    def rows(number: int, image: int, step: int) -> list[tuple[int, float]]:
        """(row in all tables, weight) of what a table says of an image at a step."""
        table, before = tables[number], sum(len(t.rows) for t in tables[:number])
        return [(before + row, w) for row, w in _rows(table, image * len(table) // n_images, step, steps)]

    def batch(image: int, step: int) -> list[tuple[int, int, float, int]]:
        """(row, image, weight, wanted) of the questions that are asked for an image."""
        wanted = rows(0, image, step)
        if step not in guided:
            return [(row, image, weight, 1) for row, weight in _mean(wanted)]
        rest = image_guidance - guidance * sum(weight for _, weight in wanted)
        asked = [(row, image, guidance * weight, 1) for row, weight in wanted]
        asked += [(row, image, rest * weight, 0) for row, weight in _mean(rows(1, image, step))]
        if blank is not None:
            asked += [(row, image, (1 - image_guidance) * weight, 0) for row, weight in _mean(rows(2, image, step))]
        return asked

    return [
        _stage(step, both, n_images, [asked for image in range(n_images) for asked in batch(image, step)])
        for step in sorted(starts)
        if step < steps
    ]


def in_parts(stage: Stage, rows: int | None) -> list[Stage]:
    """The questions of a stage in parts of at most ``rows`` of them, without their mixture; None is all at once."""
    count = len(stage.images)
    if rows is None or rows >= count:
        return [stage]

    def part(those: slice) -> Stage:
        told = stage.conditioning.map(lambda a: a[those])
        return replace(stage, conditioning=told, images=stage.images[those], wanted=stage.wanted[those], mix=None)

    return [part(slice(first, first + rows)) for first in range(0, count, rows)]


def _step_at(share: float, steps: int) -> int:
    """The first step that begins at a share of the run or later; the tolerance is for products such as 0.3 * 10."""
    return math.ceil(share * steps - 1e-9)


def _stage(step: int, table: Conditioning, n_images: int, batch: list[tuple[int, int, float, int]]) -> Stage:
    rows, images, weights, wanted = zip(*batch, strict=True)
    told = table if rows == tuple(range(len(table.rows))) else table.map(lambda a: a[mx.array(rows)])
    mix = None
    if images != tuple(range(n_images)):
        mix = mx.zeros((n_images, len(batch)))
        mix[mx.array(images), mx.arange(len(batch))] = mx.array(weights)
    return Stage(step, told, mx.array(images), mx.array(wanted), mix)


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
