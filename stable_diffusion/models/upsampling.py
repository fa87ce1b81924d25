"""Double the sides of NHWC maps and convolve them, by four small convolutions if that is faster.

A map doubled by repetition has each value four times, so a 3×3 kernel on it covers only 2×2 different values: one pair
of kernel rows falls on the same row of the small map, and one pair of columns. With the weights of these pairs summed,
the four results of a position are four 2×2 convolutions of the small map, one for each parity of row and column. That
is 16 products per position instead of 36, without a doubled map in memory. The results are equal, to rounding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
import mlx.nn as nn

from . import winograd
from .layers import WINOGRAD_POSITIONS, Conv2d, conv2d, suits_winograd

_FEWEST = 64  # positions of a map; below, summing the weights takes longer than it saves (measured on a CPU)

_takes_sums = ContextVar("takes_sums", default=True)


@contextmanager
def without_sums() -> Iterator[None]:
    """Convolve doubled maps directly within this context: a gradient would keep the sums, 131 MB in SD 1.5."""
    token = _takes_sums.set(False)
    try:
        yield
    finally:
        _takes_sums.reset(token)


def _tap(parity: int, k: int) -> int:
    """Return the row of a 2×2 kernel for row ``k`` of the 3×3 kernel, in doubled rows of a parity."""
    return (parity + k + 1) // 2 - parity


_PAIRS = [(i, j) for i in range(2) for j in range(2)]
# [4, 1, 4, 9]: for each parity of row and column, the taps of the 2×2 kernel as sums of those of the 3×3 kernel.
_SUMS = [
    [[[float((_tap(i, k), _tap(j, m)) == pair) for k in range(3) for m in range(3)] for pair in _PAIRS]]
    for i, j in _PAIRS
]


def upsample_nearest(x: mx.array, size: tuple[int, int] | None = None) -> mx.array:
    """Double height and width by repetition, then crop to ``size`` (h, w) if the larger map had an odd side."""
    b, h, w, c = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
    return x if size is None or size == (2 * h, 2 * w) else x[:, : size[0], : size[1], :]


def sums_pay(size: Sequence[int], conv: nn.Module) -> bool:
    """Return whether to convolve maps of ``size`` (h, w), doubled, by :func:`convolve_doubled`.

    Winograd's algorithm, which is used for large maps, has even fewer products. A wrapped layer is excluded.
    """
    h, w = size
    if not _takes_sums.get() or h * w < _FEWEST or not isinstance(conv, nn.Conv2d):
        return False
    if mx.default_device() == mx.cpu:
        return not (winograd.suits(conv.weight) and 4 * h * w >= winograd.fewest_positions(len(conv.weight)))
    return not (suits_winograd(conv.weight.shape) and 4 * h * w >= WINOGRAD_POSITIONS)


def sum_taps(weight: mx.array) -> mx.array:
    """Sum the weights [O, 3, 3, C] of a convolution of doubled maps -> [4 O, 2, 2, C] for :func:`convolve_doubled`."""
    o, _, _, c = weight.shape
    return (mx.array(_SUMS, dtype=weight.dtype) @ weight.reshape(1, o, 9, c)).reshape(4 * o, 2, 2, c)


def convolve_doubled(
    x: mx.array, sums: mx.array, bias: mx.array | None = None, padding: tuple[int, int] = (1, 1)
) -> mx.array:
    """Double the sides of ``x`` [B, h, w, C] and convolve it by a 3×3 kernel: -> [B, 2h, 2w, O].

    ``sums`` is the result of :func:`sum_taps`. Without ``padding`` of rows, ``x`` is a part of a map including one row
    above and one below, which have no results: -> [B, 2 (h - 2), 2w, O].
    """
    y = _interleave(conv2d(x, sums, padding=padding))
    b, h, _, w, _, o = y.shape
    return (y if bias is None else y + bias).reshape(b, 2 * h, 2 * w, o)


@mx.custom_function
def _interleave(y: mx.array) -> mx.array:
    """[B, h + 1, w + 1, 4 O] -> [B, h, 2, w, 2, O]: results of odd rows lie one row below those of even rows."""
    b, h, w, o = y.shape[0], y.shape[1] - 1, y.shape[2] - 1, y.shape[3] // 4
    column, row = 4 * o, 4 * o * (w + 1)
    strides = ((h + 1) * row, row, row + 2 * o, column, column + o, 1)
    return mx.as_strided(y, (b, h, 2, w, 2, o), strides)


@_interleave.vjp
def _interleave_gradient(y: mx.array, change: mx.array, _: mx.array) -> mx.array:
    parts = [mx.pad(change[:, :, i, :, j], [(0, 0), (i, 1 - i), (j, 1 - j), (0, 0)]) for i, j in _PAIRS]
    return mx.concatenate(parts, axis=-1)


class UpsampledConv2d(Conv2d):
    """Double height and width, then convolve by a 3×3 kernel."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        if sums_pay(x.shape[1:3], self):
            return convolve_doubled(x, sum_taps(self.weight), self.get("bias"))
        return super().__call__(upsample_nearest(x))


class Upsample2D(nn.Module):
    """Double height and width, crop to a given ``size``, then smooth with a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array, size: tuple[int, int] | None = None) -> mx.array:
        h, w = x.shape[1:3]
        if size in (None, (2 * h, 2 * w)) and sums_pay((h, w), self.conv):
            return convolve_doubled(x, sum_taps(self.conv.weight), self.conv.get("bias"))
        return self.conv(upsample_nearest(x, size))
