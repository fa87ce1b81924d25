"""The loop of a run: from the first latents through a sampler to the latents after each step."""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.threads import clear_streams_at_thread_end
from .denoiser import InpaintMask
from .samplers import Denoise, Noise, Sampler
from .schedule import Steps

# The arrays that come before the first step, then (latents, estimate of x0) after each step.
Pairs = Iterator[list[mx.array] | tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Run:
    """Hold the decisions of a run: steps, sampler and random numbers.

    Of the ``steps`` the first ``length`` are made. ``initial_scale`` is the deviation of the noise that text to image
    starts from. Image i has two random streams from ``seeds[i]``: one for its first noise and one for the noise that
    samplers add. So neither the batch nor the order of calls matters. ``latents`` and ``noise`` replace them.
    """

    steps: Steps
    length: int
    sampler: Sampler
    sampler_options: dict[str, Any]
    initial_scale: float
    seeds: tuple[int, ...]
    latents: mx.array | None
    noise: Noise | None

    @property
    def n_images(self) -> int:
        """Return the number of images that are generated together."""
        return len(self.seeds)

    def initial_noise(self, shape: tuple[int, ...]) -> mx.array:
        """Draw unit-normal noise [n, *shape], float32."""
        if self.latents is not None:
            return self.latents.astype(mx.float32)
        return mx.stack([mx.random.normal(shape, key=_streams(seed)[0]) for seed in self.seeds])

    def step_noise(self, step: int, shape: tuple[int, ...]) -> mx.array:
        """Draw the noise that a stochastic sampler adds at a step, unit normal, in the ``shape`` of the latents."""
        if self.noise is not None:
            return self.noise(step, shape)
        counter = mx.array([0, step], dtype=mx.uint32)
        return mx.stack([mx.random.normal(shape[1:], key=_streams(seed)[1] + counter) for seed in self.seeds])


def _streams(seed: int) -> tuple[mx.array, mx.array]:
    initial, added = mx.random.split(mx.random.key(seed))
    return initial, added


class Latents(Iterator[mx.array]):
    """Iterate over the latents of a run, each computed when it is evaluated.

    ``n_steps`` is the number of steps, ``predicted`` the last step's estimate of the clean latents. Early in a run it
    shows far more than the latents, which are mostly noise then.
    """

    def __init__(self, pairs: Pairs, n_steps: int):
        self._pairs, self.n_steps = pairs, n_steps
        self._is_prepared = False
        self._step = 0
        self.predicted: mx.array | None = None

    def prepare(self) -> None:
        """Encode the prompts and the image now, so that the text encoders can be freed before the first step."""
        if not self._is_prepared:
            self._is_prepared = True
            clear_streams_at_thread_end()
            mx.eval(next(self._pairs))  # the first step may be made in another thread

    def __next__(self) -> mx.array:
        if not self._is_prepared:
            self._is_prepared = True
            next(self._pairs)
        clear_streams_at_thread_end()  # this may be another thread than the one before
        x_t, self.predicted = next(self._pairs)
        self._step += 1
        _steps[id(x_t)] = self._step
        weakref.finalize(x_t, _steps.pop, id(x_t), None)
        return x_t


_steps: dict[int, int] = {}  # of the latents that are alive, by their id


def step_of(x_t: mx.array) -> int | None:
    """Return the step that has yielded these latents, counted from 1; None for another array."""
    return _steps.get(id(x_t))


class _RememberEstimate:
    """Call a denoiser and remember its last estimate of the clean latents."""

    def __init__(self, denoise: Denoise, predicted: mx.array):
        self._denoise, self.predicted = denoise, predicted

    def __call__(self, x: mx.array, sigma: float) -> mx.array:
        self.predicted = self._denoise(x, sigma)
        return self.predicted


def sample(denoise: Denoise, run: Run, x: mx.array, mask: InpaintMask | None) -> Pairs:
    """Yield the latents [n, h, w, 4] after each step and the estimate of x0, float32, not yet computed.

    ``x`` are the first latents, at the first sigma. The latents are in the variance-preserving scale of training. What
    the ``mask`` keeps ends without noise, also with samplers that stop just above zero.
    """
    denoise = _RememberEstimate(denoise, x)
    states = run.sampler.run(denoise, x, run.steps.sigmas, run.step_noise, **run.sampler_options)
    # There are fewer sigmas than states where another model continues.
    for done, (sigma, x) in enumerate(zip(run.steps.sigmas[1 : run.length + 1], states, strict=False), start=1):
        latents = x / math.sqrt(sigma**2 + 1)
        if mask is not None and done == len(run.steps):
            latents = mask.blend(latents, 0.0)
        elif mask is not None:
            latents = mask.blend(x, sigma) / math.sqrt(sigma**2 + 1)
        yield latents, denoise.predicted
