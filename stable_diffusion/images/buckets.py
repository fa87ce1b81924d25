"""Training sizes of equal area for pictures of all aspect ratios (bucketing, NovelAI 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Crop:
    """Describe how a picture gets a size, (width, height): resized to ``resized``, then cropped at ``corner``."""

    size: tuple[int, int]
    resized: tuple[int, int]

    @property
    def corner(self) -> tuple[int, int]:
        """Return the pixels that are cut off on the left and at the top."""
        return (self.resized[0] - self.size[0]) // 2, (self.resized[1] - self.size[1]) // 2


def bucket_sizes(resolution: int, unit: int = 64) -> list[tuple[int, int]]:
    """Return the sizes (width, height) in multiples of ``unit`` with at most the area of a square, sorted.

    Each width gets the largest possible height. Sides are from half to twice the side of the square, as in kohya's
    scripts for 512 pixels.
    """
    side, largest = (factor * resolution // unit * unit for factor in (1, 2))
    smallest = max(resolution // 2 // unit, 1) * unit
    sizes = {(side, side)}
    for width in range(smallest, largest + 1, unit):
        height = min(largest, resolution**2 // width // unit * unit)
        if height >= smallest:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def crop_for(picture: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> Crop:
    """Choose the size with the nearest aspect ratio for a picture (width, height), and its resizing and cropping."""
    aspect = picture[0] / picture[1]
    size = min(sizes, key=lambda size: (abs(size[0] / size[1] - aspect), size != picture))
    scale = max(side / length for side, length in zip(size, picture, strict=True))
    resized = tuple(max(side, int(scale * length + 0.5)) for side, length in zip(size, picture, strict=True))
    return Crop(size, resized)
