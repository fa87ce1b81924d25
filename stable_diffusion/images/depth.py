"""Estimate or read depth maps for depth checkpoints, and crop them to the processed area.

A depth map is [height, width] float32 in any unit, larger for nearer objects (MiDaS's inverse depth).
"""

import os
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from .files import BLACK, is_deep_grey, opened, to_rgb
from .image import picture_of, to_array
from .inpaint import Canvas


def estimate_depth(model: Any, image: Any) -> mx.array:
    """Estimate the depth map [S, S] of an image by a DPT; S is the estimator's size (384), for any aspect ratio.

    ``image`` is a path, a PIL image, or an array [H, W, 3] in [-1, 1]. It is resized as by the feature extractor of the
    published checkpoints: 8-bit, bilinear. The map is evaluated here, so that the estimator can be freed.
    """
    side = model.config.image_size
    pixels = mx.array(to_array(picture_of(image).resize((side, side), Image.Resampling.BILINEAR)))
    depth = model(pixels[None])[0].astype(mx.float32)
    mx.eval(depth)
    return depth


def read_depth(path: str | os.PathLike) -> np.ndarray:
    """Read a depth map [H, W] float32 from a grey image, lighter where it is nearer. 16 bits are kept.

    Three equal channels are grey too, and transparent parts are farthest. Raises ValueError, one line with the path and
    the remedy, for an image that cannot be read, is coloured, or has only one level.
    """
    with opened(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        levels = np.asarray(to_rgb(image, BLACK))
        if is_deep_grey(image):
            levels = np.asarray(image)[..., None]
    depth = levels[..., 0].astype(np.float32)
    if (levels != levels[..., :1]).any():
        raise ValueError(f"{path} is a colour image; a depth map is grey, lighter where it is nearer")
    if depth.min() == depth.max():
        raise ValueError(f"the depth map {path} is {depth.max():g} everywhere; give one with near and far areas")
    return depth


def crop_depth(depth: Any, image_size: tuple[int, int], canvas: Canvas, resize: str) -> Any:
    """Return the part of an image's depth map [H, W] that shows the canvas's box; its border values continue outside.

    ``image_size`` is (width, height) of the image before ``resize``, a mode of ``fit``, was applied.
    """
    scales = [side / original for side, original in zip(canvas.image.size, image_size, strict=True)]
    scales = {"crop": [max(scales)] * 2, "pad": [min(scales)] * 2}.get(resize, scales)
    indices = []
    for axis, scale in enumerate(scales):
        side, original, count = canvas.image.size[axis], image_size[axis], depth.shape[1 - axis]
        # The canvas and the image have the same centre.
        start, end = (
            round(((edge - side / 2) / scale + original / 2) * count / original) for edge in canvas.box[axis::2]
        )
        indices.append([min(max(i, 0), count - 1) for i in range(start, max(end, start + 1))])
    columns, rows = indices
    return depth[rows][:, columns]
