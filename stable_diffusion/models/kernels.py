"""Attention, activations and norms by MLX's own kernels, or by those of ``cpu`` where a CPU computes float32."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from . import cpu

# The widths of heads for which Metal has a fused kernel of attention that it also prefers (MLX 0.32).
_FUSED = (64, 72, 80, 96, 128)


def attention(q: mx.array, k: mx.array, v: mx.array, largest: float = math.inf) -> mx.array:
    """Compute scaled dot-product attention (Vaswani et al. 2017): q [B, heads, N, D], k and v [B, heads, M, D] -> as q.

    Where the scores of all pairs stand in memory and take more than ``largest`` bytes, they are computed in pieces.
    """
    attend = cpu.attention if cpu.computes(q) else _fused_attention
    if mx.default_device() == mx.cpu or q.shape[-1] > _FUSED[-1]:
        return _in_pieces(attend, q, k, v, largest)
    return attend(q, k, v)


def silu(x: mx.array) -> mx.array:
    """Compute SiLU, x * sigmoid(x) (Elfwing et al. 2018)."""
    return cpu.silu(x) if cpu.computes(x) else nn.silu(x)


def gelu(x: mx.array) -> mx.array:
    """Compute GELU, x * (1 + erf(x / sqrt(2))) / 2 (Hendrycks & Gimpel 2016)."""
    return cpu.gelu(x) if cpu.computes(x) else nn.gelu(x)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Compute layer normalization (Ba et al. 2016) over the last axis."""
    return (cpu.layer_norm if cpu.computes(x) else mx.fast.layer_norm)(x, weight, bias, eps)


def sum_positions(x: mx.array) -> mx.array:
    """Sum the positions of maps: [B, H, W, C] -> [B, 1, 1, C]."""
    return cpu.sum_positions(x) if cpu.computes(x) else x.sum(axis=(1, 2), keepdims=True)


@mx.compile
def scaled(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """Compute x * scale + shift in float32, in the type of x."""
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


def scaled_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """Compute SiLU of x * scale + shift in float32, in the type of x."""
    return (cpu.scaled_silu if cpu.computes(x) else _scaled_silu)(x, scale, shift)


@mx.compile
def _scaled_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    y = x.astype(mx.float32) * scale + shift
    return (y * mx.sigmoid(y)).astype(x.dtype)


def _fused_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Widen heads with zeros to what a fused kernel takes: they change no score and add columns that are cut off."""
    dim = q.shape[-1]
    width = next((fused for fused in _FUSED if fused >= dim), dim)
    if width > dim:
        q, k, v = (mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, width - dim)]) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5)[..., :dim]


def _in_pieces(
    attend: Callable[..., mx.array], q: mx.array, k: mx.array, v: mx.array, largest: float, axis: int = 0
) -> mx.array:
    """Attend with as many images, heads or queries at a time as have scores of at most ``largest`` bytes.

    Images and heads are parted first: products with few rows are slow.
    """
    scores = math.prod(q.shape[:3]) * k.shape[2] * q.itemsize
    if axis > 2 or scores <= largest:
        return attend(q, k, v)
    length = q.shape[axis]
    step = max(int(length * largest // scores), 1)
    cuts = list(range(step, length, step))
    queries = mx.split(q, cuts, axis)
    k, v = (mx.split(x, cuts, axis) if axis < 2 else [x] * len(queries) for x in (k, v))
    results: list[mx.array] = []
    for piece in zip(queries, k, v, strict=True):
        # One after the other, or the scores of all would be in memory at once.
        q = mx.depends(piece[0], results[-1]) if results else piece[0]
        results.append(_in_pieces(attend, q, *piece[1:], largest, axis + 1))
    return mx.concatenate(results, axis=axis)
