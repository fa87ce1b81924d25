"""Making a part of a picture anew: masks, borders, crops, and how what was made goes back into the picture.

Everything here is PIL images of 8 bits: RGB pictures, and masks of mode L in which white (255) is made anew, black (0)
is kept and grey blends.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .image import fit, open_image, target_size

_BLACK = (0, 0, 0)
_UNIT, _SMALLEST = 8, 64  # sides are multiples of 8, and not below 64
_LARGEST_DIFFERENCE = 0.02  # of the aspect ratios of an image and its mask

EMPTY = "the mask is black everywhere: there is nothing to crop to; leave out the padding"

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Canvas:
    """A picture, and the part of it that is worked on: the ``box``, at ``size`` (width, height) pixels.

    ``picture`` is what is shown in the end but for what the ``mask``, of the same size, lets through.
    """

    picture: Image.Image
    mask: Image.Image | None
    box: Box
    size: tuple[int, int]

    def part(self, image: Image.Image, mode: str = "stretch") -> Image.Image:
        """The box of an image that goes with the picture (its mask, a hint); ``mode`` brings it to its size."""
        if image.size != self.picture.size:
            image = fit(image, *self.picture.size, mode=mode)
        image = image if self.box == (0, 0, *image.size) else image.crop(self.box)
        return image if image.size == self.size else fit(image, *self.size, mode="stretch")

    def finish(self, made: Image.Image, composite: bool = True) -> Image.Image:
        """The picture with what was ``made`` of its box; what the mask keeps has the very pixels it had.

        Without a mask, or without ``composite``, it is what was made.
        """
        if self.mask is None or not composite:
            return made
        left, top, right, bottom = self.box
        made = fit(made, right - left, bottom - top, mode="stretch")
        whole = self.picture.copy()
        whole.paste(made, (left, top), self.mask.crop(self.box))
        return whole


def canvas(
    image: Image.Image,
    mask: Image.Image | None,
    width: int | None,
    height: int | None,
    native: int,
    *,
    resize: str = "crop",
    padding: int | None = None,
) -> Canvas:
    """How a picture is worked on by a model that was trained on ``native`` pixels in each direction.

    Args:
        width, height: of the result, or with ``padding`` of what is worked on; None is the picture's own, or of its
            aspect ratio.
        resize: how the picture comes to a size that is given, see ``image.fit``.
        padding: work on the part around the mask alone and so many pixels beyond it, at the size the model was trained
            on; None works on the whole picture.

    With a mask the result has the size of the picture, whatever the model works at. ValueError for an empty mask that
    is to be cropped to.
    """
    if mask is None:
        size = target_size(image.size, width, height, native)
        return Canvas(fit(image, *size, mode=resize), None, (0, 0, *size), size)
    if padding is not None:
        box = _around(mask, padding, (width or native) / (height or native))
        area = (width or native) * (height or native)
        return Canvas(image, mask, box, _sides(box[2] - box[0], box[3] - box[1], area))
    if width is not None or height is not None:
        size = target_size(image.size, width, height, native)
        image, mask = fit(image, *size, mode=resize), fit(mask, *size, mode=resize, background=0)
    return Canvas(image, mask, (0, 0, *image.size), target_size(image.size, None, None, native))


def read_mask(path: str | os.PathLike, size: tuple[int, int]) -> Image.Image:
    """A mask in mode L from an image file, brought to the ``size`` (width, height) of the picture it is for.

    Colours count by their brightness; what is transparent is kept. ValueError, one line, for a file that cannot be read
    and for a mask of another aspect ratio than the picture's.
    """
    mask = open_image(path, _BLACK).convert("L")
    if abs(math.log(mask.width * size[1] / (mask.height * size[0]))) > _LARGEST_DIFFERENCE:
        raise ValueError(
            f"the mask {path} of {mask.width}x{mask.height} does not fit an image of {size[0]}x{size[1]}; "
            "give one of the same aspect ratio"
        )
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def prepare(mask: Image.Image, invert: bool = False, blur: float = 0) -> Image.Image:
    """A mask with black and white changed, and with soft edges of ``blur`` pixels (the deviation of a Gaussian)."""
    if invert:
        mask = Image.eval(mask, lambda value: 255 - value)
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask


def expand(image: Image.Image, mask: Image.Image | None, borders: Box) -> tuple[Image.Image, Image.Image]:
    """The picture with borders (left, top, right, bottom) to be painted, and its mask: white there.

    The borders repeat the picture's last pixels. Without a ``mask`` nothing of the picture itself is made anew.
    """
    left, top, right, bottom = borders
    sides = ((top, bottom), (left, right))
    kept = np.zeros((image.height, image.width), dtype=np.uint8) if mask is None else np.asarray(mask)
    wider = np.pad(np.asarray(image), (*sides, (0, 0)), mode="edge")
    return Image.fromarray(wider), Image.fromarray(np.pad(kept, sides, constant_values=255))


def _around(mask: Image.Image, padding: int, aspect: float) -> Box:
    """The box of what is not black with ``padding`` pixels around it, widened towards width / height = ``aspect``."""
    box = mask.getbbox()
    if box is None:
        raise ValueError(EMPTY)
    spans = []
    lengths = [box[2] - box[0] + 2 * padding, box[3] - box[1] + 2 * padding]
    wanted = max(lengths[0], round(lengths[1] * aspect)), max(lengths[1], round(lengths[0] / aspect))
    for low, high, length, limit in zip(box[:2], box[2:], wanted, mask.size, strict=True):
        length = min(length, limit)
        start = min(max((low + high - length) // 2, 0), limit - length)
        spans.append((start, start + length))
    (left, right), (top, bottom) = spans
    return left, top, right, bottom


def _sides(width: int, height: int, area: int) -> tuple[int, int]:
    """Sides that the model can work with, of about this ``area`` and aspect ratio."""
    scale = math.sqrt(area / (width * height))
    return tuple(max(_SMALLEST, round(side * scale / _UNIT) * _UNIT) for side in (width, height))
