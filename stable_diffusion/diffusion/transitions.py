"""Steps shared by samplers: along the ODE with constant D, to a lower level and back with noise, to another scale.

The types of a sampler's arguments are defined here too, see ``samplers``.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

Denoise = Callable[[mx.array, float], mx.array]
Noise = Callable[[int, tuple[int, ...]], mx.array]
States = Iterator[mx.array]
Sigmas = Sequence[float]


def toward(x: mx.array, x0: mx.array, sigma: float, target: float) -> mx.array:
    """Step from ``sigma`` to ``target`` along the ODE with constant D, ``x0``; no cancellation at large sigma."""
    return x0 + (target / sigma) * (x - x0)


def guided_and_uncond(x0: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    """Return the guided and the unconditional D, each shaped like ``x``; without guidance both are the same."""
    return (x0, x0) if x0.ndim == x.ndim else (x0[0], x0[1])


def noised(x: mx.array, up: float, noise: Noise, draw: int) -> mx.array:
    """Add noise with the standard deviation ``up``; 0 draws no noise."""
    return x + up * noise(draw, x.shape) if up > 0 else x


def churned(
    x: mx.array, sigmas: Sigmas, noise: Noise, step: int, s_churn: float, s_tmin: float, s_tmax: float
) -> tuple[mx.array, float]:
    """Add noise before a step; returns (x, new level) (Karras et al. 2022, algorithm 2, lines 4 to 6).

    The new level is sigma times 1 + ``s_churn / steps``, at most sqrt(2). No noise is added if sigma does not lie
    between ``s_tmin`` and ``s_tmax``.
    """
    sigma = sigmas[step]
    gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    if gamma == 0 or not s_tmin <= sigma <= s_tmax:
        return x, sigma
    level = (1 + gamma) * sigma
    return noised(x, math.sqrt(level**2 - sigma**2), noise, step), level


def ancestral(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """Split a step to ``target`` into an ODE step to a level ``down`` and noise ``up <= target``: -> (down, up)."""
    up = min(target, eta * math.sqrt(max(target**2 * (sigma**2 - target**2) / sigma**2, 0.0)))
    return math.sqrt(target**2 - up**2), up


def reverse_sde(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """Split an exact step of the reverse SDE in the same way; its noise decays while it is added. eta 0: the ODE."""
    ratio = min(target / sigma, 1.0) ** eta  # a curve may end an ulp below the end of the run
    return target * ratio, target * math.sqrt(1 - ratio**2)


def threshold(x0: mx.array, ratio: float, highest: float) -> mx.array:
    """Clip each image of ``x0`` [n, h, w, C] to its range and scale that to [-1, 1] (Saharia et al. 2022, 2.3).

    The range reaches to the quantile ``ratio`` of its absolute values, at least to 1 and at most to ``highest``.
    """
    ordered = mx.sort(mx.abs(x0).reshape(len(x0), -1), axis=1)
    place = ratio * (ordered.shape[1] - 1)
    low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
    ends = low + (place - math.floor(place)) * (high - low)
    ends = mx.clip(ends, 1.0, highest).reshape(-1, *[1] * (x0.ndim - 1))
    return mx.clip(x0, -ends, ends) / ends


def relabel(x: mx.array, sigma: float, level: float) -> mx.array:
    """Rescale a latent at ``sigma`` to ``level`` so that it stays the same in variance-preserving scale."""
    return x if sigma == level else x * math.sqrt((1 + level**2) / (1 + sigma**2))
