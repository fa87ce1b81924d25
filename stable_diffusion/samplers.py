"""Samplers: each a generator that integrates dx/dsigma = (x - D(x, sigma)) / sigma from noise to an image.

``denoise(x, sigma)`` is D, the model's estimate of the clean latent x0. ``x`` is the noisy latent
``x0 + sigma * noise``; ``sigmas`` descend to where the run ends. ``noise(step, shape)`` draws what a stochastic sampler
injects. Each step yields the next ``x``. A step from sigma to s of the plain ODE is ``D + (s / sigma) * (x - D)``,
which is Euler's method written so that nothing cancels at large sigma.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx

Denoiser = Callable[[mx.array, float], mx.array]
Noise = Callable[[int, tuple[int, ...]], mx.array]


def euler(denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise) -> Iterator[mx.array]:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn)."""
    for sigma, target in pairwise(sigmas):
        x0 = denoise(x, sigma)
        x = x0 + (target / sigma) * (x - x0)
        yield x


def euler_ancestral(
    denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0
) -> Iterator[mx.array]:
    """Euler's method to a lower sigma, then fresh noise up to the next one (k-diffusion's ancestral sampling)."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down, up = _ancestral(sigma, target, eta)
        x0 = denoise(x, sigma)
        x = x0 + (down / sigma) * (x - x0)
        if up > 0:
            x = x + up * noise(i, x.shape)
        yield x


def ddim(
    denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0
) -> Iterator[mx.array]:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12): Euler's method here, with eta of its noise fresh.

    Their standard deviation, eq. 16, is ``eta`` times that of ancestral sampling.
    """
    yield from euler_ancestral(denoise, x, sigmas, noise, eta=eta)


def dpmpp_2m(denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise) -> Iterator[mx.array]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): exponential integrator that extrapolates D from two steps.

    With ``lambda = -log(sigma)`` the step length is ``h``; the first and the last step are of first order.
    """
    previous, h_previous = None, None
    for sigma, target in pairwise(sigmas):
        x0 = estimate = denoise(x, sigma)
        h = math.log(sigma / target) if target > 0 else math.inf
        if previous is not None and target > 0:
            r = h_previous / h
            estimate = x0 + (x0 - previous) / (2 * r)
        x = estimate + (target / sigma) * (x - estimate)
        previous, h_previous = x0, h
        yield x


def _ancestral(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """Split a step to ``target`` into an ODE step down to the first value and noise of the second, ``up <= target``."""
    up = min(target, eta * math.sqrt(max(target**2 * (sigma**2 - target**2) / sigma**2, 0.0)))
    return math.sqrt(target**2 - up**2), up


@dataclass(frozen=True)
class Sampler:
    """A row of ``SAMPLERS``: the generator, the grid of its timesteps (``schedule.GRIDS``), and what to tell people."""

    run: Callable[..., Iterator[mx.array]]
    grid: str
    stochastic: bool
    schedulers: Iterable[str] = ()  # the diffusers classes that it stands for, exactly or as their nearest


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(
        euler, "euler", False, ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler")
    ),
    "euler_a": Sampler(euler_ancestral, "euler", True, ("EulerAncestralDiscreteScheduler", "LCMScheduler")),
    "ddim": Sampler(ddim, "ddim", False, ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler")),
    "dpmpp_2m": Sampler(
        dpmpp_2m,
        "multistep",
        False,
        (
            "DPMSolverMultistepScheduler",
            "UniPCMultistepScheduler",
            "DEISMultistepScheduler",
            "DPMSolverSinglestepScheduler",
        ),
    ),
}


def find_sampler(name: str) -> Sampler:
    """The row of a sampler's name; ValueError lists the names."""
    if name not in SAMPLERS:
        raise ValueError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def sampler_for(scheduler: str) -> tuple[str, bool]:
    """The sampler for a checkpoint's scheduler class, and whether it is that very method or the nearest there is."""
    for name, sampler in SAMPLERS.items():
        if scheduler in sampler.schedulers:
            return name, scheduler == next(iter(sampler.schedulers))
    return "euler", False


def options(sampler: Sampler, **given: Any) -> dict[str, Any]:
    """Those of the ``given`` options that are not None; ValueError for one that the sampler has no use for."""
    chosen = {name: value for name, value in given.items() if value is not None}
    allowed = sampler.run.__kwdefaults__ or {}
    if unknown := chosen.keys() - allowed.keys():
        raise ValueError(f"sampler {sampler.run.__name__} takes no {', '.join(sorted(unknown))}; leave it out")
    return chosen
