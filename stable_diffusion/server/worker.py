"""One thread owns MLX: it opens models, generates the images of jobs one after the other, and frees what it held.

HTTP handlers run in an event loop in another thread. A job takes a request to the worker and brings back events: steps,
previews, pictures.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from PIL.Image import Image, new

from ..app.engine import Engine, Result, Step, open_model
from ..app.metadata import describe
from ..app.preview import preview_decoder
from ..app.request import Request, expand
from ..images.files import WHITE
from ..images.image import to_images
from ..models import cpu
from .settings import Settings

_log = logging.getLogger("stable_diffusion.server")

# What the networks in memory depend on: a request that differs in one of these needs another model.
_OF_MODEL = ("model", "revision", "vae", "unet", "text_encoder", "text_encoder_2", "tokenizer", "prediction", "lora")
_OF_MODEL += ("lora_partial", "embedding", "quantize", "unet_bits", "text_bits", "dtype", "exact")


class BusyError(Exception):
    """Refuse a job because too many wait; ``seconds`` is when to try again."""

    def __init__(self, waiting: int, seconds: float):
        self.seconds = int(seconds) + 1
        super().__init__(f"{waiting} jobs are waiting, the limit; try again in {self.seconds} s")


class StoppedError(Exception):
    """Report a job that ends without its images because the server stops."""


@dataclass(frozen=True)
class Picture:
    """Hold a finished image, the texts of how it was made, and how far it came where it was interrupted."""

    image: Image
    request: Request
    text: dict[str, str]
    number: int
    partial: str = ""
    is_flagged: bool = False  # by the safety checker; the image is white then


@dataclass(eq=False)
class Job:
    """Hold a request and what has come of it so far.

    Without ``draws`` the model is opened and no more. ``shows`` says that every step has a preview. ``folder`` holds
    the files that the request names, until the job ends.
    """

    request: Request
    draws: bool = True
    shows: bool = False
    folder: TemporaryDirectory | None = None
    requests: Sequence[Request] = ()
    pictures: list[Picture] = field(default_factory=list)
    preview: Image | None = None
    done: int = 0  # steps
    left: int = 0
    began: float = 0.0
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self.requests = expand([(self.request, {})]) if self.draws else []

    @property
    def progress(self) -> float:
        """Return the fraction of the steps that are made."""
        return self.done / (self.done + self.left) if self.done else 0.0

    @property
    def seconds_left(self) -> float:
        """Return the time that the remaining steps will take, as those before did; 0 before the first."""
        return (perf_counter() - self.began) / self.done * self.left if self.done else 0.0


class Worker:
    """Run jobs one after the other, in a thread of its own."""

    def __init__(self, settings: Settings):
        self.jobs: list[Job] = []  # that run or wait, in their order
        self.words: Sequence[str] = ()  # that embeddings give to prompts
        self.wants_preview = False  # for whoever looks at ``Job.preview``
        self._settings, self._thread, self._is_closing = settings, ThreadPoolExecutor(1, "mlx"), False
        self._model: Any = None
        self._key: tuple = ()

    def start(self) -> None:
        """Open the model of the settings. Raises ValueError or OSError where that is not possible."""
        self._thread.submit(self._begin).result()

    async def run(self, job: Job) -> AsyncIterator[Any]:
        """Run a job in its turn and yield "step", "preview" and pictures; raises what ended it.

        A listener that leaves cancels it. Raises BusyError where too many jobs wait, StoppedError where the server
        stops.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(event: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            if self._is_closing:
                raise StoppedError("the server is stopping")
            if len(self.jobs) > self._settings.queue:
                raise BusyError(len(self.jobs) - 1, self.jobs[0].seconds_left)
            self.jobs.append(job)
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
                if self._settings.idle is not None:
                    loop.call_later(self._settings.idle, self._free)
        finally:
            if job.folder is not None:
                job.folder.cleanup()

    def interrupt(self) -> None:
        """Stop the job that runs after its step; it has the pictures that there are."""
        for job in self.jobs[:1]:
            job.is_cancelled = True

    def stop(self) -> None:
        """Stop after the step at hand: jobs that run or wait end with StoppedError."""
        self._is_closing = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.shutdown()

    def _free(self) -> None:
        """Free the networks unless a job came meanwhile; the next one reads them again."""
        if not self.jobs and not self._is_closing:
            self._thread.submit(self._model.release)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        cpu.choose_device(self._settings.device)
        cpu.clear_streams_at_thread_end()
        self._open(self._settings.base)
        if self._settings.preload_models:
            self._model.ensure_models_are_loaded()

    def _run(self, job: Job, tell: Callable[[Any], None]) -> None:
        if job.is_cancelled:
            return
        self._open(job.request)
        job.began = perf_counter()
        if job.requests:
            engine = Engine(self._model, job.requests, self._settings.resources)
            for result in engine.run(lambda step: self._on_step(job, step, tell)):
                job.pictures.append(self._picture(result))
                tell(job.pictures[-1])
        if self._is_closing:
            raise CancelledError

    def _open(self, request: Request) -> None:
        """Open the model of a request; one that cannot be opened leaves the other in use."""
        key = tuple(request.value(name) for name in _OF_MODEL)
        if key == self._key:
            return
        settings = self._settings
        model = open_model(request, settings.resources.low_memory)
        preview = preview_decoder(model)
        check = model.load_safety_checker(settings.safety_model) if settings.safety_check else None
        self._model, self._preview, self._check, self._key = model, preview, check, key
        self.words = [word for words in model.embeddings.values() for word in words]
        cpu.clear_cache()  # of the model before

    def _on_step(self, job: Job, step: Step, tell: Callable[[Any], None]) -> bool:
        job.done, job.left = job.done + bool(step.number), step.total - step.number + step.later
        if step.number and (job.shows or self.wants_preview):
            job.preview, self.wants_preview = to_images(self._preview(step.predicted))[0], False
            tell("preview")
        elif step.number:
            tell("step")
        return job.is_cancelled or self._is_closing

    def _picture(self, result: Result) -> Picture:
        image, is_flagged = result.image, bool(self._check and any(self._check(result.image)))
        text = describe(self._model, result.batch, result.index, result.partial)
        image = new("RGB", image.size, WHITE) if is_flagged else image
        return Picture(image, result.request, text, result.number, result.partial, is_flagged)
