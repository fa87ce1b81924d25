"""The input images of a request: read and checked before any model, then fitted to the size of the run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle
from typing import Any

import mlx.core as mx
from PIL.Image import Image

from ..diffusion.controls import Control
from ..diffusion.image_prompts import ImagePrompt, read_scales
from ..images.depth import crop_depth, read_depth
from ..images.files import BLACK, open_image
from ..images.image import fit, from_array, to_array
from ..images.inpaint import EMPTY_MASK, Canvas, add_borders, adjust_mask, make_canvas, read_mask
from ..models.resample import resample
from ..options import SettingError
from ..pipeline import StableDiffusion
from ..upscaling import Upscaler, load_upscaler
from .beside import settings_of_networks
from .request import Request

_log = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class Inputs:
    """Hold the input images of a request, and its upscaler networks."""

    image: Image | None = None
    mask: Image | None = None
    control_images: Sequence[Image] = ()
    depth: Any = None
    upscalers: Mapping[str, Upscaler] = field(default_factory=dict)  # by their files
    image_prompts: Sequence[Sequence[Image]] = ()  # the pictures of each
    image_prompt_masks: Sequence[Image] = ()


def read_inputs(request: Request) -> Inputs:
    """Read the images of a request. Raises ValueError or OSError, one line, for unusable images."""
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
            if "mask" not in request.detail:  # refused later, when its parts are searched
                _log.warning("the mask is black everywhere: the image stays unchanged")
    upscalers = {source: load_upscaler(source) for source in request.upscalers}
    images = [open_image(path) for path in request.control_image]
    prompts = [[open_image(path) for path in paths] for paths in request.ip_image]
    masks = [open_image(path, BLACK).convert("L").convert("RGB") for path in request.ip_mask]
    return Inputs(image, mask, images, depth, upscalers, prompts, masks)


def image_canvas(model: StableDiffusion, request: Request, inputs: Inputs) -> Canvas:
    """Choose the area of the image to process, and its size. Raises ValueError for inputs that the model cannot use."""
    if request.depth is not None and model.mode != "depth":
        raise SettingError(f"depth has no effect: {request.model} does not read depth maps", "depth")
    if request.image_cfg is not None and model.mode != "instructions":
        raise SettingError(f"image_cfg has no effect: {request.model} is not a model for instructions", "image_cfg")
    native = max(model.default_latent_size) * model.pixels_per_latent
    size, mask = (request.width, request.height), None if "mask" in request.detail else inputs.mask
    result = make_canvas(inputs.image, mask, *size, native, resize=request.resize, padding=request.mask_padding)
    if result.size != inputs.image.size:
        _log.info("the image of %dx%d is processed at %dx%d", *inputs.image.size, *result.size)
    return result


def depth_map(model: StableDiffusion, request: Request, inputs: Inputs, canvas: Canvas) -> Any:
    """Return the depth map of the processed area, from a file or estimated; None for models without depth."""
    if model.mode != "depth":
        return None
    if inputs.depth is not None:
        return crop_depth(inputs.depth, inputs.image.size, canvas, request.resize)
    try:
        return model.estimate_depth(canvas.crop(canvas.image))
    except (ValueError, OSError) as error:
        raise SettingError(f"{error}; give a depth map: depth FILE", "depth") from error


def load_beside(model: StableDiffusion, request: Request, inputs: Inputs) -> dict[str, tuple[Any, ...]]:
    """Load the ControlNets and IP-Adapters of a request, each once: the options ``controls`` and ``image_prompts``.

    Image prompts are encoded, then the image encoders are freed. Control images and masks are added when the size of a
    run is known.
    """
    load, load_adapter = cache(model.load_controlnet), cache(model.load_ip_adapter)
    networks = [(load(source), settings) for source, settings in settings_of_networks(request, "controlnet")]
    has_union, controls, prompts = any("task_embedding" in network for network, _ in networks), [], []
    for network, settings in networks:
        if has_union and "task_embedding" not in network:  # only a union ControlNet reads a type
            settings["kind"] = None
        controls.append(Control(network, guess=request.guess_mode, **settings | {"image": None}))
    adapters = [(load_adapter(source), settings) for source, settings in settings_of_networks(request, "ip_adapter")]
    for (adapter, settings), pictures in zip(adapters, cycle(inputs.image_prompts), strict=False):
        scales = read_scales(settings["scales"]) if "scales" in settings else None
        prompt = ImagePrompt(adapter, **settings | {"image": pictures, "mask": None, "scales": scales})
        prompts.append(prompt.encoded(model.encode_image_prompt))
    for adapter, _ in adapters:
        adapter.encoder.network = None
    return {"controls": tuple(controls), "image_prompts": tuple(prompts)}


def enlarged(model: StableDiffusion, image: Image, network: Upscaler | None) -> Image:
    """Return an image enlarged by a network, within the memory that the model leaves free; unchanged without one."""
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
