"""The engine: from a model and requests to finished images. The model can be used again afterwards.

The prompts of all images are encoded once. Images with the same settings are generated in batches that fit the memory.
A batch has a first pass, an optional second pass in larger size or a refiner pass, and is decoded image by image.
"""

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Any

import mlx.core as mx
from PIL.Image import Image

from ..diffusion.sample import Latents
from ..images.image import from_array
from ..lora.folders import find_in
from ..lora.layers import AttachedLoRA
from ..models import cpu
from ..models.seamless import seamlessly
from ..options import SettingError
from ..pipeline import StableDiffusion
from ..unconditional import UnconditionalDiffusion
from ..weights.files import open_checkpoint
from ..weights.parts import NETWORKS
from . import memory
from .batches import Batch, detail_batch, first_pass, group, hires_pass, prepare, refiner_pass, run_shape
from .inputs import Inputs, enlarged, load_beside, read_inputs
from .lora_tags import remarks
from .request import Request
from .sources import split_embedding

_log = logging.getLogger("stable_diffusion")

TEXT_BITS, UNET_BITS = 4, 8  # of ``Request.quantize``


@dataclass(frozen=True)
class Resources:
    """Hold the use of the machine, which does not change the images.

    ``memory_limit`` is in bytes; None is most of the machine's memory. ``batch_size`` None is as many images as fit.
    """

    low_memory: bool = False
    memory_limit: float | None = None
    batch_size: int | None = None
    decoding_batch_size: int = 1


@dataclass(frozen=True)
class Step:
    """Describe a finished step: its number out of ``total``, and the steps of ``later`` passes.

    ``predicted`` [n, h, w, 4] is the estimate of the clean latents. Step 0 is before the first one. ``is_retry``: the
    pass is recomputed, in float32 or with fewer rows at once.
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
    """Hold a finished image, or an unfinished one of a stopped run (``partial``: "step 3 of 20").

    ``seconds`` is the time of the batch divided by its images. ``latents`` [n, h, w, 4] are those of the batch,
    ``index`` is the image's place in it.
    """

    request: Request
    image: Image
    batch: Batch
    index: int
    seconds: float
    partial: str
    latents: mx.array | None  # None if only details of an input image were repainted
    model: StableDiffusion


def chosen_networks(request: Request) -> dict[str, Any]:
    """Return ``parts``, ``unet_bits`` and ``text_bits`` of a request, keywords of :class:`StableDiffusion`."""
    return {
        "parts": {name: source for name in NETWORKS if (source := getattr(request, name)) is not None},
        "unet_bits": request.unet_bits or (UNET_BITS if request.quantize else None),
        "text_bits": request.text_bits or (TEXT_BITS if request.quantize else None),
    }


def dtype_of(request: Request) -> mx.Dtype:
    """Return the type that a request is computed in. At half precision a CPU is slower than at float32."""
    return getattr(mx, request.dtype or ("float16" if mx.default_device() == mx.gpu else "float32"))


def open_model(request: Request, low_memory: bool = False, reads_prompts: bool = True) -> StableDiffusion:
    """Open the model of a request. Its refiner has to exist too, but is opened only when needed.

    Without ``reads_prompts`` it is an ``UnconditionalDiffusion``.

    Raises ValueError or OSError, one line, for a model that cannot be found, read or run.
    """
    if request.exact:  # MLX reads it at each convolution: no memory for Winograd
        os.environ["MLX_CONV_WINOGRAD_WORKING_SET"] = "1"
    dtype = dtype_of(request)
    if not reads_prompts:
        return UnconditionalDiffusion(request.model, dtype=dtype, revision=request.revision, low_memory=low_memory)
    if request.refiner:
        open_checkpoint(request.refiner, float16=dtype != mx.float32)
    model = StableDiffusion(
        request.model,
        dtype=dtype,
        revision=request.revision,
        tokenizer=request.tokenizer,
        prediction=request.prediction,
        loras=request.lora,
        lora_partial=request.lora_partial,
        low_memory=low_memory,
        **chosen_networks(request),
    )
    for embedding in request.embedding:
        model.load_embedding(*split_embedding(embedding))
    return model


@dataclass
class _Run:
    """Hold the state of a batch: its next pass, and its latents so far, None before the first step."""

    batch: Batch
    prepared: Latents | None = None
    latents: mx.array | None = None
    seconds: float = 0.0
    partial: str = ""


Begin = Callable[[_Run], Latents]  # of a pass


class Engine:
    """Generate the images of requests for one image each, which share their model and input files.

    The constructor does everything before the first step: it reads inputs, encodes prompts and chooses batches. So a
    mistake raises ValueError or OSError, one line, before anything is computed.

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
        self.model, self._resources, self._request = model, resources, requests[0]
        self._inputs = read_inputs(self._request) if inputs is None else inputs
        self._limit = memory.set_limits(resources.memory_limit, resources.low_memory)
        self._base, self._rows_at_once = model, model.rows_at_once
        self._loras: dict[str, AttachedLoRA] = {}
        self._runs: list[_Run] = []
        self._on_step: OnStep | None = None
        self._order: Iterable[int] | None = None
        self._stopped = False
        try:
            self._begin(requests)
        except BaseException:
            self.close()
            raise

    def _begin(self, requests: Sequence[Request]) -> None:
        """Load networks, encode prompts, choose batches and prepare their first pass."""
        model, resources = self.model, self._resources
        self._beside = load_beside(model, self._request, self._inputs)
        for line in remarks(dict.fromkeys(r.all_text for r in requests), model.embeddings):
            _log.warning("%s", line)
        named = {name: request for request in requests for name, _ in request.prompt_loras}
        for name, request in named.items():
            self._loras[name] = _attach(model, name, request)
        batches = [batch for images in group(model, requests) for batch in self._batches(images)]
        first, count = 0, len(batches)
        for i, batch in enumerate(batches, start=1):
            index, numbers = f"{i}/{count}" if count > 1 else "", range(first, first + len(batch.requests))
            self._runs.append(_Run(replace(batch, index=index, numbers=numbers)))
            first = numbers.stop
        shapes = [run_shape(model, batch) for batch in batches]
        largest = max(shapes, key=lambda shape: shape.n_images * shape.size[0] * shape.size[1])
        fits_at_once = memory.fit(model, largest, self._limit, resources.memory_limit is not None)
        # Where the networks of all stages fit into memory, each batch is decoded before the next begins.
        self._finishes_each = fits_at_once and (count > 1 or bool(self._request.detail)) and not model.low_memory
        for run in self._runs if not self._request.has_only_details else ():
            self._prepare(run, lambda run: first_pass(model, run.batch))

    def close(self) -> None:
        """Restore the model as it was before: detach LoRAs of prompts. A run that ends, or fails to begin, does it."""
        self._base.rows_at_once = self._rows_at_once
        while self._loras:
            self._loras.popitem()[1].detach()

    @property
    def batches(self) -> list[Batch]:
        """Return the batches in their order."""
        return [run.batch for run in self._runs]

    def _batches(self, requests: tuple[Request, ...]) -> Iterator[Batch]:
        """Prepare images of one setting, in batches of the chosen size or of one that fits the memory."""
        self._scale_loras(requests[0])  # prompts are encoded with them
        batch = prepare(self.model, requests, self._inputs, self._beside)
        most = self._resources.batch_size
        if most is None:
            most = memory.images_that_fit(self.model, run_shape(self.model, batch), self._limit)
        for first in range(0, len(requests), most):
            yield batch.part(slice(first, first + most))

    def _scale_loras(self, request: Request) -> None:
        for name, lora in self._loras.items():
            lora.scale = dict(request.prompt_loras).get(name, 0.0)

    def run(self, on_step: OnStep = lambda step: None, order: Iterable[int] | None = None) -> Iterator[Result]:
        """Generate the images in batches and yield each as soon as it is decoded.

        ``order`` gives the numbers of the batches to generate, each after the previous one is decoded; None is all of
        them. It cannot be combined with a refiner.

        When ``on_step`` returns True, the run stops and yields partial images of the batches that have begun. Raises
        FloatingPointError for values that are not finite even in float32. An engine runs once; the model can be used
        again afterwards.
        """
        if self._on_step is not None:
            raise ValueError("this engine has already run; create another one for the same model")
        self._on_step, self._order = on_step, order
        self.model.release(("unet", "autoencoder"))
        base, request, inputs = self.model, self._request, self._inputs
        try:
            for runs in [self._runs] if request.refiner else self._groups():
                if not request.has_only_details:
                    self._pass(runs, lambda run: first_pass(base, run.batch))
                if request.hires:
                    self._pass(runs, lambda run: hires_pass(base, run.batch, run.latents, inputs))
                if not request.refiner:
                    yield from self._decoded(runs)
            if request.refiner:
                if not self._stopped:
                    self._change_to_refiner()
                for runs in self._groups():
                    self._pass(runs, lambda run: refiner_pass(self.model, run.batch, run.latents))
                    yield from self._decoded(runs)
        finally:
            self.close()

    def _groups(self) -> Iterable[list[_Run]]:
        """Return the groups of runs to decode together: one group per run, or one of all."""
        if self._order is not None:
            return ([self._runs[number]] for number in self._order)
        return [[run] for run in self._runs] if self._finishes_each else [self._runs]

    def _drop_controls(self) -> None:
        """Free the ControlNets and IP-Adapters, which are not needed after the last step."""
        self._beside = dict.fromkeys(self._beside, ())
        for run in self._runs:
            run.batch = replace(run.batch, **self._beside)

    def _change_to_refiner(self) -> None:
        """Replace the model by the refiner, which shares only the autoencoder."""
        self._drop_controls()
        self.model.release()
        request, chosen = self._request, chosen_networks(self._request)
        chosen["parts"] = {name: source for name, source in chosen["parts"].items() if name == "vae"}
        chosen |= {"dtype": dtype_of(request), "low_memory": self.model.low_memory}
        refiner = StableDiffusion(request.refiner, **chosen)
        refiner.on_layer, self.model = self.model.on_layer, refiner
        batch = replace(self.batches[0], defaults=self.model.defaults)
        shape = replace(run_shape(self.model, batch), larger=None, encodes=False)
        self._finishes_each &= memory.fit(self.model, shape, self._limit, is_strict=False)

    def _prepare(self, run: _Run, begin: Begin) -> None:
        self._scale_loras(run.batch.request)
        run.prepared = begin(run)
        run.prepared.prepare()

    def _pass(self, runs: Sequence[_Run], begin: Begin) -> None:
        """Compute a pass of several runs; ``begin`` prepares it where needed."""
        for run in runs if not self._stopped else ():
            if run.prepared is None:
                self._prepare(run, begin)
        for run in runs:
            start, before = perf_counter(), run.latents
            if not self._stopped:
                self._scale_loras(run.batch.request)
                self._retrying(run, partial(self._steps, run, begin))
                run.seconds += perf_counter() - start
            if self._stopped and before is not None and run.latents is before:
                run.partial = run.partial or "the first pass"

    def _retrying(self, run: _Run, compute: Callable[[], None]) -> None:
        """Compute a pass; recompute it in float32 if it overflows, and with fewer rows at once if memory runs out."""
        while True:
            try:
                return self.model.retry_in_float32("unet", compute)
            except ConnectionError:  # lost another process that computes rows of the batch
                if self.model.group.rank() > 0:
                    raise
                self.model.group = None
                _log.warning("another Mac is lost: recomputing the image on this one alone")
                continue
            except (RuntimeError, MemoryError) as error:
                if self.model.group is not None:  # processes keep in step
                    raise
                is_full = isinstance(error, MemoryError) or re.search("alloc|memory", str(error), re.IGNORECASE)
                reason = " ".join(f"memory ran out ({str(error) or 'MemoryError'})".split())
                if not is_full or not self._run_fewer_rows(run.batch, 0.5, reason):
                    raise
            cpu.clear_cache()

    def _run_fewer_rows(self, batch: Batch, fraction: float, reason: str) -> bool:
        """Run only a fraction of the UNet's batch at once from now on; return whether it has several rows."""
        shape = run_shape(self.model, batch)
        rows = min(shape.rows * shape.n_images, self.model.rows_at_once or math.inf)
        if rows > 1:
            self.model.rows_at_once = max(1, int(rows * fraction))
            _log.warning(
                "%s: running the %d rows of the UNet's batch %d at a time", reason, rows, self.model.rows_at_once
            )
        return rows > 1

    def _steps(self, run: _Run, begin: Begin) -> None:
        """Compute the steps of a pass; a retry starts with the first one."""
        is_retry = run.prepared is None
        controls, prompts = self._beside.values()
        beside = [*(control.network for control in controls), *(prompt.adapter for prompt in prompts)]
        for network in beside if is_retry else ():
            network.set_dtype(self.model.dtype)
        # Only this variable refers to the pass, so its networks are freed when it is over.
        latents, run.prepared = begin(run) if is_retry else run.prepared, None
        total, later = latents.n_steps, sum(other.prepared.n_steps for other in self._runs if other.prepared)
        self._stopped = bool(self._on_step(Step(run.batch, 0, total, later, is_retry=is_retry)))
        if self._stopped:
            return
        allowed = max(mx.get_peak_memory(), self._limit)
        for number, x_t in enumerate(latents, start=1):
            self.model.check(x_t)
            if number == 1 and (peak := mx.get_peak_memory()) > allowed:
                weights = mx.get_active_memory()
                fraction = max(self._limit - weights, 0) / (peak - weights)
                reason = f"a step took {peak / 1e9:.2f} GB, the limit is {self._limit / 1e9:.2f} GB"
                self._run_fewer_rows(run.batch, fraction, reason)
            self._stopped = bool(self._on_step(Step(run.batch, number, total, later, latents.predicted)))
            if self._stopped and number < total:
                run.latents, run.partial = latents.predicted, f"step {number} of {total}"
                return
        run.latents = x_t

    def _decoded(self, runs: Sequence[_Run]) -> Iterator[Result]:
        """Decode the images of the runs that have begun. Free the UNet first, unless the next batch needs it."""
        if not self._finishes_each:
            if self._order is None:
                self._drop_controls()
            self.model.release(("autoencoder",))
        keeps = self._request.has_only_details and not self._stopped
        for run in (run for run in runs if keeps or run.latents is not None):
            for i, image in enumerate(self._images(run)):
                batch = run.batch
                image = self._detailed(run, i, image)
                upscaler = self._inputs.upscalers.get(batch.request.upscale)
                image = seamlessly(batch.request.options.seamless, enlarged)(self.model, image, upscaler)
                seconds = round(run.seconds / len(batch.requests), 3)
                yield Result(batch.requests[i], image, batch, i, seconds, run.partial, run.latents, self.model)

    def _images(self, run: _Run) -> Iterator[Image]:
        """Decode the images of a run; the kept area of an input image is copied unchanged."""
        canvas, size = run.batch.canvas, self._resources.decoding_batch_size
        if run.latents is None:
            yield from [canvas.image] * len(run.batch.requests)
            return
        parts = (run.latents[i : i + size] for i in range(0, len(run.latents), size))
        decode = seamlessly(run.batch.request.options.seamless, self.model.decode_checked)
        for pixels in chain.from_iterable(map(decode, parts)):
            image = from_array(pixels)
            yield image if canvas is None or run.batch.request.no_composite else canvas.paste(image)

    def _detailed(self, run: _Run, i: int, image: Image) -> Image:
        """Repaint each detail of a finished image, number ``i`` of its run."""
        masks = run.batch.details
        for number, mask in enumerate(masks, start=1):
            batch, name = detail_batch(self.model, run.batch, i, mask, image, self._inputs), f"detail {number}"
            part = _Run(replace(batch, index=", ".join(filter(None, (batch.index, name)))))
            self._pass([part], lambda part: first_pass(self.model, part.batch))
            run.seconds += part.seconds
            if part.latents is None or part.partial:
                run.partial = run.partial or f"{name} of {len(masks)}"
                break
            image = batch.canvas.paste(from_array(self.model.decode_checked(part.latents)[0]))
        return image


def _attach(model: StableDiffusion, name: str, request: Request) -> AttachedLoRA:
    if request.lora_dir is None:
        raise SettingError(f"the prompt names the LoRA {name}; give the folder of LoRAs: lora_dir DIR", "lora_dir")
    return model.load_lora(find_in(request.lora_dir, name), 0.0, partial=request.lora_partial)
