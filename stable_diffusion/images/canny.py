"""Detect the edges of an image (Canny), as in the training of ControlNets for edges.

Canny 1986, "A computational approach to edge detection", in the four steps and with the conventions of OpenCV's
detector, which drew the training images: no blur; Sobel gradients, the strongest of the colours; thinning
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

    Raises ValueError for a wrong type or shape, and for a ``low`` above ``high``.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(f"canny takes uint8 [H, W, 3] or [H, W], not {image.dtype} {list(image.shape)}")
    if low > high:
        raise ValueError(f"canny: the low threshold {low} is above the high one, {high}; swap them")
    dx, dy = _gradient(image)
    strength = np.pad(np.abs(dx) + np.abs(dy), 1)
    width = strength.shape[1]
    around = [row * width + column for row in (-1, 0, 1) for column in (-1, 0, 1)]
    candidates = _ridges(dx, dy, strength, low).ravel()
    result = np.zeros(strength.shape, np.uint8)
    front = np.nonzero(candidates & (strength.ravel() > high))[0]
    while len(front):  # starting at the strong pixels, visit the neighbours
        result.flat[front], candidates[front] = 255, False
        beside = np.unique(front[:, None] + around)
        front = beside[candidates[beside]]
    return result[1:-1, 1:-1]


def _gradient(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Sobel sums dx, dy, int32 [H, W], of each pixel's strongest channel. Border pixels repeat."""
    p = np.pad(image.reshape(*image.shape[:2], -1), ((1, 1), (1, 1), (0, 0)), mode="edge").astype(np.int32)
    smooth_y = p[:-2] + 2 * p[1:-1] + p[2:]
    smooth_x = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    dx, dy = smooth_y[:, 2:] - smooth_y[:, :-2], smooth_x[2:] - smooth_x[:-2]
    strongest = (np.abs(dx) + np.abs(dy)).argmax(axis=2)[..., None]
    return np.take_along_axis(dx, strongest, 2)[..., 0], np.take_along_axis(dy, strongest, 2)[..., 0]


def _ridges(dx: np.ndarray, dy: np.ndarray, strength: np.ndarray, low: float) -> np.ndarray:
    """Find the pixels above ``low`` that are maxima along their gradient: bool, like ``strength`` with a border of 1.

    The direction is rounded to a multiple of 45 degrees. Of two equal neighbours the left or upper one is kept, so
    that an edge between two pixels is drawn once; on a diagonal both are dropped.
    """
    ys, xs = np.nonzero(strength[1:-1, 1:-1] > low)
    gx, gy = dx[ys, xs], dy[ys, xs]
    run, rise = np.abs(gx) * _TAN_22, np.abs(gy) << 15
    flat, steep = rise < run, rise > run + (np.abs(gx) << 16)
    step_y = np.where(flat, 0, 1)
    step_x = np.where(flat, 1, np.where(steep, 0, np.where((gx < 0) == (gy < 0), 1, -1)))
    ys, xs = ys + 1, xs + 1
    here, before, after = strength[ys, xs], strength[ys - step_y, xs - step_x], strength[ys + step_y, xs + step_x]
    ridges = np.zeros(strength.shape, bool)
    ridges[ys, xs] = (here > before) & (here + (flat | steep) > after)
    return ridges
