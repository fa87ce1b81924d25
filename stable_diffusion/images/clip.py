"""Make pictures the input of CLIP's image encoder."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from .image import picture_of

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of the pictures that CLIP was trained on
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_LARGEST_ASPECT = 32


def clip_pixels(images: Any, size: int) -> mx.array:
    """Return one or several pictures as pixels [n, size, size, 3], normalised as in CLIP's training.

    Each is a path, a PIL image or an array [H, W, 3] in [-1, 1]. The short side is resized to ``size``, and the middle
    is taken. Raises ValueError for a picture that cannot be read, or is more than 32 times as long as wide.
    """
    several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    return mx.array(np.stack([_normalised(picture_of(image), size) for image in several]))


def _normalised(image: Image.Image, size: int) -> np.ndarray:
    short, long = min(image.size), max(image.size)
    if long > _LARGEST_ASPECT * short:
        text = f"{image.width} x {image.height} pixels is too narrow to be seen as a square"
        raise ValueError(f"a picture of {text}: cut out a part of it")
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return (pixels - _MEAN) / _STD
