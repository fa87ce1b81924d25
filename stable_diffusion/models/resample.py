"""Resize maps as torch's ``interpolate`` and ``pixel_unshuffle`` do."""

import math
from array import array

import mlx.core as mx


def pixel_unshuffle(x: mx.array, side: int) -> mx.array:
    """Join squares of positions into one, channels first: [B, H, W, C] -> [B, H / side, W / side, C * side²]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // side, side, w // side, side, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, h // side, w // side, c * side**2)


def resample(x: mx.array, size: tuple[int, int], *, cubic: bool = False, align_corners: bool = False) -> mx.array:
    """Resize NHWC maps to ``size`` (h, w) by linear or cubic interpolation, as torch's ``interpolate`` does.

    Shrinking does not smooth. ``align_corners`` aligns the centres of the corner pixels instead of their outer edges.
    Each axis is a product with a matrix, first for the rows, then for the columns.
    """
    b, h, w, c = x.shape
    rows, columns = (
        mx.array(_interpolation(old, new, cubic, align_corners)).astype(x.dtype)
        for old, new in zip((h, w), size, strict=True)
    )
    return columns @ (rows @ x.reshape(b, h, w * c)).reshape(b, size[0], w, c)


def _interpolation(old: int, new: int, cubic: bool, align_corners: bool) -> list[list[float]]:
    """Return the matrix [new, old] that interpolates ``old`` values, constant beyond the ends, at ``new`` places.

    Places are rounded to float32 as in torch. Cubic convolution (Keys 1981) uses a = -3/4 instead of -1/2.
    """
    scale = array("f", [(old - 1) / max(new - 1, 1) if align_corners else old / new])[0]
    places = array("f", (scale * i if align_corners else scale * (i + 0.5) - 0.5 for i in range(new)))
    matrix = [[0.0] * old for _ in places]
    for row, place in zip(matrix, places, strict=True):
        before = math.floor(place)
        for i in range(before - 1, before + 3):
            d = abs(place - i)
            if not cubic:
                weight = max(1 - d, 0)
            elif d <= 1:
                weight = 1.25 * d**3 - 2.25 * d**2 + 1
            else:
                weight = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            row[min(max(i, 0), old - 1)] += weight
    return matrix
