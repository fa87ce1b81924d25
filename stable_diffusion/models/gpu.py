"""Hold all that is special to a GPU, where a map is read and written in more time than elementwise operations take.

A function under ``mx.compile`` is one kernel, which reads each input and writes the result once. So biases and sums
are part of the kernel that reads the map anyway.
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

# Widths of heads for which Metal has a fused kernel of attention that it also prefers (MLX 0.32).
FUSED = (64, 72, 80, 96, 128)


def is_default() -> bool:
    """Return whether a GPU is the default device."""
    return mx.default_device() != mx.cpu


@mx.compile
def _shifted(x: mx.array, *shifts: mx.array) -> mx.array:
    """Compute x + Σ shifts, written in the order of the axes, whatever the strides of ``x``."""
    return x + sum(shifts)


@mx.compile
def affine(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Compute x * weight + bias in float32, in the type of x."""
    return (x.astype(mx.float32) * weight + bias).astype(x.dtype)


@mx.compile
def affine_silu(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """Compute SiLU of x * weight + bias in float32, in the type of x."""
    y = x.astype(mx.float32) * weight + bias
    return (y * mx.sigmoid(y)).astype(x.dtype)


@mx.compile
def biased_sum(x: mx.array, bias: mx.array, residual: mx.array) -> mx.array:
    """Compute x + bias + residual."""
    return x + bias + residual


@mx.compile
def geglu(x: mx.array, gate: mx.array) -> mx.array:
    """Compute x * GELU(gate) (Shazeer 2020)."""
    return x * nn.gelu(gate)


def group_norm(x: mx.array, groups: int, eps: float, shifts: Sequence[mx.array] = ()) -> mx.array:
    """Normalize the groups of channels of ``x`` [B, H, W, C] + Σ ``shifts``: -> [B, H * W, groups, C / groups].

    A shift is [C], or [1 or B, C] for each map. A group becomes one row, by the copy that adds the shifts. MLX's kernel
    for layer norms computes in float32 and subtracts the mean first. The result is a view for the next kernel.
    """
    b, h, w, c = x.shape
    y = x.reshape(b, h * w, groups, c // groups).transpose(0, 2, 1, 3)
    if shifts:
        y = _shifted(y, *(shift.reshape(-1, groups, 1, c // groups) for shift in shifts))
    rows = mx.fast.layer_norm(y.reshape(b, groups, -1), None, None, eps)
    return rows.reshape(y.shape).transpose(0, 2, 1, 3)


def fused_width(dim: int) -> int:
    """Return the width that heads of ``dim`` are widened to, the same where there is no fused kernel."""
    return next((fused for fused in FUSED if fused >= dim), dim)


def is_fused(dim: int) -> bool:
    """Return whether one kernel computes attention of heads of ``dim``, with scores in float32 whatever their type.

    It does on a GPU for any number of queries up to a width of 64; of wider ones some need more than eight queries.
    """
    return is_default() and dim <= FUSED[0]


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Widen heads with zeros to what a fused kernel takes: they change no score and add columns that are cut off."""
    dim = q.shape[-1]
    width = fused_width(dim)
    if width > dim:
        q, k, v = (mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, width - dim)]) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5)[..., :dim]
