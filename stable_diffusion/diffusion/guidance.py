"""Classifier-free guidance: the rows of the UNet's batch at each step, and the weights that combine their outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from ..models.layers import Context
from ..text.encode import Conditioning, concatenate

Weighted = list[tuple[int, float]]  # (index of a row in the conditioning, its weight)


@dataclass(frozen=True)
class GuidanceBatch:
    """Hold the conditional and unconditional rows of the UNet's batch, from ``first_step`` to the next batch's.

    Row b belongs to image ``images[b]``; ``is_cond[b]`` is 1 for a row of the prompt and 0 for one of the negative
    prompt. ``weights`` [n, B] combine the outputs of B rows into those of n images; None where the rows are the images.
    With ``rescale`` above 0, ``cond_weights`` [n, B] combine them into the conditional prediction.
    """

    first_step: int
    conditioning: Conditioning
    images: mx.array
    is_cond: mx.array
    weights: mx.array | None = None
    cond_weights: mx.array | None = None
    rescale: float = 0.0

    @property
    def text_time(self) -> tuple[mx.array, mx.array] | None:
        """Return XL's pooled prompts [B, P] and time ids [B, 6 or 5]; None for other models."""
        pooled, time_ids = self.conditioning.pooled, self.conditioning.time_ids
        return None if pooled is None else (pooled, time_ids)

    def context(self) -> Context:
        """Make the encoded prompts of the rows for one network, which caches its keys and values in them."""
        return Context(self.conditioning.context, self.conditioning.v_context)

    def split(self, max_rows: int | None) -> list["GuidanceBatch"]:
        """Return batches of at most ``max_rows`` rows, which have no weights; None is all rows at once."""
        count = len(self.images)
        if max_rows is None or max_rows >= count:
            return [self]

        def part(rows: slice) -> GuidanceBatch:
            conditioning = self.conditioning.map(lambda array: array[rows])
            return GuidanceBatch(self.first_step, conditioning, self.images[rows], self.is_cond[rows])

        return [part(slice(first, first + max_rows)) for first in range(0, count, max_rows)]

    def combine(self, outputs: mx.array) -> mx.array:
        """Combine the outputs of all rows [B, h, w, C] into those of the images [n, h, w, C].

        ``rescale`` is phi of Lin et al. 2024, eq. 15 and 16: the guided prediction, brought back to the standard
        deviation of the conditional one, has this share of the result.
        """
        if self.weights is None:
            return outputs
        guided = _weighted_sums(self.weights, outputs)
        if self.rescale == 0:
            return guided
        cond = _weighted_sums(self.cond_weights, outputs)
        deviations = (mx.std(prediction, axis=(1, 2, 3), keepdims=True) for prediction in (cond, guided))
        factor = mx.divide(*deviations)
        return (self.rescale * factor + (1 - self.rescale)) * guided


def _weighted_sums(weights: mx.array, outputs: mx.array) -> mx.array:
    return (weights @ outputs.reshape(len(outputs), -1)).reshape(-1, *outputs.shape[1:])


@dataclass(frozen=True)
class _Row:
    """Hold one row of a batch: the ``index`` of its conditioning, its image and its weights."""

    index: int
    image: int
    weight: float
    cond_weight: float = 0.0
    is_cond: bool = False


def guidance_batches(
    steps: int,
    n_images: int,
    positive: Conditioning,
    negative: Conditioning | None,
    guidance: float,
    *,
    uncond_image: Conditioning | None = None,
    image_guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> list[GuidanceBatch]:
    """Make the batches of a run of ``steps`` steps: a new one at each step where the rows or their weights change.

    With a ``negative`` conditioning the output is ``negative + guidance * (positive - negative)`` (Ho & Salimans 2022).
    A prompt of several parts is guided by each of them, times its weight (Liu et al. 2022). Without guidance the output
    is the weighted mean of the parts, and ValueError where the weights sum to 0.

    Args:
        uncond_image: conditioning without prompt and image. It adds a second scale (Brooks et al. 2023, eq. 3):
            ``uncond_image + image_guidance * (negative - uncond_image) + guidance * (positive - negative)``.
        image_guidance: the second scale.
        interval: (start, end), shares of the steps between which there is guidance (Kynkäänniemi et al. 2024). Outside
            of it the batch has the rows of the prompt alone.
        rescale: see :meth:`GuidanceBatch.combine`; 0 is off.
    """
    tables = [table for table in (positive, negative, uncond_image) if table is not None]
    first_prompts = list(accumulate(map(len, tables), initial=0))
    conditioning = concatenate(tables)
    guided = range(*(_step_at(share, steps) for share in interval)) if negative is not None else range(0)

    def rows_of(image: int, step: int) -> list[_Row]:
        prompts = [first + image * len(table) // n_images for first, table in zip(first_prompts, tables, strict=False)]
        cond, *unconds = (_active_rows(conditioning, prompt, step, steps) for prompt in prompts)
        if step not in guided:
            return [_Row(index, image, weight, is_cond=True) for index, weight in _mean(cond)]
        scales = guidance, 1.0 if uncond_image is None else image_guidance
        return _guided_rows(image, cond, unconds, *scales, with_means=rescale > 0)

    starts = {0, guided.start, guided.stop} | {_step_at(row.start, steps) for row in conditioning.rows}
    batches = []
    for step in sorted(start for start in starts if start < steps):
        rows = [row for image in range(n_images) for row in rows_of(image, step)]
        batches.append(_batch(step, conditioning, rows, n_images, rescale if step in guided else 0.0))
    return batches


def _guided_rows(
    image: int, cond: Weighted, unconds: Sequence[Weighted], guidance: float, image_guidance: float, with_means: bool
) -> list[_Row]:
    """Weigh the rows of an image for classifier-free guidance, those of the prompt first."""
    means = dict(_mean(cond)) if with_means else {}
    rows = [_Row(index, image, guidance * weight, means.get(index, 0.0), is_cond=True) for index, weight in cond]
    scales = image_guidance - guidance * sum(weight for _, weight in cond), 1 - image_guidance
    for scale, uncond in zip(scales, unconds, strict=False):
        rows += [_Row(index, image, scale * weight) for index, weight in _mean(uncond)]
    return rows


def _batch(step: int, conditioning: Conditioning, rows: Sequence[_Row], n_images: int, rescale: float) -> GuidanceBatch:
    indices, images = [row.index for row in rows], [row.image for row in rows]
    if indices != list(range(len(conditioning.rows))):
        conditioning = conditioning.map(lambda array: array[mx.array(indices)])

    def matrix(weights: list[float]) -> mx.array:
        matrix = mx.zeros((n_images, len(rows)))
        matrix[mx.array(images), mx.arange(len(rows))] = mx.array(weights)
        return matrix

    return GuidanceBatch(
        first_step=step,
        conditioning=conditioning,
        images=mx.array(images),
        is_cond=mx.array([int(row.is_cond) for row in rows]),
        weights=None if images == list(range(n_images)) else matrix([row.weight for row in rows]),
        cond_weights=matrix([row.cond_weight for row in rows]) if rescale else None,
        rescale=rescale,
    )


def _step_at(share: float, steps: int) -> int:
    """Return the first step that begins at a share of the run or later."""
    return math.ceil(share * steps - 1e-9)  # the tolerance is for products such as 0.3 * 10


def _active_rows(table: Conditioning, prompt: int, step: int, steps: int) -> Weighted:
    """Return the rows that a prompt has at a step."""
    return [
        (index, row.weight)
        for index, row in enumerate(table.rows)
        if row.prompt == prompt and _step_at(row.start, steps) <= step < _step_at(row.end, steps)
    ]


def _mean(rows: Weighted) -> Weighted:
    """Scale the weights of rows to a sum of 1."""
    total = sum(weight for _, weight in rows)
    if abs(total) < 1e-6:
        raise ValueError(
            f"the weights of the prompt's parts sum to {total:g}, and their mean is needed; give them another sum"
        )
    return [(index, weight / total) for index, weight in rows]


def guidance_embedding(weight: float, dim: int) -> mx.array:
    """Embed the guidance scale for LCM (Luo et al. 2023): the waves of ``1000 * (weight - 1)`` [1, dim]."""
    half = dim // 2
    frequencies = mx.exp(mx.arange(half) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (weight - 1) * frequencies
    return mx.pad(mx.concatenate([mx.sin(angles), mx.cos(angles)]), (0, dim % 2))[None]
