"""Layers and kernels shared by the networks. Images are NHWC, sequences [B, N, C]."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import cpu, gpu
from .seamless import pad, padded

Kernel = Callable[..., mx.array]

# Multiply-adds of one kernel on a GPU: about a second on the slowest Macs (computed). macOS stops kernels that take
# some seconds, see https://github.com/exo-explore/exo/issues/1620.
_LONGEST = 2**40
WINOGRAD_POSITIONS = 4096  # fewest positions, in all rows of the input, for Metal's Winograd algorithm (MLX 0.32)
_QUERIES = 128  # fewest queries in a product on a CPU: 32 reach 2/3 of its rate, at 16,384 and 65,536 keys
_SCORES = 2**22  # bytes of attention scores in a gradient, which holds several copies


class Group(nn.Module):
    """Hold modules and parameters under a name of the checkpoint, and compute nothing."""

    def __init__(self, **children: Any):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


silu = cpu.for_float32(cpu.silu, nn.silu)  # x * sigmoid(x) (Elfwing et al. 2018)
gelu = cpu.for_float32(cpu.gelu, nn.gelu)  # x * (1 + erf(x / sqrt(2))) / 2 (Hendrycks & Gimpel 2016)
softmax = cpu.for_float32(cpu.softmax, partial(mx.softmax, axis=-1, precise=True))  # of the last axis
layer_norm = cpu.for_float32(cpu.layer_norm, lambda *inputs: mx.fast.layer_norm(*inputs))  # Ba et al. 2016

_convolve = cpu.for_float32(cpu.convolve, lambda *inputs: mx.conv2d(*inputs))


@mx.compile
def scaled(x: mx.array, mean: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """Compute (x - mean) * scale + shift in float32, in the type of x. A large mean causes no cancellation."""
    return ((x.astype(mx.float32) - mean) * scale + shift).astype(x.dtype)


@mx.compile
def _scaled_silu(x: mx.array, mean: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    y = (x.astype(mx.float32) - mean) * scale + shift
    return (y * mx.sigmoid(y)).astype(x.dtype)


scaled_silu = cpu.for_float32(cpu.scaled_silu, _scaled_silu)


_attend = cpu.for_float32(cpu.attention, gpu.attention)


@mx.compile
def _scores_gradient(p: mx.array, dp: mx.array, mean: mx.array) -> mx.array:
    return (p * (dp - mean)).astype(p.dtype)


def _attention_gradients(
    inputs: Sequence[mx.array], change: mx.array, out: mx.array, upcast: bool = False, dim: int | None = None
) -> tuple[mx.array, ...]:
    """Recompute the scores, for as many heads at a time as fit ``_SCORES`` bytes (Dao et al. 2022, alg. 4)."""
    heads = [x.reshape(-1, *x.shape[2:]) for x in (*inputs, change, out)]
    step = max(_SCORES // (4 * inputs[0].shape[2] * inputs[1].shape[2]), 1)
    parts: list[tuple[mx.array, ...]] = []
    for q, k, v, change, o in zip(*(mx.split(x, list(range(step, len(x), step))) for x in heads), strict=True):
        q, change = mx.depends([q, change], list(parts[-1])) if parts else (q, change)
        if upcast:
            q, k, v, change = (x.astype(mx.float32) for x in (q, k, v, change))
        scale = (dim or q.shape[-1]) ** -0.5
        p = softmax((scale * q) @ k.swapaxes(-1, -2))
        dp = change @ v.swapaxes(-1, -2)
        mean = (p * dp if upcast else change.astype(mx.float32) * o).sum(axis=-1, keepdims=True)
        ds = _scores_gradient(p, dp, mean)
        part = [scale * (ds @ k), scale * (ds.swapaxes(-1, -2) @ q), p.swapaxes(-1, -2) @ change]
        part = [gradient.astype(out.dtype) for gradient in part]
        parts.append(mx.depends(part, part))  # all three at once, so that the scores are freed
    return tuple(mx.concatenate(xs).reshape(x.shape) for xs, x in zip(zip(*parts, strict=True), inputs, strict=True))


_after = mx.custom_function(lambda x, done: mx.depends(x, done))  # reversed in gradients
_after.vjp(lambda inputs, change, _: (change, mx.depends(mx.zeros_like(inputs[1]), change)))


@cache
def _attention_kernel(upcast: bool, dim: int | None) -> Kernel:
    """Attend, with scores of the gradient in float32 if ``upcast``; ``dim`` is the width of padded heads."""
    kernel = mx.custom_function(partial(gpu.attention, dim=dim) if dim else lambda q, k, v: _attend(q, k, v))
    kernel.vjp(partial(_attention_gradients, upcast=upcast, dim=dim))
    return kernel


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    largest: float = math.inf,
    axis: int = 0,
    *,
    upcast: bool = False,
    dim: int | None = None,
) -> mx.array:
    """Compute scaled dot-product attention (Vaswani et al. 2017): q [B, heads, N, D], k and v [B, heads, M, D] -> as q.

    ``upcast`` computes the scores of gradients in float32, as fused kernels do. ``dim`` is the width of heads that were
    padded with zeros to D.
    Without a fused kernel the scores of all pairs would be in memory. Then parts are computed one after the other:
    images, heads or queries with at most ``largest`` bytes of scores, and on a GPU at most ``_LONGEST`` per kernel.
    Products with few rows are slow, so images and heads are split first, then queries into ``_QUERIES`` or more.
    """
    on_cpu, width = mx.default_device() == mx.cpu, q.shape[-1]
    limit = largest / q.itemsize if on_cpu or width > gpu.FUSED[-1] else math.inf
    if not on_cpu:
        limit = min(limit, _LONGEST / (2 * gpu.fused_width(width)))
    scores = math.prod(q.shape[:3]) * k.shape[2]
    if axis > 2 or scores <= limit:
        return _attention_kernel(upcast and q.dtype != mx.float32, None if dim == width else dim)(q, k, v)
    length = q.shape[axis]
    step = max(int(length * limit // scores), _QUERIES if on_cpu and axis == 2 else 1)
    cuts = list(range(step, length, step))
    queries = mx.split(q, cuts, axis)
    k, v = (mx.split(x, cuts, axis) if axis < 2 else [x] * len(queries) for x in (k, v))
    results: list[mx.array] = []
    for q, *kv in zip(queries, k, v, strict=True):
        # One after the other, or all scores would be in memory at once.
        q = _after(q, results[-1]) if results else q
        results.append(attention(q, *kv, largest, axis + 1, upcast=upcast, dim=dim))
    return mx.concatenate(results, axis=axis)


def split_heads(x: mx.array, b: int, heads: int) -> mx.array:
    """Split channels into heads: [B, N, C] or [B * N, C] -> [B, heads, N, C / heads]."""
    return x.reshape(b, -1, heads, x.shape[-1] // heads).transpose(0, 2, 1, 3)


def multi_head_attention(q: mx.array, k: mx.array, v: mx.array, heads: int, mask: str | None = None) -> mx.array:
    """Compute attention of several heads by MLX's kernel: q [B, N, C], k and v [B, M, C] -> [B, N, C]."""
    q, k, v = (split_heads(x, len(x), heads) for x in (q, k, v))
    y = mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
    return y.transpose(0, 2, 1, 3).flatten(2)


class GroupNorm(nn.Module):
    """Normalize groups of channels of NHWC maps (Wu & He 2018), in float32 and without transposes.

    The mean is subtracted before the product, so a large mean costs no further precision.
    """

    def __init__(self, groups: int, channels: int, eps: float):
        super().__init__()
        self.weight = mx.ones(channels)
        self.bias = mx.zeros(channels)
        self._groups = groups
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return self._on_gpu(x, gpu.affine) if gpu.is_default() else self.normalize(x, *self.moments(x))

    def activated(self, x: mx.array, *shifts: mx.array) -> mx.array:
        """Normalize ``x`` + Σ ``shifts``, each [C] or [1 or B, C], and compute the SiLU, in few passes over maps."""
        if gpu.is_default():
            return self._on_gpu(x, gpu.affine_silu, shifts)
        for shift in shifts:
            x = x + shift[..., None, None, :]
        return self.normalize(x, *self.moments(x), kernel=scaled_silu)

    def _on_gpu(self, x: mx.array, kernel: Kernel, shifts: Sequence[mx.array] = ()) -> mx.array:
        y = gpu.group_norm(x, self._groups, self._eps, shifts)
        return kernel(y, *(p.reshape(self._groups, -1) for p in (self.weight, self.bias))).reshape(x.shape)

    def moments(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return mean and variance of the groups of ``x``, each [B, 1, 1, C] float32 and equal within a group."""
        x = x.astype(mx.float32)
        mean = self._mean(x)
        return mean, self._mean(_squared_distance(x, mean))

    def normalize(self, x: mx.array, mean: mx.array, variance: mx.array, kernel: Kernel = scaled) -> mx.array:
        """Normalize ``x``, a map or a part of it, by the moments of its map."""
        return kernel(x, mean, _scale(self.weight, variance, mx.array(self._eps)), self.bias)

    def _mean(self, x: mx.array) -> mx.array:
        """[B, H, W, C] -> [B, 1, 1, C]: MLX's CPU kernels run along channels twice as fast as along groups.

        They add values one by one, so a sum over 512 × 512 positions would have an error of 2e-4.
        """
        b, _, _, c = x.shape
        sums = x.sum(axis=1).sum(axis=1).reshape(b, self._groups, -1)
        means = sums.sum(axis=-1, keepdims=True) * (self._groups * b / x.size)
        return mx.broadcast_to(means, sums.shape).reshape(b, 1, 1, c)


@mx.compile
def _squared_distance(x: mx.array, mean: mx.array) -> mx.array:
    return mx.square(x - mean)


@mx.compile
def _scale(weight: mx.array, variance: mx.array, eps: mx.array) -> mx.array:
    return weight * mx.rsqrt(variance + eps)


class LayerNorm(nn.LayerNorm):
    """Normalize the last axis, by the kernel of the backend."""

    def __call__(self, x: mx.array) -> mx.array:
        return layer_norm(x, self.weight, self.bias, self.eps)


def suits_winograd(weight: Sequence[int], stride: Sequence[int] = (1, 1)) -> bool:
    """Return whether Metal convolves large maps by Winograd's algorithm with weights of this shape [O, kh, kw, C]."""
    o, *kernel, c = weight
    return kernel == [3, 3] and tuple(stride) == (1, 1) and c % 32 == o % 32 == 0 and c + o >= 256


def rows_alike(
    x: tuple[int, ...], weight: tuple[int, ...], stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0)
) -> float:
    """Return the most rows that Metal convolves by the same kernel as one row; math.inf for any number.

    ``x`` is the shape [B, H, W, C] of the input and ``weight`` [O, kh, kw, C]. MLX (0.32, ``dispatch_conv_2D_gpu``)
    counts the positions of all rows: from 4096 of the input on it may use Winograd's algorithm, from 256 of the output
    on it pads channels that do not fit a tile.
    """
    (_, *size, c), (o, *kernel, _) = x, weight
    if suits_winograd(weight, stride):
        positions, threshold = math.prod(size), WINOGRAD_POSITIONS
    elif (c > 4 and c % 16) or (o > 16 and o % 16):
        sides = zip(size, kernel, stride, padding, strict=True)
        positions, threshold = math.prod((n + 2 * p - k) // s + 1 for n, k, s, p in sides), 256
    else:
        return math.inf
    return (threshold - 1) // positions or math.inf


def conv2d(x: mx.array, weight: mx.array, stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0)) -> mx.array:
    """Convolve maps [B, H, W, C] by ``weight`` [O, kh, kw, C]; on a GPU each row by the kernel for a single row.

    Half-precision kernels differ by up to 0.75 % (rms), so images would depend on the batch size.
    """
    x, padding = padded(x, padding)
    rows = math.inf if mx.default_device() == mx.cpu else rows_alike(x.shape, weight.shape, stride, padding)
    if len(x) <= rows:
        return _convolve(x, weight, stride, padding)
    parts = mx.split(x, list(range(rows, len(x), rows)))
    return mx.concatenate([_convolve(part, weight, stride, padding) for part in parts])


class Conv2d(nn.Conv2d):
    """Convolve as :func:`conv2d`, so that a row's result does not depend on its batch."""

    def __call__(self, x: mx.array) -> mx.array:
        y, bias = self.apart(x)
        return y + bias if "bias" in self else y

    def apart(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return the convolution of ``x`` without bias, and the bias [C], which the next kernel can add."""
        y = conv2d(x, self.weight, self.stride, self.padding)
        return y, self.bias if "bias" in self else mx.zeros(y.shape[-1], y.dtype)


@dataclass
class Context:
    """Cache each layer's keys and values of an encoded prompt, the same in all steps of a run."""

    encoded: mx.array  # [B, M, D]
    v_encoded: mx.array | None = None  # the input of values, if it differs
    is_perturbed: mx.array | None = None  # [B]: 1 for rows with identity attention maps (PAG)
    perturbed_layers: Collection[int] = ()  # numbers of their self-attentions
    images: Sequence[Any] = ()  # image tokens beside the prompt, see ``ip_adapter.ImageTokens``
    _cache: dict[int, tuple[mx.array, mx.array]] = field(default_factory=dict)  # not filled in training

    def keys_and_values(self, layer: "Attention") -> tuple[mx.array, mx.array]:
        """Return a layer's keys and values, both [B, heads, M, C / heads]."""
        if not layer.training and layer.number in self._cache:
            return self._cache[layer.number]
        v_encoded = self.encoded if self.v_encoded is None else self.v_encoded
        pair = layer.keys_and_values(self.encoded, v_encoded, len(self.encoded))
        if not layer.training:
            self._cache[layer.number] = pair
        return pair


_layer_numbers = count()


class Attention(nn.Module):
    """Compute multi-head attention (Vaswani et al. 2017); self-attention when no ``context`` is given.

    ``upcast`` computes scores and softmax in float32 for any type: SD 2.1 overflows float16 there.
    ``largest_scores`` is in bytes, see :func:`attention`. Each layer has a ``number``, unique in the process.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int | None = None,
        *,
        bias: bool = False,
        upcast: bool = False,
        largest_scores: int = 2**23,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention width {dim} does not divide into {heads} heads")
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = [nn.Linear(dim, dim)]
        self.number = next(_layer_numbers)
        self._heads = heads
        self._upcast = upcast
        self._largest_scores = largest_scores
        self._inputs = (("to_q", "to_k", "to_v"),) if context_dim is None else (("to_q",), ("to_k", "to_v"))
        self._joined = gpu.Joined()

    def join(self) -> None:
        """Compute products of the same input as one on a GPU, for the current parameters: :class:`gpu.Joined`."""
        for names in self._inputs:
            self._joined.add_rows(names, [self[name] for name in names], self._heads)
        self._joined.add_columns(self.to_out[0], self._heads)

    def __call__(
        self, x: mx.array, b: int, context: Context | None = None, is_perturbed: mx.array | None = None
    ) -> mx.array:
        """Attend from ``x`` [B * N, C], the positions of ``b`` maps one after the other, to itself or ``context``.

        Where ``is_perturbed`` [B] is 1, each position attends only to itself (Ahn et al. 2024).
        """
        if context is None:
            q, k, v = self._project(x, b, *self._inputs[0])
        else:
            q, (k, v) = self._project(x, b, "to_q")[0], context.keys_and_values(self)
        q, k, v = (y[..., : min(q.shape[-1], k.shape[-1])] for y in (q, k, v))  # all three have padded heads, or none
        dim = x.shape[-1] // self._heads
        out = attention(q, k, v, self._largest_scores, upcast=self._upcast, dim=dim)
        for tokens in () if context is None else context.images:
            if self.number in tokens.layers:
                *kv, weight = tokens.keys_and_values(self.number, q)
                out = out + weight * attention(q, *kv, self._largest_scores, upcast=self._upcast, dim=dim)
        if is_perturbed is not None:
            out = mx.where(is_perturbed[:, None, None, None], v, out)
        return self._joined.out(self.to_out[0], out.transpose(0, 2, 1, 3).astype(x.dtype), dim).reshape(x.shape)

    def keys_and_values(self, k: mx.array, v: mx.array, b: int) -> tuple[mx.array, mx.array]:
        """Project the inputs of keys and values, [B, M, D] or [B * M, D] -> [B, heads, M, C / heads or more]."""
        if k is v:
            return tuple(self._project(k, b, "to_k", "to_v"))
        return self._project(k, b, "to_k")[0], self._project(v, b, "to_v")[0]

    def _project(self, x: mx.array, b: int, *names: str) -> list[mx.array]:
        """[B, N, C] or [B * N, C] -> a product for each of the layers with these names, [B, heads, N, C / heads]."""
        products = []
        for y in self._joined.rows(names, [self[name] for name in names], x):
            y = split_heads(y, b, self._heads)
            products.append(y.astype(mx.float32) if self._upcast and not gpu.is_fused(y.shape[-1]) else y)
        return products


class ResnetBlock2D(nn.Module):
    """Compute a residual block (He et al. 2016, pre-activation) with the timestep added between its convolutions.

    ``temb_dim`` is None in the autoencoder, which has no timesteps. ``conv_shortcut`` is a 1×1 convolution in files.
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float, temb_dim: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_dim is not None:
            self.time_emb_proj = nn.Linear(temb_dim, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Linear(in_channels, out_channels)

    def __call__(self, x: mx.array, temb: mx.array | None = None) -> mx.array:
        """[B, H, W, C_in] -> [B, H, W, C_out], at the embedded timesteps ``temb`` [B or 1, T], after their SiLU."""
        shifts = [] if temb is None else [self.time_emb_proj(temb)]
        residual = self.conv_shortcut(x) if "conv_shortcut" in self else x
        y = self.norm1.activated(x)
        if gpu.is_default():
            y, bias = self.conv1.apart(y)
            y, last = self.conv2.apart(self.norm2.activated(y, bias, *shifts))
            return gpu.biased_sum(y, last, residual)
        return self.conv2(self.norm2.activated(self.conv1(y), *shifts)) + residual


class Downsample2D(nn.Module):
    """Halve height and width with a strided convolution; ``pad_end`` pads only below and on the right, as VAEs do."""

    def __init__(self, channels: int, *, pad_end: bool = False):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=0 if pad_end else 1)
        self._pad_end = pad_end

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(pad(x, (0, 1), (0, 1)) if self._pad_end else x)
