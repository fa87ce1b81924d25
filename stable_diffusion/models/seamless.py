"""Pad maps by their opposite edges, so that an image tiles without a seam.

Every convolution within the context :func:`seamless` pads in this way. The context belongs to the thread that builds
the graph.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

SEAMLESS = ("x", "y", "xy")
_AXES = {"y": 1, "x": 2}  # of NHWC maps
_seamless = ContextVar("seamless", default="")


@contextmanager
def seamless(axes: str) -> Iterator[None]:
    """Wrap maps around in all convolutions within this context, along ``axes``: "x", "y", "xy" or ""."""
    token = _seamless.set(axes)
    try:
        yield
    finally:
        _seamless.reset(token)


def seamlessly(axes: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs in the context of ``axes``; without axes, ``function``."""
    return seamless(axes)(function) if axes else function


def is_seamless(axis: str) -> bool:
    """Return whether maps wrap around along an ``axis``, "x" or "y"."""
    return axis in _seamless.get()


def wrap(x: mx.array, axis: str, before: int, after: int) -> mx.array:
    """Extend a map by values of its opposite edge, along "x" or "y"."""
    along = _AXES[axis]
    edges = mx.split(x, [x.shape[along] - before], along)[1], mx.split(x, [after], along)[0]
    return mx.concatenate([edges[0], x, edges[1]], axis=along)


def pad(x: mx.array, rows: tuple[int, int], columns: tuple[int, int]) -> mx.array:
    """Pad a map by zeros, or along seamless axes by its opposite edge."""
    zeros = [(0, 0), rows, columns, (0, 0)]
    for axis, sides in (("y", rows), ("x", columns)):
        if is_seamless(axis) and any(sides):
            x, zeros[_AXES[axis]] = wrap(x, axis, *sides), (0, 0)
    return mx.pad(x, zeros) if any(map(any, zeros)) else x


def padded(x: mx.array, padding: Sequence[int]) -> tuple[mx.array, Sequence[int]]:
    """Pad a map along seamless axes; returns it with the remaining padding by zeros."""
    if not _seamless.get() or not any(padding):
        return x, padding
    rest = [0 if is_seamless(axis) else count for axis, count in zip("yx", padding, strict=True)]
    rows, columns = ((p - r, p - r) for p, r in zip(padding, rest, strict=True))
    return pad(x, rows, columns), rest
