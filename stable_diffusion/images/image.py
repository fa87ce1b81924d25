"""Turn images into arrays and back, choose their sizes, resize them and lay them out in a grid.

Inside the library an image is a PIL image of mode RGB or a float array [height, width, 3]; a mask is a PIL image of
mode L or a float array [height, width].
"""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image, ImageOps

from .files import BLACK, WHITE, Colour, read_if_path, to_rgb

MULTIPLE = 8  # pixels: the VAE halves sides three times
SMALLEST_SIDE = 64
_LARGEST_ASPECT = 32
_GAP = 8  # pixels between the images of a grid
_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP's training images
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def target_size(image_size: tuple[int, int], width: int | None, height: int | None, native: int) -> tuple[int, int]:
    """Return the size (width, height) in pixels at which to process an image of ``image_size`` (width, height).

    A missing ``width`` or ``height`` keeps the aspect ratio. Without both it is the image's size, but at least 64 on
    the short side and at most (2 * ``native``)^2 in area; an image too narrow for both limits changes its aspect ratio.
    Computed sides are multiples of 8.
    """
    if width is not None and height is not None:
        return width, height
    image_width, image_height = image_size
    if width is not None:
        return width, _other_side(width, image_height / image_width)
    if height is not None:
        return _other_side(height, image_width / image_height), height
    area = max(2 * native, SMALLEST_SIDE) ** 2
    scale = min(max(1, SMALLEST_SIDE / min(image_size)), math.sqrt(area / (image_width * image_height)))
    short, long = (_nearest(side * scale) for side in sorted(image_size))
    short, long = sorted((short, min(long, area // short // MULTIPLE * MULTIPLE)))
    return (short, long) if image_width <= image_height else (long, short)


def _other_side(side: int, ratio: float) -> int:
    return min(_nearest(side * ratio), max(SMALLEST_SIDE, side * _LARGEST_ASPECT))


def _nearest(side: float) -> int:
    return max(SMALLEST_SIDE, int(side / MULTIPLE + 0.5) * MULTIPLE)


def fit(
    image: Image.Image, width: int, height: int, mode: str = "crop", background: Colour | int = WHITE
) -> Image.Image:
    """Resize an image to exactly ``width`` x ``height`` pixels.

    RGB is resized with LANCZOS, L (a mask) linearly, without ringing; other modes become RGB. The mode "crop" fills the
    size and crops both sides equally; "pad" shows the complete image, centred on ``background``, a colour in its mode;
    "stretch" changes the aspect ratio.
    """
    if width < 1 or height < 1:
        raise ValueError(f"the size {width}x{height} is not positive")
    if image.mode not in ("RGB", "L"):
        image = to_rgb(image)
    resample = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS
    if mode == "stretch":
        return image.resize((width, height), resample)
    if mode == "crop":
        return ImageOps.fit(image, (width, height), resample)
    if mode == "pad":  # ImageOps.pad rounds the position of the image differently
        scale = min(width / image.width, height / image.height)
        inner = (min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale))))
        canvas = Image.new(image.mode, (width, height), background)
        canvas.paste(image.resize(inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return canvas
    raise ValueError(f"the fit {mode!r} is unknown; choose crop, pad or stretch")


def to_array(image: Image.Image) -> np.ndarray:
    """Convert an image to [H, W, 3] float32 in [-1, 1], the input of the VAE."""
    if image.mode != "RGB":
        image = to_rgb(image)
    return np.asarray(image, dtype=np.float32) / 255 * 2 - 1


def picture_of(image: Any) -> Image.Image:
    """Return an image, the path of one, or an array [H, W, 3] in [-1, 1] as a PIL image of mode RGB."""
    image = read_if_path(image)
    return to_rgb(image) if isinstance(image, Image.Image) else from_array(mx.array(image) / 2 + 0.5)


def clip_pixels(images: Any, size: int) -> mx.array:
    """Return one or several images as pixels [n, size, size, 3] for CLIP's image encoder, normalised as in training.

    Each is a path, a PIL image or an array [H, W, 3] in [-1, 1]. The short side is resized to ``size``, then the centre
    is cropped. Raises ValueError for an image that cannot be read, or is more than 32 times as long as wide.
    """
    several = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    return mx.array(np.stack([_for_clip(picture_of(image), size) for image in several]))


def _for_clip(image: Image.Image, size: int) -> np.ndarray:
    short, long = min(image.size), max(image.size)
    if long > _LARGEST_ASPECT * short:
        text = f"{image.width} x {image.height} pixels is too narrow for a square"
        raise ValueError(f"an image of {text}: crop it")
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
    return (pixels - _CLIP_MEAN) / _CLIP_STD


def pixels_of(image: Any, unit: int) -> mx.array:
    """Return an image as [H, W, 3] float32 in [-1, 1].

    ``image`` is a path, a PIL image or such an array. Raises ValueError unless its sides are multiples of ``unit``.
    """
    image = read_if_path(image)
    if image is None:
        raise ValueError("the image is missing; give a path, a PIL image or an array [H, W, 3]")
    pixels = mx.array(to_array(image) if isinstance(image, Image.Image) else image, dtype=mx.float32)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] % unit or pixels.shape[1] % unit:
        raise ValueError(f"image of shape {pixels.shape} must be [H, W, 3] with sides that are multiples of {unit}")
    return pixels


def mask_of(mask: Any, size: tuple[int, int]) -> mx.array:
    """Return a mask as [H, W] float32 in [0, 1].

    ``mask`` is a path, a PIL image, of which the brightness is used, or such an array. Raises ValueError unless it has
    the ``size`` (height, width).
    """
    mask = read_if_path(mask, BLACK)
    if isinstance(mask, Image.Image):
        mask = np.asarray(to_rgb(mask, BLACK).convert("L"), dtype=np.float32) / 255
    mask = mx.array(mask)
    if mask.shape != tuple(size):
        raise ValueError(f"mask of shape {mask.shape} must be {tuple(size)}, the size of the image")
    if not mx.all((mask >= 0) & (mask <= 1)):
        raise ValueError("the values of a mask must lie between 0 (keep) and 1 (repaint)")
    return mask.astype(mx.float32)


def from_array(array: Any) -> Image.Image:
    """Convert [H, W, 3] floats in [0, 1] (numpy, MLX or nested lists) to an RGB image, rounded and clipped.

    Raises ValueError for a wrong shape or type, and for values that are not finite, instead of drawing them black.
    """
    pixels = np.asarray(array)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"an image is an array [height, width, 3], not {list(pixels.shape)}")
    if pixels.dtype.kind != "f":
        raise ValueError(f"an image is an array of floats in [0, 1], not of {pixels.dtype}")
    bad = pixels.size - np.count_nonzero(np.isfinite(pixels))
    if bad:
        raise ValueError(f"{bad} of {pixels.size} values of the image are not finite; compute it in float32")
    levels = np.clip(pixels.astype(np.float32), 0, 1) * np.float32(255)
    return Image.fromarray(np.rint(levels).astype(np.uint8))


def to_images(pixels: Any) -> list[Image.Image]:
    """Convert decoded pixels [n, H, W, 3] in [0, 1] to RGB images, which notebooks can show; see :func:`from_array`."""
    return [from_array(array) for array in np.asarray(pixels)]


def grid(images: Sequence[Image.Image], rows: int) -> Image.Image:
    """Lay out images of one size from left to right and top to bottom, in ceil(n / rows) columns.

    There are 8 white pixels between images, and no border. Missing images of the last row are white, because black
    would look like a failed image. Raises ValueError for rows < 1, no images, or images of several sizes.
    """
    if rows < 1:
        raise ValueError(f"a grid of {rows} rows cannot be drawn; give at least 1")
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"a grid needs images of one size, not {sizes or 'no images'}")
    width, height = sizes[0]
    columns = math.ceil(len(images) / rows)
    rows = math.ceil(len(images) / columns)
    canvas = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), WHITE)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        canvas.paste(image, (column * (width + _GAP), row * (height + _GAP)))
    return canvas
