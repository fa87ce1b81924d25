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

_BLACK = (0, 0, 0)


def estimate_depth(model: Any, image: Any) -> mx.array:
    """The depth map [S, S] of a picture, S being the estimator's own size (384), whatever the picture's aspect ratio.

    Args:
        model: a :class:`stable_diffusion.models.dpt.DPTForDepthEstimation`.
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
