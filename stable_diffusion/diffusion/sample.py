"""A run carried out: the conditioning, the start and the steps, put together into a stream of latents."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import mlx.core as mx

from ..models.lanes import ONE, Lanes
from ..text.encode import Conditioning
from .controls import Control
from .denoiser import consistency, denoiser, inpainting
from .guidance import stages
from .initial import Start
from .run import Run
from .samplers import Denoiser
from .schedule import Schedule

Pairs = Iterator[tuple[mx.array, mx.array]]  # latents after a step, and what the step took for the image in them


class Latents(Iterator[mx.array]):
    """The latents of a run, each computed when it is evaluated.

    ``prepare()`` is called when the first is asked for; or earlier, so that the text encoders may be let go of. It
    encodes the prompts and the image, if it works from one.

    ``predicted`` is what the last step took for the image: the model's estimate of the clean latents, computed with the
    step. Early in a run it shows far more than the latents themselves, which are mostly noise then.
    """

    def __init__(self, begin: Callable[[], Pairs]):
        self._begin = begin
        self._steps: Pairs | None = None
        self.predicted: mx.array | None = None

    def prepare(self) -> None:
        """Make ready for the steps all that comes before them."""
        if self._steps is None:
            self._steps = self._begin()

    def __next__(self) -> mx.array:
        self.prepare()
        x_t, self.predicted = next(self._steps)
        return x_t


def sample(
    unet: Callable[..., mx.array],
    schedule: Schedule,
    dtype: mx.Dtype,
    run: Run,
    start: Start,
    positive: Conditioning,
    negative: Conditioning | None,
    controls: Sequence[Control] = (),
    image_guidance: float = 1.0,
    rows_at_once: int | None = None,
) -> Pairs:
    """The latents [n, h, w, 4] after each step of a run, float32 in the scale of training, not yet computed.

    With each comes the estimate of x0 that the sampler asked for last.
    """
    blank = None
    if start.channels is not None:
        if start.blind is not None and negative is not None:
            blank = _with_channels(negative, start.blind)
        positive = _with_channels(positive, start.channels)
        negative = None if negative is None else _with_channels(negative, start.channels)
    asked = stages(
        len(run.steps),
        run.n_images,
        positive,
        negative,
        run.guidance,
        blank=blank,
        image_guidance=image_guidance,
        interval=run.guidance_interval,
    )
    saving = rows_at_once, run.deep_cache, run.token_merging
    with ONE if rows_at_once else Lanes() as lanes:
        denoise = denoiser(unet, schedule, run.steps, dtype, asked, controls, *saving, lanes)
        if run.sampler.consistency:
            denoise = consistency(denoise, schedule, run.steps)
        if start.kept is not None:
            denoise = inpainting(denoise, start.kept, run.steps)
        yield from _states(denoise, run, start)


def _states(denoise: Denoiser, run: Run, start: Start) -> Pairs:
    """The states of the run's sampler as latents, each with what ``denoise`` answered last."""
    predicted = start.x

    def noted(x: mx.array, sigma: float) -> mx.array:
        nonlocal predicted
        predicted = denoise(x, sigma)
        return predicted

    states = run.sampler.run(noted, start.x, run.steps.sigmas, run.step_noise, **run.sampler_options)
    # There are fewer targets than states where another model goes on.
    for done, (sigma, x) in enumerate(zip(run.steps.sigmas[1 : run.length + 1], states, strict=False), start=1):
        latents, kept = x / math.sqrt(sigma**2 + 1), start.kept
        if kept is not None:  # in the end without noise, also by samplers that stop just above none
            ended = done == len(run.steps)
            latents = kept.at(latents, 0.0) if ended else kept.at(x, sigma) / math.sqrt(sigma**2 + 1)
        yield latents, predicted


def _with_channels(table: Conditioning, channels: mx.array) -> Conditioning:
    return replace(table, channels=mx.repeat(channels, len(table.rows), axis=0))
