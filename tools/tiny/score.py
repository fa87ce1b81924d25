"""Reads images of the data set's world: which colours, which shape, what lies where. Needs NumPy only."""

import functools
from collections.abc import Sequence

import numpy as np

from tools.tiny.data import COLOURS, SHAPES, SIZE, Scene, coverage

_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], np.float32)
_FRAME = np.ones((SIZE, SIZE), bool)
_FRAME[2:-2, 2:-2] = False


def nearest_colour(rgb: np.ndarray) -> str:
    """Name of the palette's colour nearest to an RGB triple in 0..255."""
    return _NAMES[int(np.square(_PALETTE - rgb).sum(axis=1).argmin())]


def erode(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are in the mask too."""
    p = np.pad(mask, 1)
    return mask & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]


def background_colour(image: np.ndarray) -> np.ndarray:
    """Median RGB of the two outermost rows and columns."""
    return np.median(image[_FRAME].astype(np.float32), axis=0)


def object_mask(image: np.ndarray) -> np.ndarray:
    """[64, 64] bool: pixels nearer to the object's colour than to the background's."""
    contrast = np.linalg.norm(image.astype(np.float32) - background_colour(image), axis=2)
    strongest = np.sort(contrast, axis=None)[-60:].mean()
    return contrast > 0.5 * strongest


def object_colour(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean RGB inside the mask, its blended edge left out where the object is not too thin for that."""
    inner = erode(mask)
    return image[inner if inner.sum() >= 8 else mask].astype(np.float32).mean(axis=0)


@functools.cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area, and centroid relative to the centre, of a shape of radius 1."""
    radius = 24.0
    cover = coverage(shape, SIZE / 2, SIZE / 2, radius)
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5 - SIZE / 2
    area = float(cover.sum())
    return area / radius**2, float((cover * x).sum() / area / radius), float((cover * y).sum() / area / radius)


def shape_overlaps(mask: np.ndarray, shapes: Sequence[str] = SHAPES) -> dict[str, float]:
    """IoU of a mask with each of some shapes, laid over it with the same centroid and nearly the same area."""
    ys, xs = np.nonzero(mask)
    if len(xs) < 12:
        return dict.fromkeys(shapes, 0.0)
    x, y, overlaps = xs.mean() + 0.5, ys.mean() + 0.5, {}
    for shape in shapes:
        area, dx, dy = _moments(shape)
        best = 0.0
        for zoom in (0.93, 1.0, 1.07):
            radius = zoom * (len(xs) / area) ** 0.5
            template = coverage(shape, x - dx * radius, y - dy * radius, radius) > 0.5
            best = max(best, float((template & mask).sum() / (template | mask).sum()))
        overlaps[shape] = best
    return overlaps


def nearest_shape(mask: np.ndarray, shapes: Sequence[str] = SHAPES) -> str:
    overlaps = shape_overlaps(mask, shapes)
    return max(overlaps, key=lambda shape: overlaps[shape])


def score_single(image: np.ndarray, scene: Scene, shapes: Sequence[str] = SHAPES) -> dict[str, bool]:
    """What a picture of one plain object on a plain background gets right."""
    (thing,), mask = scene.things, object_mask(image)
    return {
        "colour": nearest_colour(object_colour(image, mask)) == thing.colour,
        "background": nearest_colour(background_colour(image)) == scene.background,
        "shape": nearest_shape(mask, shapes) == thing.shape,
    }


def colour_mask(image: np.ndarray, colour: str, scene: Scene) -> np.ndarray:
    """Pixels nearer to `colour` than to any other colour of the scene, without blended edges."""
    colours = dict.fromkeys([colour, scene.background, *(thing.colour for thing in scene.things)])
    distances = [np.linalg.norm(image.astype(np.float32) - COLOURS[name], axis=2) for name in colours]
    return erode((np.argmin(distances, axis=0) == 0) & (distances[0] < 80))


def score_pair(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Both colours there, and the first left (or right) of the second as asked; swapped colours are a wrong order."""
    masks = [colour_mask(image, thing.colour, scene) for thing in scene.things]
    found = all(mask.sum() >= 20 for mask in masks)
    apart = np.nonzero(masks[1])[1].mean() - np.nonzero(masks[0])[1].mean() if found else 0.0
    asked = {"left": 1, "right": -1}[scene.relation]
    return {
        "both colours": found,
        "order": bool(apart * asked > 6),
        "background": nearest_colour(background_colour(image)) == scene.background,
    }
