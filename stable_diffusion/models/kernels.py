"""Attention, activations and norms in the way that is fast on each backend. The numbers are the same, to rounding.

On a GPU these are MLX's own kernels, and what it compiles from a line of arithmetic. On the CPU MLX computes exp and
erf one value at a time, which is most of the time of a softmax over 4096 positions; there, polynomials take their place
that a compiler turns into loops of products and sums. All that is special to the CPU is in this file.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import mlx.core as mx
import mlx.nn as nn

# The widths of heads for which Metal has a fused kernel of attention that it also prefers (MLX 0.32).
_FUSED = (64, 72, 80, 96, 128)


def attention(q: mx.array, k: mx.array, v: mx.array, largest: float = math.inf) -> mx.array:
    """Scaled dot-product attention (Vaswani et al. 2017): q [B, heads, N, D], k and v [B, heads, M, D] -> as q.

    ``largest`` is in bytes: where the scores of all pairs are in memory and take more, they are worked off in pieces.
    """
    scale = q.shape[-1] ** -0.5
    if not _on_cpu(q):
        in_memory = mx.default_device() == mx.cpu or q.shape[-1] > _FUSED[-1]
        look = partial(_fused_attention, scale=scale)
        return _in_pieces(look, q, k, v, largest) if in_memory else look(q, k, v)
    # A column of ones sums the weights in the same product.
    values = mx.pad(v, [(0, 0), (0, 0), (0, 0), (0, 1)], constant_values=1)
    look = partial(_weighted_sums, scale=mx.array(scale))
    sums = _in_pieces(look, q, k.swapaxes(-1, -2), values, largest)
    weighted, weights = mx.split(sums, [q.shape[-1]], axis=-1)
    return weighted / weights


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x) (Elfwing et al. 2018)."""
    return _silu(x, _exp(_minus_size(x))) if _on_cpu(x) else nn.silu(x)


def gelu(x: mx.array) -> mx.array:
    """x * (1 + erf(x / sqrt(2))) / 2 (Hendrycks & Gimpel 2016)."""
    if not _on_cpu(x):
        return nn.gelu(x)
    x = x + 0.0  # a copy in one piece: loops over half of a wider array, as it is in GEGLU, are not vectorised
    return _gelu(x, _erf_polynomial(x), _exp(_minus_half_square(x)))


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Layer normalization (Ba et al. 2016) over the last axis.

    On the CPU products with ones sum it: ten times closer to float64 than MLX's kernel where the mean is not zero.
    """
    if not _on_cpu(x):
        return mx.fast.layer_norm(x, weight, bias, eps)
    width = x.shape[-1]
    ones, share = _ones(width), mx.array(1 / width)
    y = x.reshape(-1, width)
    y, squares = _centred(y, y @ ones, share)
    scale = _over_deviation(squares @ ones, share, mx.array(eps))
    return _scaled_rows(y, scale, weight, bias).reshape(x.shape)


@cache
def _ones(width: int) -> mx.array:
    """A column of them, made once."""
    ones = mx.ones((width, 1))
    mx.eval(ones)
    return ones


def sum_positions(x: mx.array) -> mx.array:
    """[B, H, W, C] -> [B, 1, 1, C].

    On the CPU along one axis after the other, so that errors do not pile up as in one long sum: over the 512 × 512
    positions of a decoded picture they would reach 2e-4.
    """
    if _on_cpu(x):
        return x.sum(axis=1, keepdims=True).sum(axis=2, keepdims=True)
    return x.sum(axis=(1, 2), keepdims=True)


@mx.compile
def scaled(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """x * scale + shift in float32, in the type of x."""
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


def scaled_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """SiLU of x * scale + shift."""
    if not _on_cpu(x):
        return _scaled_silu(x, scale, shift)
    y, exponent = _scaled_and_minus_size(x, scale, shift)
    return _silu(y, _exp(exponent))


def _on_cpu(x: mx.array) -> bool:
    return mx.default_device() == mx.cpu and x.dtype == mx.float32


def _in_pieces(
    look: Callable[..., mx.array], q: mx.array, k: mx.array, v: mx.array, largest: float, axis: int = 0
) -> mx.array:
    """``look(q, k, v)`` for as many images, heads or queries at a time as have scores of at most ``largest`` bytes.

    Images and heads are parted first: products with few rows are slow.
    """
    scores = math.prod(q.shape[:3]) * v.shape[2] * q.itemsize
    if axis > 2 or scores <= largest:
        return look(q, k, v)
    length = q.shape[axis]
    step = max(int(length * largest // scores), 1)
    cuts = list(range(step, length, step))
    queries = mx.split(q, cuts, axis)
    keys, values = (mx.split(x, cuts, axis) if axis < 2 else [x] * len(queries) for x in (k, v))
    done: list[mx.array] = []
    for piece, its_keys, its_values in zip(queries, keys, values, strict=True):
        # One after the other, or the scores of all would be in memory at once.
        piece = mx.depends(piece, done[-1]) if done else piece
        done.append(_in_pieces(look, piece, its_keys, its_values, largest, axis + 1))
    return mx.concatenate(done, axis=axis)


def _weighted_sums(q: mx.array, keys: mx.array, v: mx.array, scale: mx.array) -> mx.array:
    """``keys`` are [B, heads, D, M], and ``v`` has a column of ones."""
    scores = q @ keys
    return _exp(_difference(scores, scores.max(axis=-1, keepdims=True), scale)) @ v


def _fused_attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """With heads widened to what a kernel takes by zeros, which change no score and add columns that are cut off."""
    dim = q.shape[-1]
    width = next((fused for fused in _FUSED if fused >= dim), dim)
    if width > dim:
        q, k, v = (mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, width - dim)]) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)[..., :dim]


def _exp(x: mx.array) -> mx.array:
    """exp(x) for -32 <= x <= 0, to 1e-6 of the largest value 1: Taylor's polynomial of x / 16, to the power of 16."""
    return _sixteenth_power(_taylor(x))


# Each function below becomes one loop. mx.compile fuses chains of at most 11 operations, and a maximum keeps the C
# compiler from vectorising what stands in the same loop, so they are cut where a chain would become longer.

_TAYLOR = [1 / (16**k * math.factorial(k)) for k in range(1, 8)]


@mx.compile
def _taylor(x: mx.array) -> mx.array:
    """exp(x / 16) - 1, in which the last bits of an exponential near 1 are not lost."""
    a, b, c, d, e, f, g = _TAYLOR
    x2 = x * x
    return ((a + b * x) + (c + d * x) * x2 + ((e + f * x) + g * x2) * (x2 * x2)) * x


@mx.compile
def _sixteenth_power(y: mx.array) -> mx.array:
    """(1 + y)^16, squared twice as y and twice as 1 + y."""
    y = y * (2 + y)
    p = 1 + y * (2 + y)
    p = p * p
    return p * p


@partial(mx.compile, shapeless=True)
def _difference(x: mx.array, largest: mx.array, scale: mx.array) -> mx.array:
    return mx.maximum((x - largest) * scale, -32.0)


@partial(mx.compile, shapeless=True)
def _minus_size(x: mx.array) -> mx.array:
    return mx.maximum(-mx.abs(x), -32.0)


@mx.compile
def _scaled_and_minus_size(x: mx.array, scale: mx.array, shift: mx.array) -> tuple[mx.array, mx.array]:
    y = x * scale + shift
    return y, mx.maximum(-mx.abs(y), -32.0)


@partial(mx.compile, shapeless=True)
def _minus_half_square(x: mx.array) -> mx.array:
    return mx.maximum(-0.5 * x * x, -32.0)


@mx.compile
def _silu(x: mx.array, e: mx.array) -> mx.array:
    """With e = exp(-|x|); x + |x| is twice the positive part, x - |x| twice the negative."""
    return ((x + mx.abs(x)) + (x - mx.abs(x)) * e) / (2 + 2 * e)


@mx.compile
def _erf_polynomial(x: mx.array) -> mx.array:
    """(1 - erf(z)) / exp(-z^2) for z = |x| / sqrt(2), to 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26)."""
    t = 1 / (1 + (0.3275911 * math.sqrt(0.5)) * mx.abs(x))
    t2 = t * t
    return t * ((0.254829592 - 0.284496736 * t) + (1.421413741 - 1.453152027 * t) * t2 + 1.061405429 * (t2 * t2))


@mx.compile
def _gelu(x: mx.array, p: mx.array, e: mx.array) -> mx.array:
    return 0.5 * (x + mx.abs(x)) - (0.5 * mx.abs(x)) * (p * e)


@mx.compile
def _scaled_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    y = x.astype(mx.float32) * scale + shift
    return (y * mx.sigmoid(y)).astype(x.dtype)


@mx.compile
def _centred(x: mx.array, total: mx.array, share: mx.array) -> tuple[mx.array, mx.array]:
    """The distances from the mean, and their squares."""
    y = x - total * share
    return y, y * y


@mx.compile
def _over_deviation(squares: mx.array, share: mx.array, eps: mx.array) -> mx.array:
    return mx.rsqrt(squares * share + eps)


@mx.compile
def _scaled_rows(x: mx.array, scale: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return x * scale * weight + bias
