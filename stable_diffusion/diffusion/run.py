"""A run, decided before anything is computed: its steps, its sampler, its random numbers."""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.token_merging import HIGHEST
from .denoiser import given
from .samplers import Noise, Sampler, States, find_sampler, options
from .schedule import Schedule, Steps


@dataclass(frozen=True)
class Run:
    """One run, checked and with every default filled in.

    Of its ``steps`` the first ``length`` are done; ``scale`` is the deviation of what text to image starts from.

    Image i has a seed of its own and two random streams, one for its initial noise and one for what samplers add, so
    that neither the batch nor the order of calls matters. ``latents`` and ``noise`` take the place of them.
    """

    steps: Steps
    length: int
    sampler: Sampler
    sampler_options: dict[str, Any]
    scale: float
    guidance: float
    guidance_interval: tuple[float, float]
    deep_cache: int
    token_merging: float
    seeds: tuple[int, ...]
    latents: mx.array | None
    noise: Noise | None

    @property
    def n_images(self) -> int:
        """How many images are made at once."""
        return len(self.seeds)

    def initial_noise(self, shape: tuple[int, ...]) -> mx.array:
        """Unit-normal noise [n, *shape], float32."""
        if self.latents is not None:
            return self.latents.astype(mx.float32)
        keys = (_streams(seed)[0] for seed in self.seeds)
        return mx.stack([mx.random.normal(shape, key=key) for key in keys])

    def step_noise(self, step: int, shape: tuple[int, ...]) -> mx.array:
        """What a stochastic sampler injects at a step (or draw), unit normal; ``shape`` is that of the latents."""
        if self.noise is not None:
            return self.noise(step, shape)
        counter = mx.array([0, step], dtype=mx.uint32)
        keys = (_streams(seed)[1] + counter for seed in self.seeds)
        return mx.stack([mx.random.normal(shape[1:], key=key) for key in keys])


def _streams(seed: int) -> tuple[mx.array, mx.array]:
    initial, added = mx.random.split(mx.random.key(seed))
    return initial, added


def plan(
    levels: Schedule,
    *,
    sampler: str | Callable[..., States],
    num_steps: int | None,
    default_steps: int,
    guidance: float,
    guidance_interval: tuple[float, float],
    n_images: int,
    seed: int | Sequence[int] | None,
    deep_cache: int = 1,
    token_merging: float = 0.0,
    strength: float = 1.0,
    denoising_start: float = 0.0,
    denoising_end: float = 1.0,
    schedule: str | None = None,
    spacing: str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    eta: float | None = None,
    s_noise: float | None = None,
    latents: mx.array | None = None,
    noise: Noise | None = None,
) -> Run:
    """Decide a run of ``generate_latents``, whose arguments these are, over the noise ``levels`` of a model.

    Raises ValueError for a number out of range, an unknown name, or choices that exclude each other.
    """
    if n_images < 1:
        raise ValueError(f"n_images {n_images} must be at least 1")
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise ValueError(f"guidance_interval {guidance_interval} must be shares of the steps, 0 <= start <= end <= 1")
    if deep_cache < 1:
        raise ValueError(f"deep_cache {deep_cache} must be at least 1: in every step all of the UNet runs")
    if not 0 <= token_merging <= HIGHEST:
        raise ValueError(f"token_merging {token_merging} must be a share of the positions, 0 ... {HIGHEST}")
    chosen = find_sampler(sampler)
    named = {"schedule": schedule, "spacing": spacing, "timesteps": timesteps, "sigmas": sigmas}
    asked = [name for name, value in named.items() if value is not None]
    if (timesteps is not None or sigmas is not None) and len(asked) > 1:
        raise ValueError(f"{', '.join(asked)} each say where the steps lie; give one of them")
    if timesteps is not None:
        steps = levels.at_timesteps(timesteps, chosen.grid)
    elif sigmas is not None:
        steps = levels.at_sigmas(sigmas)
    else:
        steps = levels.steps(default_steps if num_steps is None else num_steps, chosen.grid, spacing, schedule)
    if num_steps not in (None, len(steps)):
        raise ValueError(f"num_steps {num_steps} does not fit the {len(steps)} steps that are given; leave it out")
    if not (0 <= denoising_start <= 1 and 0 < denoising_end <= 1) or denoising_start > denoising_end:
        raise ValueError(
            f"a run cannot go from {denoising_start} to {denoising_end} of the noise; give 0 <= start <= end <= 1"
        )
    left = levels.remaining(steps, denoising_end)
    steps = steps.last(min(share_of_steps(len(steps), strength), levels.remaining(steps, denoising_start)))
    choices = options(chosen, eta=eta, s_noise=s_noise)
    return Run(
        steps=steps,
        length=max(len(steps) - left, 0),
        sampler=chosen,
        sampler_options=given(chosen, levels, steps, choices) | choices,
        scale=levels.initial_scale(steps, chosen.grid, spacing) if len(steps) else 0.0,
        guidance=guidance,
        guidance_interval=tuple(guidance_interval),
        deep_cache=deep_cache,
        token_merging=token_merging,
        seeds=_seeds(seed, n_images),
        latents=latents,
        noise=noise,
    )


def _seeds(seed: int | Sequence[int] | None, n_images: int) -> tuple[int, ...]:
    """One for each image."""
    if not isinstance(seed, Sequence):
        first = secrets.randbits(32) if seed is None else seed
        return tuple(range(first, first + n_images))
    if len(seed) != n_images:
        raise ValueError(f"{len(seed)} seeds for {n_images} images; give one for the first, or one for each")
    return tuple(seed)


def share_of_steps(count: int, strength: float) -> int:
    """The steps of ``count`` that image to image takes: rounded down as in diffusers, at least one above strength 0."""
    # The tolerance is for products such as 50 * 0.58 = 28.999999999999996.
    return min(count, max(math.floor(count * strength + 1e-9), int(strength > 0)))
