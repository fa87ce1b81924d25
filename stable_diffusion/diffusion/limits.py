"""Limits of the estimate of x0, as some schedulers of diffusers set them. They are meant for pixels in [-1, 1]."""

import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx

from .schedule_config import ScheduleConfig

Clip = Callable[[mx.array], mx.array]


def clip_of(config: ScheduleConfig) -> Clip | None:
    """Return the function that limits x0 for a checkpoint's scheduler: of two that it asks for the threshold.

    UniPC has a threshold only where it predicts x0, as in diffusers.
    """
    if config.thresholding and config.predict_x0:
        return partial(threshold, ratio=config.dynamic_thresholding_ratio, highest=config.sample_max_value)
    if config.clip_sample:
        return partial(mx.clip, a_min=-config.clip_sample_range, a_max=config.clip_sample_range)
    return None


def threshold(x0: mx.array, ratio: float, highest: float) -> mx.array:
    """Clip each image of ``x0`` [n, h, w, C] to its own range and scale that to [-1, 1] (Saharia et al. 2022, 2.3).

    The range reaches to the quantile ``ratio`` of its absolute values, at least to 1 and at most to ``highest``.
    """
    ordered = mx.sort(mx.abs(x0).reshape(len(x0), -1), axis=1)
    place = ratio * (ordered.shape[1] - 1)
    low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
    ends = low + (place - math.floor(place)) * (high - low)
    ends = mx.clip(ends, 1.0, highest).reshape(-1, *[1] * (x0.ndim - 1))
    return mx.clip(x0, -ends, ends) / ends


def clipped(denoise: Callable[..., mx.array], clip: Clip) -> Callable[..., mx.array]:
    """Wrap D so that its estimate is limited."""
    return lambda *arguments: clip(denoise(*arguments))
