"""Attention, GELU and SiLU in the way that is fast on each backend. The numbers are the same, to float32's rounding.

On a GPU these are MLX's own kernels. On the CPU MLX computes exp and erf one value at a time, which is most of the time
of a softmax over 4096 positions; there, a polynomial takes their place that a compiler turns into one loop of products
and sums. All that is special to the CPU is in this file.
"""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn

# The widths of heads for which Metal has a fused kernel of attention that it also prefers (MLX 0.32).
_FUSED = (64, 72, 80, 96, 128)


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Scaled dot-product attention (Vaswani et al. 2017): q [B, heads, N, D], k and v [B, heads, M, D] -> as q."""
    scale = q.shape[-1] ** -0.5
    if _on_cpu(q):
        scores = (q * scale) @ k.swapaxes(-1, -2)
        weights = _exp_difference(scores, scores.max(axis=-1, keepdims=True))
        # A column of ones sums the weights in the same product.
        sums = weights @ mx.concatenate([v, mx.ones((*v.shape[:-1], 1))], axis=-1)
        return sums[..., :-1] / sums[..., -1:]
    width = next((fused for fused in _FUSED if fused >= q.shape[-1]), q.shape[-1])
    if width == q.shape[-1]:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    return _padded(q, k, v, scale, width)


def keeps_scores(q: mx.array) -> bool:
    """Whether ``attention`` has a score for every pair of positions in memory: no fused kernel takes these heads."""
    return mx.default_device() == mx.cpu or q.shape[-1] > _FUSED[-1]


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x) (Elfwing et al. 2018)."""
    return _silu(x) if _on_cpu(x) else nn.silu(x)


def gelu(x: mx.array) -> mx.array:
    """x * (1 + erf(x / sqrt(2))) / 2 (Hendrycks & Gimpel 2016)."""
    return _gelu(x) if _on_cpu(x) else nn.gelu(x)


def _on_cpu(x: mx.array) -> bool:
    return mx.default_device() == mx.cpu and x.dtype == mx.float32


def _padded(q: mx.array, k: mx.array, v: mx.array, scale: float, width: int) -> mx.array:
    """Attention with heads widened by zeros, which change no score and add only columns that are cut off again."""
    pad = [(0, 0), (0, 0), (0, 0), (0, width - q.shape[-1])]
    padded = (mx.pad(t, pad) for t in (q, k, v))
    return mx.fast.scaled_dot_product_attention(*padded, scale=scale)[..., : q.shape[-1]]


def _exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, to 1e-6 of the largest value 1: Taylor's polynomial of x / 16, to the power of 16.

    Twice it is squared as y = p - 1, in which the last bits of p near 1 are not lost, then twice as p. Below -32 it
    stays at exp(-32) = 1e-14.
    """
    x = mx.maximum(x, -32.0) * (1 / 16)
    y = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))))
    y = y * (2 + y)
    p = 1 + y * (2 + y)
    p = p * p
    return p * p


@partial(mx.compile, shapeless=True)
def _exp_difference(x: mx.array, largest: mx.array) -> mx.array:
    return _exp(x - largest)


@partial(mx.compile, shapeless=True)
def _silu(x: mx.array) -> mx.array:
    e = _exp(-mx.abs(x))
    return (mx.maximum(x, 0) + mx.minimum(x, 0) * e) / (1 + e)


@partial(mx.compile, shapeless=True)
def _gelu(x: mx.array) -> mx.array:
    """With erf after Abramowitz & Stegun 1964, 7.1.26, whose error is at most 1.5e-7."""
    z = mx.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return mx.maximum(x, 0) - 0.5 * mx.abs(x) * p * _exp(-z * z)
