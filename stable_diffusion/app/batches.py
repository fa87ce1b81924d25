"""From requests to batches: the images that are generated together, their encoded prompts, sizes, inputs and passes."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, groupby
from typing import Any

import mlx.core as mx
from PIL.Image import Image, fromarray

from ..diffusion.choice import guidance_scale, is_cfg_pp
from ..diffusion.controls import Control
from ..diffusion.image_prompts import ImagePrompt
from ..diffusion.sample import Latents
from ..images.canny import canny
from ..images.image import fit, to_array
from ..images.inpaint import Canvas, make_canvas
from ..models.seamless import seamlessly
from ..options import SettingError
from ..pipeline import StableDiffusion
from ..planning import RunDefaults
from ..text.encode import Conditioning
from ..weights.load import size_in_bytes
from .detail import detail_masks
from .inputs import Inputs, depth_map, image_canvas, upscale
from .memory import RunShape
from .request import SIZES, Request

_log = logging.getLogger("stable_diffusion")

_NO_TEXTS_2 = {"prompt_2": None, "negative_prompt_2": None}


@dataclass(frozen=True)
class Batch:
    """Hold the images of one batch: requests of one image each, which differ only in prompt and seeds.

    ``size`` is (width, height) in pixels. ``text`` and ``negative_text`` are the encoded prompts: one for all images or
    one for each. ``defaults`` are those of the model with the LoRAs of these prompts. In image to image, ``canvas``
    holds the input image, and ``strength`` says how much it changes. ``details`` are masks of the areas to repaint in
    the finished images. ``detail_texts`` are the encoded prompts for these areas; None uses those of the images.
    """

    requests: tuple[Request, ...]
    size: tuple[int, int]
    text: Conditioning
    negative_text: Conditioning | str
    defaults: RunDefaults
    canvas: Canvas | None = None
    strength: float = 1.0
    depth: Any = None
    controls: tuple[Control, ...] = ()
    image_prompts: tuple[ImagePrompt, ...] = ()
    details: tuple[Image, ...] = ()
    detail_texts: tuple[Conditioning, Conditioning | str] | None = None
    index: str = ""  # "2/3", among several batches
    numbers: range = range(0)  # of its images, among those of all batches

    @property
    def request(self) -> Request:
        """Return a request with the settings that hold for all images."""
        return self.requests[0]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seed of each image."""
        return tuple(request.seed for request in self.requests)

    def part(self, part: slice) -> "Batch":
        """Return the batch of some of the images."""
        texts = [text.select(part) if len(text) > 1 else text for text in (self.text, self.negative_text)]
        return replace(self, requests=self.requests[part], text=texts[0], negative_text=texts[1])

    def after(self, steps: int) -> "Batch":
        """Return the batch for a later pass: prompt scheduling continues after ``steps``."""
        texts = [text if isinstance(text, str) else text.after(steps) for text in (self.text, self.negative_text)]
        return replace(self, text=texts[0], negative_text=texts[1])


def group(model: StableDiffusion, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
    """Group requests for one image each, in order, into those that can be generated together.

    The requests of a group differ only in prompt and seeds, and their prompts have the same number of chunks: padding
    a prompt to more chunks changes its image.
    """
    chunks: dict[tuple, int] = {}
    settings = []
    for request in requests:
        reading, texts = request.reading, request.texts
        key = (*texts, *reading.values())
        if key not in chunks:
            chunks[key] = max(model.count_chunks(*pair, **reading) for pair in (texts[::2], texts[1::2]))
        same = replace(request, prompt="", resolved_prompt=None, negative_prompt="", seed=0, variant=None)
        same = same.with_values(**_NO_TEXTS_2, variation_seed=None)
        present = tuple(None if text is None else bool(text) for text in texts[1:])
        settings.append((same, present, request.prompt_loras, chunks[key]))
    pairs = groupby(zip(settings, requests, strict=True), lambda pair: pair[0])
    return [tuple(request for _, request in images) for _, images in pairs]


def prepare(
    model: StableDiffusion, requests: tuple[Request, ...], inputs: Inputs, beside: Mapping[str, Sequence[Any]]
) -> Batch:
    """Encode the prompts of images of one setting and decide their size and inputs; see ``load_beside``.

    Raises ValueError for settings that the model does not support.
    """
    request = requests[0]
    height, width = (side * model.pixels_per_latent for side in model.default_latent_size)
    size, canvas, strength, depth = (request.width or width, request.height or height), None, 1.0, None
    if request.has_only_details:
        size = inputs.image.size
        canvas = Canvas(inputs.image, None, (0, 0, *size), size)
    elif inputs.image is not None:
        canvas = image_canvas(model, request, inputs)
        size, depth = canvas.size, depth_map(model, request, inputs, canvas)
        is_noise = request.expand or model.mode in ("masks", "instructions")
        strength = request.strength if request.strength is not None else 1.0 if is_noise else 0.9
        if request.refiner is not None:
            _check_refiner(model, request, strength)
    for remark in _unused_sizes(model, request):
        _log.warning(remark)
    texts = _encode(model, requests)
    batch = _steered(Batch(requests, size, *texts, model.defaults, canvas, strength, depth, **beside), inputs)
    return _with_details(model, batch, inputs) if request.detail else batch


def _steered(batch: Batch, inputs: Inputs) -> Batch:
    """Return a batch with its conditioning images, and the masks of its image prompts, in its size."""
    request, canvas = batch.request, batch.canvas

    def arrays(images: Sequence[Image], are_edges: bool = False) -> Iterator[mx.array]:
        for image in images:
            image = fit(image, *batch.size, request.resize) if canvas is None else canvas.crop(image, request.resize)
            image = fromarray(canny(image)).convert("RGB") if are_edges else image
            yield mx.array(to_array(image) / 2 + 0.5)

    images = cycle(arrays(inputs.control_images, request.canny))
    masks = cycle([mask[..., 0] for mask in arrays(inputs.image_prompt_masks)] or [None])
    controls = [replace(one, image=image) for one, image in zip(batch.controls, images, strict=False)]
    prompts = [replace(one, mask=mask) for one, mask in zip(batch.image_prompts, masks, strict=False)]
    return replace(batch, controls=tuple(controls), image_prompts=tuple(prompts))


def _with_details(model: StableDiffusion, batch: Batch, inputs: Inputs) -> Batch:
    """Find the areas of the finished images to repaint, and encode the prompt for them."""
    request, size, unit, texts = batch.request, batch.size, model.pixels_per_latent, None
    if request.hires:
        size = tuple(unit * round(side // unit * request.hires) for side in size)
    elif batch.canvas is not None and not request.no_composite:
        size = batch.canvas.image.size
    if request.detail_prompt is not None:
        texts = _encode(model, (replace(request, prompt=request.detail_prompt, resolved_prompt=None),))
    return replace(batch, details=tuple(detail_masks(request, inputs, size)), detail_texts=texts)


def _encode(model: StableDiffusion, requests: tuple[Request, ...]) -> tuple[Conditioning, Conditioning | str]:
    """Encode prompts and negative prompts: one for all images if they are equal, else one for each."""
    request = requests[0]
    options = request.options
    guidance, is_guided = _guidance(model.defaults, request)
    unused = {
        "the negative prompt": request.texts[1] or request.texts[3],
        "guidance_rescale": options.guidance_rescale,
        "guidance_interval": options.guidance_interval != (0, 1) and not options.pag_scale,
        **{name: model.is_xl and name.startswith("negative") for name in SIZES if name in request.to_dict()},
    }
    for name in (name for name, is_given in unused.items() if is_given and not is_guided):
        _log.warning("%s has no effect at a guidance scale of %g; it needs more than 1", name, guidance)
    rows = [image.texts for image in requests]
    columns = map(list, zip(*(rows[:1] if len(set(rows)) == 1 else rows), strict=True))
    texts, negatives, *seconds = (None if column[0] is None else column for column in columns)
    if not is_guided:
        return model.encode_prompt(texts, prompt_2=seconds[0], **request.reading), ""
    if not any(negatives) and not any(seconds[1] or ()):
        negatives, seconds[1] = "", None  # one empty text, which some models replace by zeros
    pair = {"prompt_2": seconds[0], "negative_prompt_2": seconds[1]}
    return model.encode_prompts(texts, negatives, **pair, **request.reading)


def _unused_sizes(model: StableDiffusion, request: Request) -> Iterator[str]:
    """Yield a line for each size and score of XL that neither the model nor its refiner reads."""
    for name in (name for name in SIZES if name in request.to_dict()):
        if not model.is_xl:
            yield f"{name} has no effect: {request.model} is not SDXL"
        elif "score" in name and not (model.scores_aesthetics or request.refiner):
            yield f"{name} has no effect: only SDXL's refiner reads it"
        elif "target" in name and model.scores_aesthetics:
            yield f"{name} has no effect: {request.model} reads aesthetic_score instead"


def _guidance(defaults: RunDefaults, request: Request) -> tuple[float, bool]:
    """Return the guidance scale of the images, and whether they have unconditional rows."""
    sampler = request.options.sampler or defaults.sampler
    scale = guidance_scale(sampler, request.cfg, defaults.cfg_weight)
    return scale, scale > 1 or is_cfg_pp(sampler)


def _check_refiner(model: StableDiffusion, request: Request, strength: float) -> None:
    count = partial(model.number_of_steps, request.steps, options=request.options)
    if count(strength) < count(denoising_start=request.refiner_start):
        text = f"strength {strength:g} starts after the refiner takes over at refiner_start"
        text += f" {request.refiner_start:g}; raise one of them"
        raise SettingError(text, "strength", "refiner_start")


def run_shape(model: StableDiffusion, batch: Batch) -> RunShape:
    """Return the sizes and counts that decide the memory of a batch."""
    request = batch.request
    height, width = (side // model.pixels_per_latent for side in reversed(batch.size))
    _, is_guided = _guidance(batch.defaults, request)
    adapters = {id(prompt.adapter): prompt.adapter for prompt in batch.image_prompts}.values()
    larger = model.default_latent_size if request.detail else None
    if request.hires:
        larger = round(height * request.hires), round(width * request.hires)
    return RunShape(
        len(batch.requests),
        (height, width),
        chunks=batch.text.context.shape[1] // 77,
        rows=(1 if not is_guided else 3 if model.mode == "instructions" else 2) + (request.options.pag_scale > 0),
        controls=[size_in_bytes(control.network) for control in batch.controls],
        adapters=[size_in_bytes(adapter) for adapter in adapters],
        image_encoder=max((adapter.encoder.size for adapter in adapters), default=0),
        larger=larger,
        encodes=bool(batch.canvas or request.detail or (request.hires and request.hires_upscaler != "latents")),
    )


# --- the passes of a batch -------------------------------------------------------------------------------------------


def first_pass(model: StableDiffusion, batch: Batch) -> Latents:
    """Begin the run of a batch; nothing is computed here."""
    request, unit, canvas = batch.request, model.pixels_per_latent, batch.canvas
    end = request.refiner_start if request.refiner else 1.0
    keywords = _keywords(batch, controls=batch.controls, image_prompts=batch.image_prompts, denoising_end=end)
    if canvas is None:
        # The method of the base class: models without prompts override it with fewer arguments.
        size = batch.size[1] // unit, batch.size[0] // unit
        return StableDiffusion.generate_latents(model, latent_size=size, **keywords)
    return model.generate_latents_from_image(
        canvas.crop(canvas.image),
        strength=batch.strength,
        mask=None if canvas.mask is None else canvas.crop(canvas.mask),
        depth=batch.depth,
        image_cfg_weight=request.image_cfg,
        **keywords,
    )


def hires_pass(model: StableDiffusion, batch: Batch, x: mx.array, inputs: Inputs) -> Latents:
    """Begin the second pass on the enlarged latents ``x`` of a first pass."""
    request, unit = batch.request, model.pixels_per_latent
    height, width = (round(side * request.hires) for side in x.shape[1:3])
    batch = batch.after(model.number_of_steps(request.steps, batch.strength, options=request.options))
    batch = _steered(replace(batch, size=(width * unit, height * unit), canvas=None), inputs)
    keywords = _keywords(batch, controls=batch.controls, image_prompts=batch.image_prompts)
    keywords["num_steps"] = request.steps if request.hires_steps is None else request.hires_steps
    method = request.hires_upscaler
    enlarge = seamlessly(request.options.seamless, upscale)
    larger = enlarge(model, x, (height, width), method, inputs.upscalers.get(method))
    return model.generate_latents_from_image(larger, strength=request.hires_strength, **keywords)


def detail_batch(model: StableDiffusion, batch: Batch, i: int, mask: Image, image: Image, inputs: Inputs) -> Batch:
    """Return the batch that repaints the area under ``mask`` in the finished ``image``, number ``i`` of a batch.

    The area is cropped with padding and enlarged to the model's training resolution.
    """
    request, native = batch.requests[i], max(model.default_latent_size) * model.pixels_per_latent
    canvas = make_canvas(image, mask, None, None, native, padding=request.detail_padding)
    depth = depth_map(model, request, replace(inputs, image=image), canvas)
    if batch.detail_texts is None:
        done = 0.0 if request.has_only_details else batch.strength
        batch = batch.after(model.number_of_steps(request.steps, done, options=request.options))
    else:
        batch = replace(batch, text=batch.detail_texts[0], negative_text=batch.detail_texts[1])
    one = replace(batch.part(slice(i, i + 1)), size=canvas.size, canvas=canvas, depth=depth)
    return replace(one, strength=request.detail_strength, controls=(), image_prompts=())


def refiner_pass(refiner: StableDiffusion, batch: Batch, x: mx.array) -> Latents:
    """Begin the run of the refiner from the latents ``x`` where the base model stopped."""
    has_two = "text_encoder_2" in refiner.sources
    requests = batch.requests if has_two else tuple(one.with_values(**_NO_TEXTS_2) for one in batch.requests)
    text, negative_text = _encode(refiner, requests)
    batch = replace(batch, text=text, negative_text=negative_text)
    keywords = _keywords(batch, denoising_start=batch.request.refiner_start, latents=x)
    return refiner.generate_latents(latent_size=x.shape[1:3], **keywords)


def _keywords(batch: Batch, **options: Any) -> dict[str, Any]:
    """Return the keywords of the methods that generate, with ``options`` instead of those of the request."""
    request = batch.request
    if request.options.variation_strength:
        options["variation_seed"] = [one.options.variation_seed for one in batch.requests]
    return {
        "text": batch.text,
        "negative_text": batch.negative_text,
        "n_images": len(batch.requests) if len(batch.text) == 1 else 1,
        "num_steps": request.steps,
        "cfg_weight": request.cfg,
        "seed": batch.seeds,
        "options": replace(request.options, **_NO_TEXTS_2, **options),  # the texts are encoded
    }
