"""Guidance: the conditional, unconditional and perturbed rows of the UNet's batch, and the weights of their outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import mlx.core as mx

from ..text.encode import Conditioning, PromptRow, concatenate
from .schedule import ScheduleConfig

Weighted = list[tuple[int, float]]  # (index of a row in the conditioning, its weight)
_Active = tuple[tuple[int, PromptRow], ...]  # the rows of a conditioning that are active in a step, with indices


def guidance_rescale(fraction: float | None, config: ScheduleConfig) -> float:
    """Return the fraction of rescaled guidance, by default the checkpoint's (Lin et al. 2024, section 3.4)."""
    if fraction is not None:
        return fraction
    return 0.7 if config.rescale_betas_zero_snr and config.prediction_type == "v_prediction" else 0.0


@dataclass(frozen=True)
class GuidanceBatch:
    """Hold a batch of conditional and unconditional rows for the UNet, used in the ``steps`` of a run.

    Row b belongs to image ``images[b]``. ``is_cond[b]`` is 1 for a conditional row and 0 for an unconditional one.
    ``is_perturbed[b]`` is 1 for a conditional row with perturbed self-attention. ``weights`` [n, B] combine the outputs
    of B rows into those of n images; None means that the rows are the images. ``uncond_weights`` [n, B] combine them
    into the unconditional predictions, for samplers that use both.
    """

    steps: tuple[int, ...]
    conditioning: Conditioning
    images: mx.array
    is_cond: mx.array
    is_perturbed: mx.array
    weights: mx.array | None = None
    rescale: float = 0.0
    uncond_weights: mx.array | None = None

    def split(self, rows_at_once: int) -> list["GuidanceBatch"]:
        """Split into batches of at most ``rows_at_once`` rows, without weights."""
        parts = []
        for first in range(0, len(self.images), rows_at_once):
            rows = slice(first, first + rows_at_once)
            conditioning = self.conditioning.map(lambda array, rows=rows: array[rows])
            of_rows = self.images[rows], self.is_cond[rows], self.is_perturbed[rows]
            parts.append(GuidanceBatch(self.steps, conditioning, *of_rows))
        return parts

    def combine(self, outputs: mx.array) -> mx.array:
        """Combine the outputs of all rows [B, h, w, C] into the predictions for the images [n, h, w, C].

        With ``uncond_weights`` the result is [2, n, h, w, C]: guided and unconditional predictions.
        """
        guided = self._guided(outputs)
        if self.uncond_weights is None:
            return guided
        return mx.stack([guided, _weighted_sums(self.uncond_weights, outputs)])

    def _guided(self, outputs: mx.array) -> mx.array:
        """Combine the outputs with ``weights``, and rescale them (Lin et al. 2024, eq. 15 and 16).

        ``rescale`` blends in a copy with the standard deviation of the conditional prediction.
        """
        if self.weights is None:
            return outputs
        guided = _weighted_sums(self.weights, outputs)
        if self.rescale == 0:
            return guided
        cond_weights = self.weights * self.is_cond * (1 - self.is_perturbed)
        cond = _weighted_sums(cond_weights / cond_weights.sum(axis=1, keepdims=True), outputs)
        factor = mx.std(cond, axis=(1, 2, 3), keepdims=True) / mx.std(guided, axis=(1, 2, 3), keepdims=True)
        return (self.rescale * factor + (1 - self.rescale)) * guided


def _weighted_sums(weights: mx.array, outputs: mx.array) -> mx.array:
    """Sum: [n, B], [B, h, w, C] -> [n, h, w, C]. A matrix product would round differently for each n and B."""
    return (weights[:, :, None, None, None] * outputs).sum(axis=1)


@dataclass(frozen=True)
class _Row:
    index: int  # of its conditioning
    image: int
    weight: float
    uncond_weight: float = 0.0
    is_cond: bool = False
    is_perturbed: bool = False


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
    pag_scale: float = 0.0,
    keeps_uncond: bool = False,
    steps_before: int = 0,
) -> list[GuidanceBatch]:
    """Build the batches of a run of ``steps`` steps: one for all steps with the same rows and weights.

    With a ``negative`` conditioning the output is ``negative + guidance * (positive - negative)`` (Ho & Salimans 2022).
    Each part of a composed prompt adds guidance, times its weight (Liu et al. 2022). Without guidance the output is the
    weighted mean of the parts; weights that sum to 0 raise ValueError.

    Args:
        uncond_image: conditioning without prompt or image, for ``image_guidance`` (Brooks et al. 2023, eq. 3):
            ``uncond_image + image_guidance * (negative - uncond_image) + guidance * (positive - negative)``.
        interval: (start, end), fractions of the steps between which guidance applies (Kynkäänniemi et al. 2024).
        rescale: see :meth:`GuidanceBatch._guided`; 0, or no ``negative`` conditioning, turns it off.
        pag_scale: perturbed-attention guidance (Ahn et al. 2024) adds ``pag_scale * (positive - perturbed)``; 0 is off.
        keeps_uncond: also return the unconditional predictions, of the ``negative`` conditioning.
        steps_before: steps of the same run that another model has done; prompt scheduling counts them too.
    """
    tables = [table for table in (positive, negative, uncond_image) if table is not None]
    conditioning = concatenate(tables)
    prompts = [range(*ends) for ends in pairwise(accumulate(map(len, tables), initial=0))]  # of each table
    interval = (0.0, 0.0) if negative is None and not pag_scale else interval
    scales, batches = (guidance, 1.0 if uncond_image is None else image_guidance, pag_scale), []
    rescale, keeps_uncond = (0.0, False) if negative is None else (rescale, keeps_uncond)
    for (active, is_guided), of_batch in _alike(conditioning, steps, steps_before, interval).items():
        rows: list[_Row] = []
        for image in range(n_images):
            of_image = [numbers[image * len(numbers) // n_images] for numbers in prompts]
            parts = [[(i, row.weight) for i, row in active if row.prompt == prompt] for prompt in of_image]
            read = parts if is_guided else parts[: 1 + keeps_uncond]
            rows += _rows(image, *read, scales=scales if is_guided else None, rescales=rescale > 0)
        batches.append(_batch(of_batch, conditioning, rows, n_images, rescale * is_guided, keeps_uncond))
    return batches


def _alike(
    conditioning: Conditioning, steps: int, steps_before: int, interval: tuple[float, float]
) -> dict[tuple[_Active, bool], list[int]]:
    """Group the steps that have the same rows and the same guidance."""
    # The first step at a fraction of the run or later; the tolerance is for products such as 0.3 * 10.
    guided = range(*(math.ceil(end * steps - 1e-9) for end in interval))
    groups: dict[tuple[_Active, bool], list[int]] = {}
    for step in range(steps):
        place = steps_before + step, steps_before + steps
        active = tuple((i, row) for i, row in enumerate(conditioning.rows) if row.is_read(*place))
        groups.setdefault((active, step in guided), []).append(step)
    return groups


def _rows(
    image: int, cond: Weighted, *unconds: Weighted, scales: tuple[float, float, float] | None, rescales: bool
) -> list[_Row]:
    """Weight the rows of an image by the ``scales`` of text, image and perturbed attention; None: no guidance."""
    guidance, image_guidance, pag_scale = scales or (1.0, 1.0, 0.0)
    if scales is None or not unconds:
        guidance, cond = 1.0, _mean(cond)
    elif rescales:
        _mean(cond)  # raises ValueError without a mean, which the rescaling needs
    rows = [_Row(index, image, (guidance + pag_scale) * weight, is_cond=True) for index, weight in cond]
    if pag_scale:
        rows += [_Row(index, image, -pag_scale * weight, is_cond=True, is_perturbed=True) for index, weight in cond]
    factors = image_guidance - guidance * sum(weight for _, weight in cond), 1 - image_guidance
    for i, (factor, uncond) in enumerate(zip(factors, unconds, strict=False)):  # the second is for image guidance
        rows += [_Row(index, image, factor * weight, 0.0 if i else weight) for index, weight in _mean(uncond)]
    return rows


def _mean(rows: Weighted) -> Weighted:
    total = sum(weight for _, weight in rows)
    if abs(total) < 1e-6:
        raise ValueError(
            f"the weights of the prompt's parts sum to {total:g}, so they have no mean; change the weights"
        )
    return [(index, weight / total) for index, weight in rows]


def _batch(
    steps: Sequence[int],
    conditioning: Conditioning,
    rows: Sequence[_Row],
    n_images: int,
    rescale: float,
    keeps_uncond: bool,
) -> GuidanceBatch:
    indices, images = [row.index for row in rows], mx.array([row.image for row in rows])
    if indices != list(range(len(conditioning.rows))):
        conditioning = conditioning.map(lambda array: array[mx.array(indices)])
    of_image = mx.arange(n_images)[:, None] == images  # [n, B]
    are_images = [row.image for row in rows] == list(range(n_images))
    return GuidanceBatch(
        steps=tuple(steps),
        conditioning=conditioning,
        images=images,
        is_cond=mx.array([int(row.is_cond) for row in rows]),
        is_perturbed=mx.array([int(row.is_perturbed) for row in rows]),
        weights=None if are_images else of_image * mx.array([row.weight for row in rows]),
        rescale=rescale,
        uncond_weights=of_image * mx.array([row.uncond_weight for row in rows]) if keeps_uncond else None,
    )
