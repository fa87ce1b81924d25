"""Prepare an image for inpainting and put the result back: masks, borders and crops.

All images here are 8-bit PIL images: RGB images, and masks of mode L. White areas (255) are repainted, black areas (0)
are kept, grey is blended.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from .files import BLACK, open_image
from .image import MULTIPLE, SMALLEST_SIDE, fit, target_size

_CELL = 8  # pixels of the grid that separates parts of a mask
_LARGEST_DIFFERENCE = 0.02  # between the aspect ratios of an image and its mask

EMPTY_MASK = "the mask is black everywhere, so no area can be cropped; omit the padding"

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Canvas:
    """Hold an image and its ``box`` that the model processes, at ``size`` (width, height) pixels.

    The result keeps the pixels of ``image`` outside the ``mask``, which has the image's size.
    """

    image: Image.Image
    mask: Image.Image | None
    box: Box
    size: tuple[int, int]

    def crop(self, other: Image.Image, mode: str = "stretch") -> Image.Image:
        """Return the box of the image, its mask or a control image, at the canvas's size.

        An ``other`` of a different size is first fitted to the image by ``mode``.
        """
        if other.size != self.image.size:
            other = fit(other, *self.image.size, mode=mode)
        other = other if self.box == (0, 0, *other.size) else other.crop(self.box)
        return other if other.size == self.size else fit(other, *self.size, mode="stretch")

    def paste(self, result: Image.Image) -> Image.Image:
        """Return the image with ``result`` in its box; the areas that the mask keeps have their original pixels.

        Without a mask, return ``result``.
        """
        if self.mask is None:
            return result
        left, top, right, bottom = self.box
        image = self.image.copy()
        image.paste(fit(result, right - left, bottom - top, mode="stretch"), (left, top), self.mask.crop(self.box))
        return image


def make_canvas(
    image: Image.Image,
    mask: Image.Image | None,
    width: int | None,
    height: int | None,
    native: int,
    *,
    resize: str = "crop",
    padding: int | None = None,
) -> Canvas:
    """Choose the area and the size at which to process an image, for a model trained on ``native`` x ``native`` pixels.

    Args:
        width, height: size of the result, or with ``padding`` of the processed area. Default: from the image.
        resize: mode of :func:`fit` to resize the image to ``width`` and ``height``.
        padding: process only the box of the mask plus this number of pixels around it, at the model's training
            resolution. None processes the complete image.

    With a mask the result has the size of the image, independent of the size at which the model works. Raises
    ValueError for an empty mask with a ``padding``.
    """
    if mask is None:
        size = target_size(image.size, width, height, native)
        return Canvas(fit(image, *size, mode=resize), None, (0, 0, *size), size)
    if padding is not None:
        width, height = width or native, height or native
        box = _padded_box(mask, padding, width / height)
        sides = box[2] - box[0], box[3] - box[1]
        scale = math.sqrt(width * height / math.prod(sides))
        sides = tuple(max(SMALLEST_SIDE, round(side * scale / MULTIPLE) * MULTIPLE) for side in sides)
        return Canvas(image, mask, box, sides)
    if width is not None or height is not None:
        size = target_size(image.size, width, height, native)
        image, mask = fit(image, *size, mode=resize), fit(mask, *size, mode=resize, background=0)
    return Canvas(image, mask, (0, 0, *image.size), target_size(image.size, None, None, native))


def read_mask(path: str | os.PathLike, size: tuple[int, int]) -> Image.Image:
    """Read a mask in mode L from an image file, resized to the ``size`` (width, height) of its image.

    Colours are converted to brightness; transparent areas are kept. Raises ValueError, one line, for a file that cannot
    be read or has another aspect ratio than the image.
    """
    mask = open_image(path, BLACK).convert("L")
    if abs(math.log(mask.width * size[1] / (mask.height * size[0]))) > _LARGEST_DIFFERENCE:
        raise ValueError(
            f"the mask {path} of {mask.width}x{mask.height} does not fit an image of {size[0]}x{size[1]}; "
            "give one of the same aspect ratio"
        )
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def adjust_mask(mask: Image.Image, invert: bool = False, blur: float = 0) -> Image.Image:
    """Invert a mask, and blur it by a Gaussian with a standard deviation of ``blur`` pixels."""
    mask = ImageOps.invert(mask) if invert else mask
    return mask.filter(ImageFilter.GaussianBlur(blur))


def add_borders(image: Image.Image, mask: Image.Image | None, borders: Box) -> tuple[Image.Image, Image.Image]:
    """Extend an image by borders (left, top, right, bottom) and return it with a mask that repaints them.

    The borders repeat the image's last pixels. Without a ``mask`` the original area is kept.
    """
    left, top, right, bottom = borders
    sides = ((top, bottom), (left, right))
    inner = np.zeros((image.height, image.width), dtype=np.uint8) if mask is None else np.asarray(mask)
    extended = np.pad(np.asarray(image), (*sides, (0, 0)), mode="edge")
    return Image.fromarray(extended), Image.fromarray(np.pad(inner, sides, constant_values=255))


def box_mask(box: Box, size: tuple[int, int]) -> Image.Image:
    """Return a mask of ``size`` for a box (left, top, width, height): black outside, with a soft inner edge."""
    left, top, width, height = box
    edge = min(width, height) // 8
    inner, mask = Image.new("L", (width, height)), Image.new("L", size)
    inner.paste(255, (edge, edge, width - edge, height - edge))
    mask.paste(inner.filter(ImageFilter.GaussianBlur(edge / 2)), (left, top))
    return mask


def mask_parts(mask: Image.Image) -> list[Image.Image]:
    """Split a mask into connected parts, from top to bottom. Parts within 8 pixels are one; dark ones are dropped."""
    pixels = np.asarray(mask)
    padded = np.pad(pixels, [(0, -side % _CELL) for side in pixels.shape])
    cells = padded.reshape(padded.shape[0] // _CELL, _CELL, -1, _CELL).max((1, 3))
    left, parts = set(zip(*np.nonzero(cells), strict=True)), []
    for first in sorted(left):
        waiting, part = [first] if first in left else [], np.zeros(cells.shape, dtype=bool)
        left.discard(first)
        while waiting:
            y, x = waiting.pop()
            part[y, x] = True
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            waiting += near
        if cells[part].max(initial=0) >= 128:
            whole = part.repeat(_CELL, 0).repeat(_CELL, 1)[: pixels.shape[0], : pixels.shape[1]]
            parts.append(Image.fromarray(np.where(whole, pixels, 0).astype(np.uint8)))
    return parts


def _padded_box(mask: Image.Image, padding: int, aspect: float) -> Box:
    """Return the box of all non-black pixels plus ``padding``, widened to width / height = ``aspect``."""
    box = mask.getbbox()
    if box is None:
        raise ValueError(EMPTY_MASK)
    width, height = box[2] - box[0] + 2 * padding, box[3] - box[1] + 2 * padding
    lengths = max(width, round(height * aspect)), max(height, round(width / aspect))
    spans = []
    for low, high, length, limit in zip(box[:2], box[2:], lengths, mask.size, strict=True):
        length = min(length, limit)
        start = min(max((low + high - length) // 2, 0), limit - length)
        spans.append((start, start + length))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom
