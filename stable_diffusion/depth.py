"""Depth for checkpoints that are told of it: estimated from the picture or read from a file, and as the UNet takes it.

A depth map is [height, width] float32 in any unit, larger where it is nearer (MiDaS's inverse depth).
"""

import os
import warnings
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from .image import from_array, open_image, to_array, to_rgb
from .models.dpt import DPTForDepthEstimation
from .models.layers import resample
from .weights.files import Component, open_part
from .weights.load import load_component

_BLACK = (0, 0, 0)


def load_depth_estimator(
    source: str | os.PathLike | Component, *, float16: bool = False, revision: str | None = None
) -> DPTForDepthEstimation:
    """The depth estimator of a checkpoint, in float32: it runs once, and half precision would blur its maps.

    Args:
        source: a folder, Hub id or alias, with the files in its root or in a folder `depth_estimator`; or a component.
        float16: prefer the weight file of half the size.
        revision: a branch, tag or commit of the Hub repository.

    Raises ValueError and OSError for what `open_part` does not find, for a config that this library cannot compute and
    for weights that do not fit it.
    """
    if not isinstance(source, Component):
        source = open_part(source, "depth_estimator", float16=float16, revision=revision)
    return load_component(source, mx.float32)


def estimate_depth(model: DPTForDepthEstimation, image: Any) -> mx.array:
    """The depth map [S, S] of a picture, S being the estimator's own size (384), whatever the picture's aspect ratio.

    Args:
        image: a PIL image, or an array [H, W, 3] in [-1, 1].

    The picture is resized as the feature extractor of the published checkpoints does it: 8-bit, bilinear. The map is
    computed here and now, so that the estimator can be dropped before the UNet needs its memory.
    """
    picture = to_rgb(image) if isinstance(image, Image.Image) else from_array(mx.array(image) / 2 + 0.5)
    side = model.config.image_size
    pixels = mx.array(to_array(picture.resize((side, side), Image.Resampling.BILINEAR)))
    depth = model(pixels[None])[0].astype(mx.float32)
    mx.eval(depth)
    return depth


def read_depth(path: str | os.PathLike) -> np.ndarray:
    """A depth map [H, W] float32 from a picture in shades of grey, lighter where it is nearer; 16 bits are kept.

    Three equal channels are grey too, and what is transparent is farthest. Raises ValueError, one line with the path
    and the remedy, for a picture that cannot be read, is coloured, or is the same everywhere.
    """
    picture = np.asarray(open_image(path, _BLACK))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what open_image did not mind
        with Image.open(path) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                picture = np.asarray(ImageOps.exif_transpose(image))[..., None]
    values = picture[..., 0].astype(np.float32)
    if (picture != picture[..., :1]).any():
        raise ValueError(f"{path} is a picture in colour; a depth map is grey, lighter where it is nearer")
    if values.min() == values.max():
        raise ValueError(f"the depth map {path} is {values.max():g} everywhere; give one that tells near from far")
    return values


def depth_latents(depth: Any, size: tuple[int, int]) -> mx.array:
    """A depth map [H, W] -> the UNet's fifth channel [1, h, w, 1], from -1 where it is farthest to 1.

    ``size`` is (h, w), that of the latents. A map of another aspect ratio is stretched. It is resized first (bicubic,
    without smoothing) and normalised then, as diffusers does it. Raises ValueError for a map that is not [H, W], not
    finite, or the same everywhere.
    """
    values = mx.array(depth, dtype=mx.float32)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"a depth map is an array [height, width], not {list(values.shape)}")
    if bad := values.size - mx.isfinite(values).sum().item():
        raise ValueError(f"{bad} of {values.size} values of the depth map are not finite; give a map without them")
    small = resample(values[None, :, :, None], size, cubic=True)
    low, high = small.min(), small.max()
    if not (high > low).item():
        raise ValueError("the depth map is the same everywhere; give one that tells near from far")
    return 2 * (small - low) / (high - low) - 1
