"""Detect the edges of an image, as the ControlNets for edges saw them in training.

Canny 1986, "A computational approach to edge detection", in the four steps and with the conventions of OpenCV's
detector, which drew the training images: no blur; Sobel gradients of each colour, the strongest of them taken; thinning
along the gradient's direction; weak edges kept if they touch strong ones.
"""

from typing import Any

import numpy as np

_TAN_22 = 13573  # tan(22.5 deg) in units of 2^-15; tan(67.5 deg) is 2 more


def canny(image: Any, low: float = 100, high: float = 200) -> np.ndarray:
    """Detect edges one pixel wide: uint8 [H, W], 255 on an edge and 0 elsewhere.

    Args:
        image: uint8 [H, W, 3], grey [H, W], or a PIL image.
        low, high: thresholds on |dx| + |dy| of 3x3 Sobel sums, 0 to 2040; a step of d levels along an axis has 4 d.
            Above ``high`` a pixel is an edge. Above ``low`` it is one if a chain of such pixels leads to an edge.

    Raises ValueError for another type or shape, and for a ``low`` above ``high``.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(f"canny takes uint8 [H, W, 3] or [H, W], not {image.dtype} {list(image.shape)}")
    if low > high:
        raise ValueError(f"canny: the low threshold {low} is above the high one, {high}; swap them")
    dx, dy = _gradient(image)
    strength = np.abs(dx) + np.abs(dy)
    ys, xs = _ridges(dx, dy, strength, low)
    result = np.zeros(strength.shape, np.uint8)
    result[ys, xs] = np.where(_connected(ys, xs, strength[ys, xs] > high, strength.shape), 255, 0)
    return result


def _gradient(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Sobel sums dx, dy, int32 [H, W], of each pixel's strongest channel. Border pixels repeat."""
    p = np.pad(image.reshape(*image.shape[:2], -1), ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.int32)
    smooth_y = p[:-2] + 2 * p[1:-1] + p[2:]
    smooth_x = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    dx, dy = smooth_y[:, 2:] - smooth_y[:, :-2], smooth_x[2:] - smooth_x[:-2]
    strongest = (np.abs(dx) + np.abs(dy)).argmax(axis=2)[..., None]
    return np.take_along_axis(dx, strongest, 2)[..., 0], np.take_along_axis(dy, strongest, 2)[..., 0]


def _ridges(dx: np.ndarray, dy: np.ndarray, strength: np.ndarray, low: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns of the pixels above ``low`` that are maxima along their gradient.

    The direction is rounded to a multiple of 45 degrees. Of two equal neighbours the left or upper one stays, so that
    an edge between two pixels is drawn once; on a diagonal neither does.
    """
    ys, xs = np.nonzero(strength > low)
    gx, gy, here = dx[ys, xs], dy[ys, xs], strength[ys, xs]
    run, rise = np.abs(gx) * _TAN_22, np.abs(gy) << 15
    flat, steep = rise < run, rise > run + (np.abs(gx) << 16)
    step_y = np.where(flat, 0, 1)
    step_x = np.where(flat, 1, np.where(steep, 0, np.where((gx < 0) == (gy < 0), 1, -1)))
    padded = np.pad(strength, 1)
    before, after = padded[ys + 1 - step_y, xs + 1 - step_x], padded[ys + 1 + step_y, xs + 1 + step_x]
    maxima = (here > before) & (here + (flat | steep) > after)
    return ys[maxima], xs[maxima]


def _connected(ys: np.ndarray, xs: np.ndarray, strong: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return for each pixel if a path over these pixels, diagonals included, leads to a strong one.

    Each pixel begins as a group. Touching groups take the smaller number of the two, then each takes the number of its
    number: rounds grow with the logarithm of the longest chain, where a walk would take a round a pixel.
    """
    number = np.full((shape[0] + 2, shape[1] + 2), -1)
    number[ys + 1, xs + 1] = np.arange(len(ys))
    links = []
    for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1)):
        other = number[ys + 1 + dy, xs + 1 + dx]
        links.append(np.stack([np.nonzero(other >= 0)[0], other[other >= 0]]))
    one, two = np.concatenate(links, axis=1)
    group = np.arange(len(ys))
    while (apart := group[one] != group[two]).any():
        one, two = one[apart], two[apart]
        a, b = group[one], group[two]
        group[np.maximum(a, b)] = np.minimum(a, b)
        while not np.array_equal(group, further := group[group]):
            group = further
    is_strong = np.zeros(len(ys), bool)
    is_strong[group[strong]] = True
    return is_strong[group]
