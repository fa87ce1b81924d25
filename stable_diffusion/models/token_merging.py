"""Token merging (ToMe): similar positions of a map become one position of self-attention.

After Bolya & Hoffman 2023, "Token Merging for Fast Stable Diffusion", with the upper left position of every 2 × 2
instead of a random one. Attention to N positions costs N²; at a ratio of 0.5 a quarter of the cost remains.
"""

from collections.abc import Callable
from functools import cache

import mlx.core as mx

HIGHEST = 0.75  # three of every four positions can be merged into the fourth


@cache
def _indices(height: int, width: int) -> tuple[mx.array, mx.array]:
    """Return the target positions of the merging, and the source positions."""
    into = [row * width + column for row in range(0, height, 2) for column in range(0, width, 2)]
    return mx.array(into), mx.array(sorted(set(range(height * width)) - set(into)))


def attend_merged(
    attend: Callable[[mx.array, int], mx.array], x: mx.array, size: tuple[int, int, int], ratio: float
) -> mx.array:
    """Compute ``attend(x, b)`` approximately, with ``ratio`` of each map's positions merged into others.

    The source positions with the highest cosine similarity to a target are merged into it, by their mean. ``x``
    [B * H * W, C] are the positions of maps of ``size`` (B, H, W), one map after the other.
    """
    shape, (b, *map_size) = x.shape, size
    x = x.reshape(b, -1, shape[-1])
    into, rest = _indices(*map_size)
    count = min(int(ratio * x.shape[1]), rest.size)
    rows = mx.arange(len(x))[:, None]
    unit = x / mx.linalg.norm(x, axis=-1, keepdims=True)
    alike = unit[:, rest] @ unit[:, into].swapaxes(1, 2)
    nearest = alike.argmax(axis=-1)
    order = mx.argsort(-alike.max(axis=-1), axis=-1)
    merged, alone = order[:, :count], order[:, count:]
    target = mx.take_along_axis(nearest, merged, axis=1)
    merged, alone = rest[merged], rest[alone]  # positions in the map
    number = mx.ones((len(x), into.size, 1), x.dtype).at[rows, target].add(1)
    means = x[:, into].at[rows, target].add(x[rows, merged]) / number
    positions = mx.concatenate([x[rows, alone], means], axis=1)
    y = attend(positions.reshape(-1, shape[-1]), b).reshape(positions.shape)
    y, means = mx.split(y, [alone.shape[1]], axis=1)
    out = mx.zeros_like(x)
    out[:, into] = means
    out[rows, alone] = y
    out[rows, merged] = means[rows, target]
    return out.reshape(shape)
