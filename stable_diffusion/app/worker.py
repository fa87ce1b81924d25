"""One thread owns MLX: it opens models, runs jobs one after the other, and frees the networks.

Servers, such as over HTTP, have an event loop in another thread. A job sends a request to the worker and returns
events: steps, previews, images.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import mlx.core as mx
from PIL.Image import Image, new

from ..images.encoded import keep
from ..images.files import WHITE
from ..images.image import to_images
from ..models import cpu
from .engine import Engine, Resources, Result, Step, open_model
from .library import Limits
from .metadata import describe
from .preview import preview_decoder
from .request import Request, expand

# The networks in memory depend on these fields: a request with other values needs another model.
_OF_MODEL = ("model", "revision", "vae", "unet", "text_encoder", "text_encoder_2", "tokenizer", "prediction", "lora")
_OF_MODEL += ("lora_partial", "embedding", "quantize", "unet_bits", "text_bits", "dtype", "exact")

_PREVIEW = 512  # pixels


class BusyError(Exception):
    """Refuse a job because the queue is full; try again after ``seconds``."""

    def __init__(self, waiting: int, seconds: float):
        self.seconds = int(seconds) + 1
        super().__init__(f"the queue is full: {waiting} jobs are waiting; try again in {self.seconds} s")


class StoppedError(Exception):
    """Report a job that ends early because the server stops."""


@dataclass(frozen=True)
class Picture:
    """Hold a finished image, its metadata texts, and its progress if it was interrupted."""

    image: Image
    request: Request
    text: dict[str, str]
    number: int
    partial: str = ""
    is_flagged: bool = False  # by the safety checker; the image is white then


@dataclass(eq=False)
class Job:
    """Hold a request and its results so far.

    A ``task`` runs instead of the generation, with the model of the request; ``outcome`` is its result. With ``shows``,
    every step has a preview. ``folder`` holds the files that the request names, until the job ends. ``adapt`` changes
    the requests to fit the model in use. ``limits`` hold for sizes that the model or an image decides, too.
    """

    request: Request
    task: Callable[[Any], Any] | None = None
    shows: bool = False
    folder: TemporaryDirectory | None = None
    adapt: Callable[[Sequence[Request], Any], Sequence[Request]] | None = None
    limits: Limits = field(default_factory=Limits)
    requests: Sequence[Request] = ()
    pictures: list[Picture] = field(default_factory=list)
    preview: Image | None = None
    done: int = 0  # steps
    left: int = 0
    began: float = 0.0
    is_cancelled: bool = False
    outcome: Any = None

    def __post_init__(self) -> None:
        self.requests = expand([(self.request, {})]) if self.task is None else []

    @property
    def progress(self) -> float:
        """Return the fraction of finished steps."""
        return self.done / (self.done + self.left) if self.done else 0.0

    @property
    def seconds_left(self) -> float:
        """Return the expected time of the remaining steps, at the speed so far; 0 before the first."""
        return (perf_counter() - self.began) / self.done * self.left if self.done else 0.0


def make_job(
    base: Request, values: Mapping[str, Any], pictures: Mapping[str, Any], limits: Limits, **options: Any
) -> Job:
    """Create a job for a request that differs from ``base`` in ``values``, by the names of fields.

    Networks are sources. ``pictures`` are bytes or base64, by the names of file fields; a list for fields with several
    files, None for no file. The prompt is plain text: braces of other programs are not alternatives. ``options`` are
    those of :class:`Job`. Raises ValueError for unknown or invalid values, and beyond the ``limits``.
    """
    folder = TemporaryDirectory(prefix="stable-diffusion-")
    try:
        files = {name: _kept(name, one, folder.name) for name, one in pictures.items() if one is not None}
        request, unknown = Request.from_dict({**values, **files}, base)
        if unknown:
            raise ValueError(f"unknown setting {', '.join(unknown):.80}")
        limits.check(request)
        text = request.resolved_prompt or request.prompt
        return Job(request.with_values(resolved_prompt=text), folder=folder, limits=limits, **options)
    except BaseException:
        folder.cleanup()
        raise


def _kept(name: str, picture: Any, folder: str) -> Any:
    """Write the images of a field into a folder, and return their paths in the type of the field."""
    if isinstance(picture, list):
        return tuple(keep(one, folder, f"{name}_{number}") for number, one in enumerate(picture, start=1))
    return keep(picture, folder, name)


class Worker:
    """Run jobs one after the other, in one thread.

    Args:
        base: a request for the model that is opened first.
        resources: how the machine is used.
        queue: number of jobs that may wait.
        idle: seconds without a job after which the networks are freed; None never frees them.
        device: "cpu" or "gpu"; None is the default device.
        preload_models: read all weights before the first job.
        safety_check: withhold images flagged by the safety checker of the checkpoint, or by ``safety_model``.
    """

    def __init__(
        self,
        base: Request,
        resources: Resources,
        *,
        queue: int = 32,
        idle: float | None = None,
        device: str | None = None,
        preload_models: bool = False,
        safety_check: bool = False,
        safety_model: str | None = None,
    ):
        self.jobs: list[Job] = []  # running and waiting, in their order
        self.words: Sequence[str] = ()  # of embeddings, for prompts
        self.wants_preview = False  # set to get one ``Job.preview``
        self._resources, self._queue, self._idle = resources, queue, idle
        self._safety_check, self._safety_model = safety_check, safety_model
        self._thread, self._is_closing = ThreadPoolExecutor(1, "mlx"), False
        self._begin = partial(self._open_first, base, device, preload_models)
        self._stop_timer: Callable[[], None] = lambda: None  # after which networks are freed
        self._model: Any = None
        self._key: tuple = ()

    def start(self) -> None:
        """Open the model of the settings. Raises ValueError or OSError if it cannot be opened."""
        self._thread.submit(self._begin).result()

    async def run(self, job: Job) -> AsyncIterator[Any]:
        """Run a job in its turn and yield "step", "preview" and images; raise the exception of a failed job.

        Closing the iteration cancels the job. Raises BusyError if the queue is full, StoppedError if the server stops.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(event: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            if self._is_closing:
                raise StoppedError("the server is stopping")
            if (waiting := sum(not job.is_cancelled for job in self.jobs[1:])) >= self._queue and self.jobs:
                raise BusyError(waiting, self.jobs[0].seconds_left)
            self.jobs.append(job)
            self._stop_timer()
            future = self._thread.submit(self._run, job, tell)
            future.add_done_callback(lambda future: tell(None))
            try:
                while (event := await events.get()) is not None:
                    yield event
                future.result()
            except CancelledError:
                raise StoppedError("the server is stopping") from None
            finally:
                job.is_cancelled = True
                future.cancel()
                self.jobs.remove(job)
                self._stop_timer()
                if self._idle is not None:
                    timer = loop.call_later(self._idle, self._free)
                    self._stop_timer = timer.cancel
        finally:
            if job.folder is not None:
                job.folder.cleanup()

    @property
    def job(self) -> Job | None:
        """Return the running job."""
        return self.jobs[0] if self.jobs else None

    def interrupt(self) -> None:
        """Stop the running job after its current step; it keeps the images so far."""
        if self.job is not None:
            self.job.is_cancelled = True

    def stop(self) -> None:
        """Stop after the current step: running and waiting jobs end with StoppedError."""
        self._is_closing = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.shutdown()

    def _free(self) -> None:
        """Free the networks if there is no job; the next job loads them again."""
        if not self.jobs and not self._is_closing:
            self._thread.submit(self._release)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _open_first(self, base: Request, device: str | None, preload_models: bool) -> None:
        cpu.choose_device(device)
        cpu.clear_streams_at_thread_end()
        self._open(base)
        if preload_models:
            self._model.ensure_models_are_loaded()

    def _run(self, job: Job, tell: Callable[[Any], None]) -> None:
        if job.is_cancelled:
            return
        self._open(job.request)
        job.began = perf_counter()
        if job.task is not None:
            job.outcome = job.task(self._model)
        else:
            requests = job.requests if job.adapt is None else job.adapt(job.requests, self._model)
            with closing(Engine(self._model, requests, self._resources)) as engine:
                for batch in engine.batches:
                    job.limits.check_size(batch.size, batch.request)
                for result in engine.run(lambda step: self._on_step(job, step, tell)):
                    job.pictures.append(self._picture(result))
                    tell(job.pictures[-1])
        if self._is_closing:
            raise CancelledError

    def _release(self) -> None:
        pinned = self._model.pinned.pop(self, set())
        self._model.release()
        self._model.pinned[self] = pinned

    def _open(self, request: Request) -> None:
        """Open the model of a request; if that fails, the previous model stays in use."""
        key = tuple(request.value(name) for name in _OF_MODEL)
        if key == self._key:
            return
        model = open_model(request, self._resources.low_memory)
        preview = preview_decoder(model)
        check = model.load_safety_checker(self._safety_model) if self._safety_check else None
        if not self._resources.low_memory:
            model.pinned[self] = set(model.sources)
        self._model, self._preview, self._check, self._key = model, preview, check, key
        self.words = [word for words in model.embeddings.values() for word in words]
        cpu.clear_cache()  # of the previous model

    def _on_step(self, job: Job, step: Step, tell: Callable[[Any], None]) -> bool:
        job.done, job.left = job.done + bool(step.number), step.total - step.number + step.later
        if step.number and self._check is None and (job.shows or self.wants_preview):  # which it has not seen
            job.preview, self.wants_preview = self._shown(step.predicted), False
            tell("preview")
        elif step.number:
            tell("step")
        return job.is_cancelled or self._is_closing

    def _shown(self, latents: mx.array) -> Image:
        """Return a preview of the first latents, in the size of the image, or with a longer side of 512 pixels."""
        height, width = (side * self._model.pixels_per_latent for side in latents.shape[1:3])
        scale = min(1.0, _PREVIEW / max(height, width))
        return to_images(self._preview(latents[:1]))[0].resize((round(width * scale), round(height * scale)))

    def _picture(self, result: Result) -> Picture:
        image, is_flagged = result.image, bool(self._check and any(self._check(result.image)))
        text = describe(self._model, result.batch, result.index, result.partial)
        image = new("RGB", image.size, WHITE) if is_flagged else image
        return Picture(image, result.request, text, result.batch.numbers[result.index], result.partial, is_flagged)
