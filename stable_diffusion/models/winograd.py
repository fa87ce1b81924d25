"""Convolve large float32 maps on a CPU by Winograd's algorithm F(4 × 4, 3 × 3) (Lavin & Gray 2016).

A tile of 6 × 6 positions gives 4 × 4 results by 36 products for each pair of channels instead of 144. Maps are
unfolded to 2.25 times their size instead of nine times. The transforms are products with small matrices.

They evaluate polynomials at 0, ±√½, ±√2 and infinity. The distance to an exact convolution is 3e-6 of the largest
result. At the points 0, ±1, ±2 it would be 1.4e-5 (measured; Barabasz et al. 2020 compare sets of points).
"""

from collections.abc import Sequence

import mlx.core as mx

TILE = 4  # positions of the result, in each direction
_FEWEST_CHANNELS = 64  # below, the transforms take longer than they save (measured)
_a, _b = 0.5**0.5, 2**0.5

_POINTS = (0, _a, -_a, _b, -_b)  # and infinity

# The first two have a row for each point, the last one for each power.
_OF_MAP = [
    [1, 0, -2.5, 0, 1, 0],
    [0, -2 * _a, -2, _a, 1, 0],
    [0, 2 * _a, -2, -_a, 1, 0],
    [0, -_b / 2, -0.5, _b, 1, 0],
    [0, _b / 2, -0.5, -_b, 1, 0],
    [0, 1, 0, -2.5, 0, 1],
]
_OF_WEIGHT = [[n * p**i for i in range(3)] for p, n in zip(_POINTS, (1, -2 / 3, -2 / 3, 1 / 6, 1 / 6), strict=True)]
_OF_WEIGHT += [[0, 0, 1]]
_TO_RESULT = [[*(p**i for p in _POINTS), i == 3] for i in range(4)]


def suits(weight: mx.array, stride: Sequence[int] = (1, 1)) -> bool:
    """Return whether Winograd's algorithm is faster for large maps and ``weight`` [O, kh, kw, C]."""
    _, *kernel, c = weight.shape
    on_cpu = mx.default_device() == mx.cpu and weight.dtype == mx.float32
    return on_cpu and kernel == [3, 3] and tuple(stride) == (1, 1) and c >= _FEWEST_CHANNELS


def fewest_positions(channels: int) -> int:
    """Return the fewest positions of a map that justify transformed weights, for a result of ``channels``.

    The transformed weights, four times as large, then take no more memory than a map unfolded nine times.
    """
    return 4 * channels


def weight_bytes(channels: int) -> int:
    """Return the size of the transformed weights of a convolution with this number of input and output channels."""
    return 4 * 36 * channels**2 if channels >= _FEWEST_CHANNELS else 0


def transform(weight: mx.array) -> mx.array:
    """Transform the weights of a convolution: [O, 3, 3, C] -> [36, C, O]."""
    o, _, _, c = weight.shape
    return (_in_both(_OF_WEIGHT) @ weight.reshape(o, 9, c).transpose(1, 2, 0).reshape(9, c * o)).reshape(36, c, o)


def convolve(x: mx.array, transformed: mx.array) -> mx.array:
    """Convolve maps [B, h + 2, w + 2, C] by transformed weights [36, C, O] -> [B, h, w, O]."""
    b, h, w, c = x.shape
    h, w = h - 2, w - 2
    if h % 4 or w % 4:
        x = mx.pad(x, [(0, 0), (0, -h % 4), (0, -w % 4), (0, 0)])
    rows, columns, o = -(-h // 4), -(-w // 4), transformed.shape[-1]
    row = x.shape[2] * c
    tiles = mx.as_strided(x, (6, 6, b, rows, columns, c), (row, c, x.shape[1] * row, 4 * row, 4 * c, 1))
    products = (_in_both(_OF_MAP) @ tiles.reshape(36, -1)).reshape(36, -1, c) @ transformed
    y = (_in_both(_TO_RESULT) @ products.reshape(36, -1)).reshape(4, 4, b, rows, columns, o)
    return y.transpose(2, 3, 0, 4, 1, 5).reshape(b, 4 * rows, 4 * columns, o)[:, :h, :w]


def _in_both(matrix: list[list[float]]) -> mx.array:
    """[m, n] -> [m m, n n]: the matrix for rows and columns of a tile at once, a Kronecker product."""
    return mx.array([[p * q for p in row for q in column] for row in matrix for column in matrix])
