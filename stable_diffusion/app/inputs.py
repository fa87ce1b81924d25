"""The images that a request works from: read and checked before any model, then fitted to the size of the run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import mlx.core as mx
from PIL.Image import Image, fromarray

from ..diffusion.controls import Control
from ..diffusion.image_prompts import ImagePrompt, read_scales
from ..images.canny import canny
from ..images.depth import crop_depth, read_depth
from ..images.files import BLACK, open_image
from ..images.image import fit, from_array, to_array
from ..images.inpaint import EMPTY_MASK, Canvas, add_borders, adjust_mask, make_canvas, read_mask
from ..models.lllite import ControlNetwork
from ..models.resample import resample
from ..options import SettingError
from ..pipeline import StableDiffusion
from ..upscaling import Upscaler, load_upscaler
from .request import Request

_log = logging.getLogger("stable_diffusion")

ControlNets = Sequence[ControlNetwork]


@dataclass(frozen=True)
class Inputs:
    """Hold the images that a request names, and the networks that enlarge its own."""

    image: Image | None = None
    mask: Image | None = None
    control_images: Sequence[Image] = ()
    depth: Any = None
    upscaler: Upscaler | None = None
    hires_upscaler: Upscaler | None = None
    image_prompts: Sequence[Sequence[Image]] = ()  # the pictures of each
    image_prompt_masks: Sequence[Image] = ()


def read_inputs(request: Request) -> Inputs:
    """Read the images of a request. Raises ValueError or OSError, one line, for what cannot be used."""
    image = mask = depth = None
    if request.image is not None:
        image = open_image(request.image)
        if request.mask is not None:
            mask = adjust_mask(read_mask(request.mask, image.size), invert=request.invert_mask)
        if request.expand:
            image, mask = add_borders(image, mask, request.expand)
        mask = None if mask is None else adjust_mask(mask, blur=request.mask_blur)
        depth = None if request.depth is None else read_depth(request.depth)
        if mask is not None and mask.getbbox() is None:
            if request.mask_padding is not None:
                raise ValueError(EMPTY_MASK)
            if "mask" not in request.detail:  # which is refused when its parts are looked for
                _log.warning("the mask is black everywhere: the image is kept as it is")
    networks = {source: load_upscaler(source) for source in request.upscalers}
    images = [open_image(path) for path in request.control_image]
    upscalers = networks.get(request.upscale), networks.get(request.hires_upscaler)
    prompts = [[open_image(path) for path in paths] for paths in request.ip_image]
    masks = [open_image(path, BLACK).convert("L").convert("RGB") for path in request.ip_mask]
    return Inputs(image, mask, images, depth, *upscalers, prompts, masks)


def image_canvas(model: StableDiffusion, request: Request, inputs: Inputs) -> Canvas:
    """Decide which part of the image is worked on, and at what size. ValueError for what the model cannot use."""
    if request.depth is not None and model.mode != "depth":
        raise SettingError(f"depth has no effect: {request.model} was not made for depth maps", "depth")
    if request.image_cfg is not None and model.mode != "instructions":
        raise SettingError(f"image_cfg has no effect: {request.model} was not made for instructions", "image_cfg")
    native = max(model.default_latent_size) * model.pixels_per_latent
    size, mask = (request.width, request.height), None if "mask" in request.detail else inputs.mask
    result = make_canvas(inputs.image, mask, *size, native, resize=request.resize, padding=request.mask_padding)
    if result.size != inputs.image.size:
        _log.info("the image of %dx%d is worked on at %dx%d", *inputs.image.size, *result.size)
    return result


def depth_map(model: StableDiffusion, request: Request, inputs: Inputs, canvas: Canvas) -> Any:
    """Return the depth map of what is worked on, given or estimated; None for models without depth."""
    if model.mode != "depth":
        return None
    if inputs.depth is not None:
        return crop_depth(inputs.depth, inputs.image.size, canvas, request.resize)
    try:
        return model.estimate_depth(canvas.crop(canvas.image))
    except (ValueError, OSError) as error:
        raise SettingError(f"{error}; give a depth map: depth FILE", "depth") from error


def controls(
    request: Request, networks: ControlNets, inputs: Inputs, size: tuple[int, int], canvas: Canvas | None = None
) -> tuple[Control, ...]:
    """Return the controls of a run at ``size`` (width, height): each network with its conditioning image."""
    images = []
    for image in inputs.control_images:
        image = fit(image, *size, mode=request.resize) if canvas is None else canvas.crop(image, mode=request.resize)
        image = fromarray(canny(image)).convert("RGB") if request.canny else image
        images.append(mx.array(to_array(image) / 2 + 0.5))
    # Of each there is one for each network, or one for all.
    scales = [scale for _, scale in request.controlnet]
    starts, ends = cycle(request.control_start or (0.0,)), cycle(request.control_end or (1.0,))
    unions = ["task_embedding" in network for network in networks]
    kinds = cycle(request.control_type or (None,))
    if any(unions):  # a type says nothing to the networks beside
        kinds = (kind if is_union else None for kind, is_union in zip(kinds, unions, strict=False))
    settings = zip(networks, cycle(images), scales, starts, ends, cycle([request.guess_mode]), kinds, strict=False)
    return tuple(Control(*setting) for setting in settings)


def encode_image_prompts(model: StableDiffusion, request: Request, inputs: Inputs) -> list[ImagePrompt]:
    """Read the IP-Adapters of a request, each once, and encode their pictures; image encoders are freed."""
    if not request.ip_adapter:
        return []
    adapters = {path: model.load_ip_adapter(path) for path in dict.fromkeys(path for path, _ in request.ip_adapter)}
    # Of each there is one for each adapter, or one for all.
    starts, ends = cycle(request.ip_start or (0.0,)), cycle(request.ip_end or (1.0,))
    scales = cycle([read_scales(text) for text in request.ip_blocks] or [None])
    settings = zip(request.ip_adapter, cycle(inputs.image_prompts), starts, ends, scales, strict=False)
    prompts = [
        ImagePrompt(adapters[path], images, scale, start, end, scales=of_parts).encoded(model.encode_image_prompt)
        for (path, scale), images, start, end, of_parts in settings
    ]
    for adapter in adapters.values():
        adapter.encoder.network = None
    return prompts


def image_prompts(
    prompts: Sequence[ImagePrompt],
    request: Request,
    inputs: Inputs,
    size: tuple[int, int],
    canvas: Canvas | None = None,
) -> tuple[ImagePrompt, ...]:
    """Return image prompts with the masks of a run at ``size`` (width, height)."""
    masks: list[mx.array | None] = []
    for mask in inputs.image_prompt_masks:
        mask = fit(mask, *size, mode=request.resize) if canvas is None else canvas.crop(mask, mode=request.resize)
        masks.append(mx.array(to_array(mask))[..., 0] / 2 + 0.5)
    return tuple(replace(prompt, mask=mask) for prompt, mask in zip(prompts, cycle(masks or [None]), strict=False))


def enlarged(model: StableDiffusion, image: Image, network: Upscaler | None) -> Image:
    """Return an image enlarged by a network, in the memory that the model leaves; itself without one."""
    if network is None:
        return image
    limit = model.memory_limit
    return network(image, None if limit is None else max(limit - mx.get_active_memory(), 0.0))


def upscale(
    model: StableDiffusion, x: mx.array, size: tuple[int, int], method: str, network: Upscaler | None = None
) -> mx.array:
    """Enlarge latents [n, h, w, 4] to ``size`` (height, width): interpolated "latents", or decoded.

    Decoded pixels are enlarged by the ``network`` if there is one, and resized.
    """
    if method == "latents":
        return x if x.shape[1:3] == tuple(size) else resample(x, size)
    height, width = (model.pixels_per_latent * side for side in size)
    decoded = (from_array(model.decode_checked(latents[None])[0]) for latents in x)
    images = [fit(enlarged(model, image, network), width, height) for image in decoded]
    return mx.concatenate([model.encode(mx.array(to_array(image))[None]) for image in images])
