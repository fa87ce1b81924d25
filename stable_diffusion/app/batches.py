"""From requests to batches: which images are generated together, their encoded prompts, sizes and inputs."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import mlx.core as mx

from ..diffusion.controls import Control
from ..diffusion.sample import Latents
from ..images.inpaint import Canvas
from ..lora.files import find_in
from ..lora.layers import AttachedLoRA
from ..models.controlnet import ControlNetModel, T2IAdapter
from ..options import SettingError
from ..pipeline import StableDiffusion
from ..text.encode import Conditioning
from .inputs import Inputs, controls, depth_map, image_canvas, upscale
from .memory import RunShape
from .request import Request

_log = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class Setup:
    """Hold what all images of one setting share: their size (width, height), canvas, strength and controls."""

    size: tuple[int, int]
    canvas: Canvas | None = None
    strength: float = 1.0
    depth: Any = None
    controls: tuple[Control, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Hold images that are generated together: requests of one image each, which differ in prompt and seed alone.

    ``text`` and ``negative_text`` are the encoded prompts, one for all images or one for each.
    """

    requests: tuple[Request, ...]
    setup: Setup
    text: Conditioning
    negative_text: Conditioning | str
    index: str = ""  # "2/3", among several batches

    @property
    def request(self) -> Request:
        """Return a request with the settings that hold for all images."""
        return self.requests[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seed of each image."""
        return tuple(request.seed for request in self.requests)

    def conditioning(self) -> list[mx.array]:
        """Return the arrays of the encoded prompts."""
        tables = [t for t in (self.text, self.negative_text) if isinstance(t, Conditioning)]
        return [array for table in tables for array in table.arrays().values()]

    def split(self, most: int) -> "Iterator[Batch]":
        """Yield the images in batches of at most ``most``."""
        for i in range(0, len(self.requests), most):
            part = slice(i, i + most)
            texts = [t.select(part) if len(t) > 1 else t for t in (self.text, self.negative_text)]
            yield replace(self, requests=self.requests[part], text=texts[0], negative_text=texts[1])


@dataclass
class PromptLoRAs:
    """Hold the LoRAs that prompts name, attached to a model; each has an effect in the batches that name it."""

    attached: dict[str, AttachedLoRA] = field(default_factory=dict)

    @classmethod
    def attach(cls, model: StableDiffusion, requests: Sequence[Request]) -> "PromptLoRAs":
        """Attach the LoRAs of all prompts, without effect yet. ValueError for a name without a file."""
        folders = {name: request for request in requests for name, _ in request.prompt_loras}
        attached = {}
        for name, request in folders.items():
            if request.lora_dir is None:
                text = f"the prompt asks for the LoRA {name}; say where LoRAs are: lora_dir DIR"
                raise SettingError(text, "lora_dir")
            path = find_in(request.lora_dir, name)
            attached[name] = model.load_lora(path, 0.0, partial=request.lora_partial)
        return cls(attached)

    def apply(self, request: Request) -> None:
        """Give the LoRAs the scales that a prompt asks for."""
        scales = dict(request.prompt_loras)
        for name, lora in self.attached.items():
            lora.scale = scales.get(name, 0.0)

    def detach(self) -> None:
        """Remove the LoRAs from the model."""
        for lora in self.attached.values():
            lora.detach()
        self.attached = {}


def group(model: StableDiffusion, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
    """Group requests for one image each, in order, into those that can be generated together.

    They differ in prompt and seed alone, and their prompts have the same number of chunks: a prompt that is padded to
    another's length gives another image.
    """
    counts: dict[tuple, int] = {}

    def chunks(request: Request) -> int:
        key = (request.text, request.negative_prompt, *request.reading.values())
        if key not in counts:
            texts = (request.text, request.negative_prompt)
            counts[key] = max(model.count_chunks(text, **request.reading) for text in texts)
        return counts[key]

    def settings(request: Request) -> tuple:
        same = replace(request, prompt="", resolved_prompt=None, negative_prompt="", seed=0, variant=None)
        return same, bool(request.negative_prompt), request.prompt_loras, chunks(request)

    return [tuple(images) for _, images in groupby(requests, settings)]


def prepare(
    model: StableDiffusion,
    requests: tuple[Request, ...],
    inputs: Inputs,
    networks: Sequence[ControlNetModel | T2IAdapter],
    loras: PromptLoRAs,
) -> Batch:
    """Encode the prompts of images of one setting and decide their size and inputs.

    Raises ValueError for settings that do not go together with the model.
    """
    request = requests[0]
    loras.apply(request)  # prompts are encoded with them
    height, width = (side * model.pixels_per_latent for side in model.default_latent_size)
    if inputs.image is None:
        size = (request.width or width, request.height or height)
        setup = Setup(size, controls=controls(request, networks, inputs, size))
    else:
        place = image_canvas(model, request, inputs)
        is_noise = request.expand or model.mode in ("masks", "instructions")
        strength = request.strength if request.strength is not None else 1.0 if is_noise else 0.9
        steered = controls(request, networks, inputs, place.size, place)
        setup = Setup(place.size, place, strength, depth_map(model, request, inputs, place), steered)
        _check_refiner(model, request, strength)
    return Batch(requests, setup, *_encode(model, requests))


def _encode(model: StableDiffusion, requests: tuple[Request, ...]) -> tuple[Conditioning, Conditioning | str]:
    """Encode prompts and negative prompts: one for all images where they are the same, or one for each."""
    request = requests[0]
    guidance = model.defaults.cfg_weight if request.cfg is None else request.cfg
    if request.negative_prompt and guidance <= 1:
        _log.warning("the negative prompt has no effect at a guidance scale of %g; it needs more than 1", guidance)
    pairs = [(image.text, image.negative_prompt) for image in requests]
    texts, negatives = map(list, zip(*(pairs[:1] if len(set(pairs)) == 1 else pairs), strict=True))
    if guidance <= 1:
        return model.encode_prompt(texts, **request.reading), ""
    return model.encode_prompts(texts, negatives if any(negatives) else "", **request.reading)


def _check_refiner(model: StableDiffusion, request: Request, strength: float) -> None:
    if request.refiner is None:
        return
    keywords = {"sampler": request.options.sampler, "schedule": request.options.schedule}
    last_steps = model.number_of_steps(request.steps, denoising_start=request.refiner_start, **keywords)
    if model.number_of_steps(request.steps, strength, **keywords) < last_steps:
        raise SettingError(
            f"strength {strength:g} begins with less noise than the refiner at refiner_start "
            f"{request.refiner_start:g}; raise one of them",
            "strength",
            "refiner_start",
        )


def run_shape(model: StableDiffusion, batch: Batch) -> RunShape:
    """Describe what a batch needs memory for."""
    request = batch.request
    height, width = (side // model.pixels_per_latent for side in reversed(batch.setup.size))
    guidance = model.defaults.cfg_weight if request.cfg is None else request.cfg
    larger = None
    if request.hires:
        larger = (round(height * request.hires), round(width * request.hires))
    return RunShape(
        len(batch.requests),
        (height, width),
        chunks=batch.text.context.shape[1] // 77,
        rows=1 if guidance <= 1 else 3 if model.mode == "instructions" else 2,
        networks=[control.network for control in batch.setup.controls],
        larger=larger,
        encodes=batch.setup.canvas is not None or (larger is not None and request.hires_upscaler == "pixels"),
    )


# --- the passes of a batch -------------------------------------------------------------------------------------------


def first_pass(model: StableDiffusion, batch: Batch) -> Latents:
    """Begin the run of a batch; nothing is computed here."""
    request, setup = batch.request, batch.setup
    end = request.refiner_start if request.refiner else 1.0
    keywords = _keywords(batch) | {"options": replace(request.options, controls=setup.controls, denoising_end=end)}
    if setup.canvas is None:
        unit = model.pixels_per_latent
        size = (setup.size[1] // unit, setup.size[0] // unit)
        return model.generate_latents(latent_size=size, **keywords)
    place = setup.canvas
    return model.generate_latents_from_image(
        place.crop(place.image),
        strength=setup.strength,
        mask=None if place.mask is None else place.crop(place.mask),
        depth=setup.depth,
        image_cfg_weight=request.image_cfg,
        **keywords,
    )


def hires_pass(
    model: StableDiffusion,
    batch: Batch,
    x: mx.array,
    inputs: Inputs,
    networks: Sequence[ControlNetModel | T2IAdapter],
) -> Latents:
    """Begin the run that works again on the enlarged latents ``x`` of a first pass."""
    request, unit = batch.request, model.pixels_per_latent
    height, width = (max(1, round(side * request.hires)) for side in x.shape[1:3])
    steered = controls(request, networks, inputs, (width * unit, height * unit))
    keywords = _keywords(batch) | {"options": replace(request.options, controls=steered)}
    keywords["num_steps"] = request.steps if request.hires_steps is None else request.hires_steps
    larger = upscale(model, x, (height, width), request.hires_upscaler)
    return model.generate_latents_from_image(larger, strength=request.hires_strength, **keywords)


def refiner_pass(refiner: StableDiffusion, batch: Batch, x: mx.array) -> Latents:
    """Begin the run of the refiner from the latents ``x`` where the base has stopped."""
    request = batch.request
    text, negative_text = _encode(refiner, batch.requests)
    options = replace(request.options, denoising_start=request.refiner_start, latents=x)
    keywords = _keywords(replace(batch, text=text, negative_text=negative_text)) | {"options": options}
    return refiner.generate_latents(latent_size=x.shape[1:3], **keywords)


def _keywords(batch: Batch) -> dict[str, Any]:
    request = batch.request
    return {
        "text": batch.text,
        "negative_text": batch.negative_text,
        "n_images": len(batch.requests) if len(batch.text) == 1 else 1,
        "num_steps": request.steps,
        "cfg_weight": request.cfg,
        "seed": batch.seeds,
    }
