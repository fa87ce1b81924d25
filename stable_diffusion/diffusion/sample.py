"""A run: its settings, its initial latents, and the loop through a sampler to the latents after each step."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import mlx.core as mx

from ..models import cpu
from ..models.resample import resample
from .brownian import BrownianMotion
from .denoiser import DenoiseStep, InpaintMask
from .generators import GENERATORS, Source, draw
from .samplers import Noise, Sampler
from .schedule import Schedule, Steps
from .transitions import guided_and_uncond

# The arrays computed before the first step, then (latents, estimate of x0) after each step.
Pairs = Iterator[list[mx.array] | tuple[mx.array, mx.array]]

# Modes of checkpoints, by the input channels of the UNet beyond those of the latents.
MODES = {0: "text", 1: "depth", 4: "instructions", 5: "masks"}

_PARALLEL = 0.9995  # mean cosine; above it the web UI interpolates linearly


@dataclass(frozen=True)
class Run:
    """Hold the settings of a run: steps, sampler and random numbers.

    The first ``length`` of the ``steps`` of the ``schedule`` are run. ``initial_scale`` is the factor on the initial
    noise, or on the latents of a previous run. Image i has two random streams from ``seeds[i]``: one for the initial
    noise and one for the noise that samplers add. So neither the batch nor the order of calls matters. ``latents`` and
    ``noise`` replace these streams. ``s_noise`` is a factor on the noise that samplers add.

    With a ``noise_source`` other than "mlx", image i has one generator for all its noise. Samplers add noise from the
    seed ``seeds[i] + eta_noise_seed_delta``. For some samplers the program of the source uses a Brownian motion of
    ``seeds[i]`` over the levels of the run instead (``Sampler.brownian``). ``variation_seeds``, one for each image,
    change the initial noise by ``variation_strength``.
    """

    schedule: Schedule
    steps: Steps
    length: int
    sampler: Sampler
    sampler_options: dict[str, Any]
    initial_scale: float
    seeds: tuple[int, ...]
    latents: mx.array | None
    noise: Noise | None
    s_noise: float
    noise_source: str = "mlx"
    eta_noise_seed_delta: int = 0
    variation_seeds: tuple[int, ...] = ()
    variation_strength: float = 0.0

    def _sources_of(self, seeds: Sequence[int]) -> list[Source]:
        return [GENERATORS[self.noise_source](seed).normal for seed in seeds]

    @cached_property
    def _sources(self) -> list[Source]:
        return self._sources_of(self.seeds)

    @property
    def _step_seeds(self) -> list[int]:
        return [(seed + self.eta_noise_seed_delta) % 2**64 for seed in self.seeds]

    @cached_property
    def _step_sources(self) -> list[Source]:
        return self._sources_of(self._step_seeds) if self.eta_noise_seed_delta else self._sources

    def initial_noise(self, shape: tuple[int, ...]) -> mx.array:
        """Draw unit-normal noise [n, *shape], float32."""
        if self.latents is not None:
            return self.latents.astype(mx.float32)
        if self.noise_source == "mlx":
            noises = [_mlx_noise(seeds, 0, 0, shape) for seeds in (self.seeds, self.variation_seeds) if seeds]
        else:
            both = self._sources, self._sources_of(self.variation_seeds)
            noises = [mx.array(draw(sources, shape)) for sources in both if sources]
        return noises[0] if len(noises) == 1 else slerp(*noises, self.variation_strength)

    def step_noise(self, step: int, shape: tuple[int, ...]) -> mx.array:
        """Draw the noise of ``shape`` that a stochastic sampler adds in a step: unit normal, times ``s_noise``."""
        if self.noise is not None:
            noise = self.noise(step, shape)
        elif self.noise_source in self.sampler.brownian:
            noise = self._brownian_noise(step, shape[1:])
        elif self.noise_source != "mlx":
            noise = mx.array(draw(self._step_sources, shape[1:]))
        else:
            noise = _mlx_noise(self._step_seeds, 1, step, shape[1:])
        return self.s_noise * noise

    @cached_property
    def _motions(self) -> list[BrownianMotion]:
        return [BrownianMotion(GENERATORS[self.noise_source], seed, self.steps.span) for seed in self.seeds]

    def _brownian_noise(self, number: int, shape: tuple[int, ...]) -> mx.array:
        """Return the increments of a Brownian motion over a part of a step, divided by the root of its length.

        A step has one part for each evaluation of D, split at geometric means of its levels.
        """
        step, part = divmod(number, self.sampler.evaluations)
        sigma, target = self.steps.sigmas[step : step + 2]
        ratio = (target / sigma) ** (1 / self.sampler.evaluations)
        start, end = sigma * ratio**part, sigma * ratio ** (part + 1)
        noise = draw([partial(motion.increment, start, end) for motion in self._motions], shape)
        return mx.array(noise / math.sqrt(abs(start - end)), dtype=mx.float32)

    def pass_encoding(self, shape: tuple[int, ...]) -> None:
        """Skip the random numbers that diffusers draws with torch to encode an image; here encoding uses the mean."""
        if self.noise_source == "torch":
            draw(self._sources, shape)


def _mlx_noise(seeds: Sequence[int], stream: int, step: int, shape: tuple[int, ...]) -> mx.array:
    """Draw noise [n, *shape] from one of two random streams of each seed."""
    keys = [mx.random.split(mx.random.key(seed))[stream] + mx.array([0, step], dtype=mx.uint32) for seed in seeds]
    return mx.stack([mx.random.normal(shape, key=key) for key in keys])


def slerp(a: mx.array, b: mx.array, fraction: float) -> mx.array:
    """Rotate noise ``a`` [n, h, w, C] towards ``b`` by a ``fraction`` of the angle between them (Shoemake 1985).

    As in A1111's web UI, each column of each channel has an angle. Images with angles near 0 are interpolated linearly.
    """
    cosine = (a * b).sum(axis=1, keepdims=True) / (mx.linalg.norm(a, axis=1) * mx.linalg.norm(b, axis=1))[:, None]
    angle = mx.arccos(mx.clip(cosine, -1, 1))
    weights = [mx.sin(part * angle) / mx.sin(angle) for part in (1 - fraction, fraction)]  # exactly 0 and 1 at the ends
    is_parallel = cosine.mean(axis=(1, 2, 3), keepdims=True) > _PARALLEL
    return mx.where(is_parallel, (1 - fraction) * a + fraction * b, weights[0] * a + weights[1] * b)


@dataclass(frozen=True)
class InitialLatents:
    """Hold the initial latents ``x`` [n, h, w, 4], the mask and the extra input channels.

    ``channels`` [1, h, w, C] are extra input channels of the UNet; ``uncond_channels`` replace them in rows without the
    image.
    """

    x: mx.array
    mask: InpaintMask | None = None
    channels: mx.array | None = None
    uncond_channels: mx.array | None = None


def from_image(
    run: Run,
    encode: Callable[[mx.array], mx.array],
    latent_scale: float,
    mode: str,
    strength: float,
    image: mx.array,
    mask: mx.array | None,
    depth: Callable[[], Any],
) -> InitialLatents:
    """Noise an image's latents to the first sigma of a run (Meng et al. 2022).

    Args:
        encode: [n, H, W, 3] -> latents, which are ``latent_scale`` times the autoencoder's.
        mode: one of ``MODES``.
        image: pixels [H, W, 3], or latents [n, h, w, 4].
        mask: [H, W], 0 in the areas to keep.
        depth: returns the depth map [H', W'] of the image, larger is nearer; for mode "depth".
    """
    x0 = image if image.ndim == 4 else encode(image[None])
    x0 = mx.broadcast_to(x0, (len(run.seeds), *x0.shape[1:]))
    if not len(run.steps):
        return InitialLatents(x0)
    (h, w), shape = x0.shape[1:3], x0.shape[1:]
    if mask is None and mode == "masks":
        mask = mx.ones(image.shape[:2])
    # A mask is downscaled by its maximum, so that thin lines are not lost.
    small = None if mask is None else mask.reshape(h, len(mask) // h, w, -1).max(axis=(1, 3))[None, ..., None]
    # As in diffusers, these cases begin with pure noise: otherwise the image would not be repainted completely.
    is_noise = strength == 1 and (mask is not None or mode in ("masks", "instructions"))
    if image.ndim == 3 and mode != "instructions" and not (mode == "masks" and is_noise):
        run.pass_encoding(shape)
    noise = run.initial_noise(shape)
    if mask is not None:  # the image without the masked area is encoded too
        run.pass_encoding(shape)
    x = run.initial_scale * noise if is_noise else x0 + run.steps.sigmas[0] * noise
    if mode == "masks":
        covered = encode((image * (mask < 0.5)[..., None])[None])
        return InitialLatents(x, None, mx.concatenate([small, covered], axis=-1))
    inpaint = None if small is None else InpaintMask(x0, small, noise)
    if mode == "instructions":
        seen = x0[:1] / latent_scale
        return InitialLatents(x, inpaint, seen, mx.zeros_like(seen))
    return InitialLatents(x, inpaint, depth_latents(depth(), (h, w)) if mode == "depth" else None)


def depth_latents(depth: Any, size: tuple[int, int]) -> mx.array:
    """Resize a depth map [H, W] to the UNet's fifth channel [1, h, w, 1], from -1 (farthest) to 1 (nearest).

    ``size`` is (h, w) of the latents; another aspect ratio is stretched. The map is first resized (bicubic, without
    smoothing) and then normalised, as in diffusers. Raises ValueError for a map that is not [H, W], is not finite, or
    has one value everywhere.
    """
    array = mx.array(depth, dtype=mx.float32)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"a depth map is an array [height, width], not {list(array.shape)}")
    if bad := array.size - mx.isfinite(array).sum().item():
        raise ValueError(f"{bad} of {array.size} values of the depth map are not finite; give a map with finite values")
    small = resample(array[None, :, :, None], size, cubic=True)
    low, high = small.min(), small.max()
    if not (high > low).item():
        raise ValueError("the depth map has one value everywhere; give one with near and far areas")
    return 2 * (small - low) / (high - low) - 1


class Latents(Iterator[mx.array]):
    """Iterate over the latents of a run. Nothing is computed before they are evaluated.

    ``n_steps`` is the number of steps, ``predicted`` the last step's estimate of the clean latents. Early in a run the
    estimate shows more than the latents, which are mostly noise.
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
            cpu.clear_streams_at_thread_end()
            mx.eval(next(self._pairs))  # the first step may run in another thread

    def __next__(self) -> mx.array:
        if not self._is_prepared:
            self._is_prepared = True
            next(self._pairs)
        cpu.clear_streams_at_thread_end()  # this may be another thread than in the last step
        x_t, self.predicted = next(self._pairs)
        self._step += 1
        _steps[id(x_t)] = self._step
        weakref.finalize(x_t, _steps.pop, id(x_t), None)
        return x_t


_steps: dict[int, int] = {}  # by the id of each latent that still exists


def step_of(x_t: mx.array) -> int | None:
    """Return the step that yielded these latents, counted from 1; None for other arrays."""
    return _steps.get(id(x_t))


def sample(denoise: DenoiseStep, run: Run, first: InitialLatents) -> Pairs:
    """Yield the latents [n, h, w, 4] after each step and the estimate of x0, float32, not yet computed.

    The latents are in the variance-preserving scale of training. The area that the mask of ``first`` keeps ends without
    noise, also with samplers that stop just above zero.
    """
    predicted, step = first.x, 0

    def remembered(x: mx.array, sigma: float) -> mx.array:
        nonlocal predicted
        x0 = denoise(x, sigma, step)
        predicted, _ = guided_and_uncond(x0, x)
        return x0

    states = run.sampler.run(remembered, first.x, run.steps.sigmas, run.step_noise, **run.sampler_options)
    # There are fewer sigmas than states if another model continues.
    for sigma, x in zip(run.steps.sigmas[1 : run.length + 1], states, strict=False):
        step += 1
        latents = x / math.sqrt(sigma**2 + 1)
        if first.mask is not None and step == len(run.steps):
            latents = first.mask.blend(latents, 0.0)
        elif first.mask is not None:
            latents = first.mask.blend(x, sigma) / math.sqrt(sigma**2 + 1)
        yield latents, predicted
