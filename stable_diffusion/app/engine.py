"""The engine: from a model and requests to finished images, and nothing of the model is destroyed.

The prompts of all images are encoded once; images of one setting are generated in batches that fit the memory. A batch
goes through a first pass, perhaps a second one in larger size, perhaps a refiner, and is decoded image by image.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from time import perf_counter
from typing import Any

import mlx.core as mx
from PIL.Image import Image

from ..diffusion.sample import Latents
from ..images.image import from_array
from ..pipeline import StableDiffusion
from ..weights.files import open_checkpoint
from . import memory
from .batches import Batch, PromptLoRAs, first_pass, group, hires_pass, prepare, refiner_pass, run_shape
from .inputs import Inputs, read_inputs
from .request import Request

_log = logging.getLogger("stable_diffusion")

TEXT_BITS, UNET_BITS = 4, 8  # of ``Request.quantize``
_PARTS = ("vae", "unet", "text_encoder", "text_encoder_2")


class Release(Enum):
    """Choose when networks are freed: after their last use in a run (a script), or never (a server)."""

    AFTER_USE = auto()
    NEVER = auto()


@dataclass(frozen=True)
class Resources:
    """Hold how a machine is used, which decides nothing about the images.

    ``memory_limit`` is in bytes, None is most of the machine's memory. ``batch_size`` None is what fits.
    """

    low_memory: bool = False
    memory_limit: float | None = None
    batch_size: int | None = None
    decoding_batch_size: int = 1
    release: Release = Release.AFTER_USE


@dataclass(frozen=True)
class Step:
    """Describe a step that has been computed: its number of ``total``, and the steps of the passes still to come.

    ``predicted`` [n, h, w, 4] is the estimate of the clean latents. Step 0 is before the first one. ``is_retry`` says
    that a pass is computed again in float32.
    """

    batch: Batch
    number: int
    total: int
    later: int
    predicted: mx.array | None = None
    is_retry: bool = False


OnStep = Callable[[Step], bool | None]  # True stops the run after this step


@dataclass(frozen=True)
class Result:
    """Hold a finished image, or what there is of it where a run was stopped (``partial``: "step 3 of 20").

    ``seconds`` are the image's share of its batch. ``latents`` [n, h, w, 4] are those of the batch, ``index`` the
    image's place in it.
    """

    request: Request
    image: Image
    batch: Batch
    index: int
    seconds: float
    partial: str
    latents: mx.array
    model: StableDiffusion


def chosen_bits(request: Request) -> dict[str, int]:
    """Return ``unet_bits`` and ``text_bits`` where a request quantizes."""
    bits = {"unet_bits": UNET_BITS, "text_bits": TEXT_BITS} if request.quantize else {}
    return bits | _present(request, ("unet_bits", "text_bits"))


def chosen_parts(request: Request) -> dict[str, str]:
    """Return the networks that a request takes from elsewhere, and from where."""
    return _present(request, _PARTS)


def _present(request: Request, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(request, name) for name in names if getattr(request, name) is not None}


def computes_in_half(request: Request) -> bool:
    """Return whether a request is computed in half precision: a CPU is slower at it than at float32."""
    return request.float16 and mx.default_device() == mx.gpu


def open_model(request: Request, low_memory: bool = False, refiner: bool = False) -> StableDiffusion:
    """Open the model of a request, or its refiner, which shares nothing with it but the autoencoder.

    Raises ValueError or OSError, one line, for what cannot be found, read or run.
    """
    float16 = computes_in_half(request)
    parts, bits = chosen_parts(request), chosen_bits(request)
    if refiner:
        parts = {name: source for name, source in parts.items() if name == "vae"}
        return StableDiffusion(request.refiner, float16, parts=parts, low_memory=low_memory, **bits)
    model = StableDiffusion(
        request.model,
        float16,
        revision=request.revision,
        parts=parts,
        tokenizer=request.tokenizer,
        prediction=request.prediction,
        loras=request.lora,
        lora_partial=request.lora_partial,
        low_memory=low_memory,
        **bits,
    )
    for embedding in request.embedding:
        model.load_embedding(*embedding.rsplit("=", 1))
    return model


def check_refiner(request: Request) -> None:
    """Raise ValueError or OSError for a refiner that cannot be found; it is opened when it is needed."""
    if request.refiner:
        open_checkpoint(request.refiner, float16=computes_in_half(request))


class Engine:
    """Generate the images of requests for one image each, which share their model and input files.

    Everything that comes before the first step is done when it is made: reading inputs, encoding prompts, choosing
    batches. So a mistake shows before anything is computed, as ValueError or OSError, one line.

    Args:
        model: see :func:`open_model`.
        requests: see :func:`stable_diffusion.app.request.expand`.
        resources: how the machine is used.
        inputs: the images that the requests name; None reads them.
    """

    def __init__(
        self,
        model: StableDiffusion,
        requests: Sequence[Request],
        resources: Resources = Resources(),
        inputs: Inputs | None = None,
    ):
        self.model, self._resources = model, resources
        self._request = requests[0]
        self._inputs = read_inputs(self._request) if inputs is None else inputs
        check_refiner(self._request)
        self._limit = memory.set_limits(resources.memory_limit, resources.low_memory)
        self._networks = [model.load_controlnet(path) for path, _ in self._request.controlnet]
        self._loras = PromptLoRAs.attach(model, requests)
        prepared = [
            prepare(model, images, self._inputs, self._networks, self._loras) for images in group(model, requests)
        ]
        self.batches = self._numbered([part for batch in prepared for part in self._split(batch)])
        largest = max(self.batches, key=lambda batch: len(batch.requests) * batch.setup.size[0] * batch.setup.size[1])
        stages = memory.fit(model, run_shape(model, largest), self._limit, resources.memory_limit is not None)
        together = memory.fits_together(model, stages, self._limit)
        self._one_by_one = len(self.batches) > 1 and together and not model.low_memory
        self._first = self._prepared(first_pass(model, batch) for batch in self.batches)
        self._stopped = False

    def _split(self, batch: Batch) -> Iterator[Batch]:
        """Split a batch into those that are wanted, or that fit the memory."""
        most = self._resources.batch_size
        if most is None:
            self._loras.apply(batch.request)
            most = memory.images_that_fit(self.model, run_shape(self.model, batch), self._limit)
        return batch.split(most)

    @staticmethod
    def _numbered(batches: list[Batch]) -> list[Batch]:
        count = len(batches)
        return [replace(b, index=f"{i}/{count}" if count > 1 else "") for i, b in enumerate(batches, start=1)]

    @staticmethod
    def _prepared(passes: Iterator[Latents]) -> list[Latents]:
        passes = list(passes)
        for latents in passes:
            latents.prepare()
        return passes

    def run(self, on_step: OnStep = lambda step: None) -> Iterator[Result]:
        """Generate the images in batches and yield each as soon as it is decoded.

        When ``on_step`` returns True, the run stops: the batches that have begun are yielded as they are. Raises
        FloatingPointError for values that are not finite in float32 either. An engine runs once; the model can be used
        again afterwards.
        """
        if not self._first:
            raise ValueError("this engine has run already; make another one of the same model")
        mx.eval([batch.conditioning() for batch in self.batches])
        self._free("unet", "autoencoder")
        try:
            if self._request.refiner:
                begun = [one for group in self._denoised(on_step, one_by_one=False) for one in group]
                yield from self._refined(begun, on_step)
            else:
                for group_of_runs in self._denoised(on_step, self._one_by_one):
                    yield from self._decoded(group_of_runs, keep=self._one_by_one)
        finally:
            self._loras.detach()

    def _free(self, *kept: str) -> None:
        if self._resources.release is Release.AFTER_USE:
            self.model.release(*kept)

    def _denoised(self, on_step: OnStep, one_by_one: bool) -> "Iterator[list[_Run]]":
        """Yield the batches after their passes by the base model: one after the other, or all together."""
        runs = [_Run(batch) for batch in self.batches]
        for chunk in [[run] for run in runs] if one_by_one else [runs]:
            chunk = self._pass(chunk, on_step, lambda run: first_pass(self.model, run.batch), self._first)
            if self._request.hires:
                chunk = self._pass(chunk, on_step, self._hires)
            yield chunk

    def _hires(self, run: "_Run") -> Latents:
        return hires_pass(self.model, run.batch, run.latents, self._inputs, self._networks)

    def _refined(self, runs: "list[_Run]", on_step: OnStep) -> Iterator[Result]:
        """Yield the images as the refiner finishes them; it is opened when the base has done its part."""
        if not self._stopped:
            base, self._networks = self.model, []
            runs = [replace(run, batch=replace(run.batch, setup=replace(run.batch.setup, controls=()))) for run in runs]
            self.batches = [run.batch for run in runs]
            self._free()
            self.model = open_model(self._request, base.low_memory, refiner=True)
            shape = replace(run_shape(self.model, runs[0].batch), larger=None, encodes=False)
            stages = memory.fit(self.model, shape, self._limit, is_strict=False)
            self._one_by_one = self._one_by_one and memory.fits_together(self.model, stages, self._limit)
        for chunk in [[run] for run in runs] if self._one_by_one else [runs]:
            chunk = self._pass(chunk, on_step, lambda run: refiner_pass(self.model, run.batch, run.latents))
            yield from self._decoded(chunk, keep=self._one_by_one)

    def _pass(
        self,
        runs: "Sequence[_Run]",
        on_step: OnStep,
        begin: "Callable[[_Run], Latents]",
        passes: list[Latents] | None = None,
    ) -> "list[_Run]":
        """Take the runs through a pass; ``passes`` are those that have been prepared, of these runs first."""
        if passes is None:
            passes = [] if self._stopped else self._prepared(begin(run) for run in runs)
        done = []
        for run in runs:
            if not self._stopped:
                self._loras.apply(run.batch.request)
                start = perf_counter()
                attempts = _Attempts(self, run, on_step, partial(begin, run), passes)
                latents, stopped_at = self.model.retry_in_float32("unet", attempts)
                if latents is not None:
                    seconds = run.seconds + perf_counter() - start
                    done.append(replace(run, latents=latents, seconds=seconds, partial=stopped_at))
                    continue
            done.append(run if run.partial or run.latents is None else replace(run, partial="the first pass"))
        return done

    def _decoded(self, runs: "Sequence[_Run]", keep: bool) -> Iterator[Result]:
        """Decode the images of the runs that have begun. The UNet is freed before, unless the next batch needs it."""
        if not keep:
            self._free("autoencoder")
        for run in runs:
            if run.latents is None:
                continue
            count = len(run.batch.requests)
            for i, pixels in enumerate(self._pixels(run.latents)):
                image = from_array(pixels)
                if run.batch.setup.canvas is not None and not run.batch.request.no_composite:
                    image = run.batch.setup.canvas.paste(image)
                seconds = round(run.seconds / count, 3)
                request = run.batch.requests[i]
                yield Result(request, image, run.batch, i, seconds, run.partial, run.latents, self.model)

    def _pixels(self, latents: mx.array) -> Iterator[mx.array]:
        """Yield the pixels [H, W, 3] of each image, in float32 where the autoencoder overflows in half precision."""
        size = self._resources.decoding_batch_size
        for start in range(0, len(latents), size):
            part = latents[start : start + size]
            yield from self.model.retry_in_float32(
                "autoencoder", lambda part=part: self.model.check(self.model.decode(part))
            )


@dataclass(frozen=True)
class _Run:
    """Hold a batch and its latents so far, None before its first step."""

    batch: Batch
    latents: mx.array | None = None
    seconds: float = 0.0
    partial: str = ""


class _Attempts:
    """Compute a pass of a batch: first the one that is prepared, and when it is called again a new one."""

    def __init__(
        self,
        engine: Engine,
        run: _Run,
        on_step: OnStep,
        begin: Callable[[], Latents],
        passes: list[Latents],
    ):
        self._engine, self._run, self._on_step, self._begin, self._passes = engine, run, on_step, begin, passes
        self._is_first = True

    def __call__(self) -> tuple[mx.array | None, str]:
        """Return the last latents, and how far the run came if it was stopped; FloatingPointError on overflow.

        There are no latents where it was stopped before its first step.
        """
        is_retry, self._is_first = not self._is_first, False
        if is_retry:
            for network in self._engine._networks:
                network.set_dtype(mx.float32)
        # Nothing else holds a run that is over, or its networks would stay in memory.
        latents = self._begin() if is_retry else self._passes.pop(0)
        total, later = latents.n_steps, sum(later.n_steps for later in self._passes)
        if self._on_step(Step(self._run.batch, 0, total, later, is_retry=is_retry)):
            self._engine._stopped = True
            return None, ""
        for number, x_t in enumerate(latents, start=1):
            self._engine.model.check(x_t)
            stop = self._on_step(Step(self._run.batch, number, total, later, latents.predicted))
            self._engine._stopped = self._engine._stopped or bool(stop)
            if stop and number < total:
                return latents.predicted, f"step {number} of {total}"
        return x_t, ""
