"""List the kernels that ``check`` runs on the default device, each with a reference in numpy's float64.

References are formulas, not calls of MLX, so they hold on every device. The shapes are those of Stable Diffusion, and
those at which MLX's Metal backend switches kernels: Winograd convolutions from 4096 positions, few channels, heads with
and without a fused kernel, products with one row.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from ..models import layers, upsampling
from ..models.resample import resample
from ..models.unet import timestep_embedding

Inputs = Callable[[np.random.Generator], Sequence[np.ndarray]]

TYPES = (mx.float32, mx.float16, mx.bfloat16)
HALF = 2e-3  # of the largest value, in float16
WINOGRAD = 2e-2  # computed for float16: 0.75 % of the standard deviation in the mean, 7 % at most


@dataclass(frozen=True)
class KernelCase:
    """Describe a kernel: its computation on arrays of one type, and its reference in float64.

    ``bound`` is the largest difference over the largest value in float32, ``half`` the one in float16; None omits half
    precision. ``on_cpu`` are the types in which a CPU is fast and exact enough.
    """

    name: str
    inputs: Inputs
    kernel: Callable[..., mx.array]
    reference: Callable[..., np.ndarray]
    bound: float = 1e-6
    half: float | None = HALF
    on_cpu: Collection[mx.Dtype] = TYPES


def bounds(single: float, half: float | None) -> Mapping[mx.Dtype, float]:
    """Return the bound for each type by those for float32 and float16; bfloat16 has three bits less."""
    return {mx.float32: single} | ({} if half is None else {mx.float16: half, mx.bfloat16: 8 * half})


def kernel_error(case: KernelCase, dtype: mx.Dtype) -> float:
    """Return the largest difference between a kernel in ``dtype`` and its reference, over the largest value."""
    arrays = [mx.array(x).astype(dtype) for x in case.inputs(np.random.default_rng(0))]
    return largest_error(case.kernel(*arrays), case.reference(*map(_float64, arrays)))


def largest_error(ours: mx.array, reference: mx.array | np.ndarray) -> float:
    """Return the largest difference over the largest value of the reference; raises ValueError where shapes differ."""
    if ours.shape != reference.shape:
        raise ValueError(f"the shape is {ours.shape} instead of {reference.shape}")
    ours, reference = (_float64(x) if isinstance(x, mx.array) else x for x in (ours, reference))
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def _float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)  # numpy has no bfloat16


def kernel_cases() -> Iterator[KernelCase]:
    """Yield all cases, the simplest first."""
    for m, k, n in ((256, 1024, 256), (1, 1024, 256), (2, 4, 16384)):
        yield KernelCase(f"product {m} x {k} x {n}", _normal((m, k), (n, k)), _linear, _linear, 3e-6)
    yield from _convolutions()
    yield from _attentions()
    yield from _norms()
    yield from _activations()
    for bits, group, rows, width, out in _QUANTIZED:
        name = f"{bits} bits in groups of {group}: product {rows} x {width} x {out}"
        kernel = partial(_quantized, bits=bits, group_size=group)
        # MLX's CPU kernel accumulates half precision in half precision.
        on_cpu = (mx.float32,) if rows * width * out <= 2**27 else ()
        yield KernelCase(name, _levels(rows, width, out, bits, group), kernel, _linear, 5e-6, on_cpu=on_cpu)
    yield from _others()


def _normal(*shapes: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Inputs:
    """Draw normal values; the first array is scaled and shifted, matrices after it keep the scale of inputs."""

    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        x, *weights = (rng.standard_normal(shape, np.float32) for shape in shapes)
        return [x * scale + shift, *(w / math.prod(w.shape[1:]) ** 0.5 for w in weights)]

    return draw


def _linear(x: Any, w: Any) -> Any:
    return x @ w.T


# --- convolutions ---

_CONVOLUTIONS = (  # input, channels of the output, side of the kernel, stride
    ((1, 64, 64, 320), 320, 3, 1),
    ((2, 32, 32, 640), 640, 3, 1),
    ((1, 64, 64, 256), 256, 3, 1),
    ((1, 128, 128, 320), 320, 3, 1),
    ((2, 64, 64, 960), 320, 3, 1),
    *(((1, 33, 31, channels), 320, 3, 1) for channels in (3, 4, 5, 8, 9)),
    *(((1, 32, 32, c), out, 3, 1) for c, out in ((320, 4), (128, 3), (512, 8))),
    ((2, 64, 64, 320), 320, 3, 2),
    ((1, 65, 63, 320), 320, 3, 2),
    ((1, 64, 64, 3), 64, 7, 2),
    ((1, 32, 32, 320), 640, 1, 1),
)


def _convolutions() -> Iterator[KernelCase]:
    for shape, out, side, stride in _CONVOLUTIONS:
        name = f"convolution {side} x {side}, {' x '.join(map(str, shape))} to {out}" + ", stride 2" * (stride == 2)
        inputs = _normal(shape, (out, side, side, shape[-1]))
        may_be_winograd = side == 3 and stride == 1 and math.prod(shape[:3]) >= 4096 and shape[-1] + out >= 256
        half = WINOGRAD if may_be_winograd else HALF
        on_cpu = TYPES if math.prod(shape) * out * side**2 < 2**33 else ()
        kernel, reference = (partial(f, stride=stride) for f in (_convolve, _convolution))
        yield KernelCase(name, inputs, kernel, reference, 1e-5, half, on_cpu)
        if shape == (1, 64, 64, 320):
            kernel = partial(kernel, transposed=True)
            yield KernelCase(f"{name}, transposed weights", inputs, kernel, reference, 1e-5, half)
    padded = partial(_convolution, stride=2, before=0)
    inputs = _normal((1, 65, 62, 128), (128, 3, 3, 128))
    yield KernelCase("convolution of an encoder, padded at the end", inputs, _downsample, padded, 1e-5)
    for channels in (1280, 65):
        yield KernelCase(
            f"convolution of a doubled map, {channels} channels",
            _normal((2, 8, 9, channels), (64, 3, 3, channels)),
            lambda x, w: upsampling.convolve_doubled(x, upsampling.sum_taps(w)),
            lambda x, w: _convolution(_repeated(x), w, stride=1),
            bound=1e-5,
        )


def _convolve(x: mx.array, w: mx.array, stride: int, transposed: bool = False) -> mx.array:
    """Run the layer; ``transposed`` weights have the layout of files, [out, in, h, w]."""
    out, side, _, channels = w.shape
    layer = layers.Conv2d(channels, out, side, stride, padding=side // 2, bias=False)
    if transposed:
        w = mx.contiguous(w.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    layer.weight = w
    return layer(x)


def _downsample(x: mx.array, w: mx.array) -> mx.array:
    layer = layers.Downsample2D(x.shape[-1], pad_end=True)
    layer.conv.weight, layer.conv.bias = w, mx.zeros_like(layer.conv.bias).astype(x.dtype)
    return layer(x)


def _convolution(x: np.ndarray, w: np.ndarray, stride: int, before: int | None = None) -> np.ndarray:
    side = w.shape[1]
    before, after = (side // 2, side // 2) if before is None else (before, 1)
    x = np.pad(x, [(0, 0), (before, after), (before, after), (0, 0)])
    h, w_ = ((length - side) // stride + 1 for length in x.shape[1:3])
    taps = (
        x[:, i : i + stride * h : stride, j : j + stride * w_ : stride][:, :h, :w_] @ w[:, i, j].T
        for i in range(side)
        for j in range(side)
    )
    return sum(taps)


# --- attention ---

_ATTENTIONS = (  # heads, their width, queries, keys
    *((2, 40, 1025, 1025), (2, 64, 1025, 1025), (2, 80, 1024, 1024), (2, 160, 256, 231), (1, 512, 1024, 1024)),
    *((8, 40, 1024, 77), (2, 64, 1, 154), (2, 64, 7, 77), (2, 80, 7, 77), (2, 40, 4096, 4096), (2, 64, 4096, 4096)),
)


def _attentions() -> Iterator[KernelCase]:
    for heads, width, queries, keys in _ATTENTIONS:
        name = f"attention, {heads} head{'s' * (heads > 1)} of {width}, {queries} to {keys}"
        inputs = _heads(heads, width, queries, keys)
        on_cpu = TYPES if queries * keys < 2**21 else ()
        yield KernelCase(name, inputs, _attend, _attention, 5e-6, on_cpu=on_cpu)
    inputs = _heads(12, 64, 77, 77)
    causal = partial(_attention, causal=True)
    yield KernelCase("attention, causal, 12 heads of 64, 77 to 77", inputs, partial(_attend, causal=True), causal, 5e-6)


def _heads(heads: int, width: int, queries: int, keys: int) -> Inputs:
    """Draw queries, keys and values in the layout of the projections, [B, N, heads, D]."""
    shapes = [(1, n, heads, width) for n in (queries, keys, keys)]
    return lambda rng: [rng.standard_normal(shape, np.float32) for shape in shapes]


def _attend(*projections: mx.array, causal: bool = False) -> mx.array:
    q, k, v = (x.transpose(0, 2, 1, 3) for x in projections)
    if causal:  # as models/clip.py calls it
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
    return layers.attention(q, k, v, 2**26)


def _attention(*projections: np.ndarray, causal: bool = False) -> np.ndarray:
    q, k, v = (x.transpose(0, 2, 1, 3) for x in projections)
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores += np.triu(np.full(scores.shape[-2:], -np.inf), 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ v / weights.sum(-1, keepdims=True)


# --- norms and activations ---


def _norms() -> Iterator[KernelCase]:
    maps = ((2, 32, 32, 320), 1.0, 100.0), ((2, 32, 32, 320), 1e-3, 0.0), ((1, 256, 256, 128), 1.0, 2.0)
    for eps in (1e-5, 1e-6):
        for shape, scale, shift in maps:
            size = " x ".join(map(str, shape))
            inputs = _normal(shape, shape[-1:], shape[-1:], scale=scale, shift=shift)
            kernel, reference = partial(_group_norm, eps=eps), partial(_group_normalized, eps=eps)
            name = f"group norm {size}, scale {scale:g}, mean {shift:g}, eps {eps:g}"
            yield KernelCase(name, inputs, kernel, reference, 1e-5, on_cpu=TYPES if shape[1] < 64 else ())
    yield KernelCase(
        "group norm with SiLU",
        _normal((2, 33, 31, 64), (64,), (64,), scale=3, shift=5),
        partial(_group_norm, eps=1e-5, activated=True),
        lambda *arrays: _silu(_group_normalized(*arrays, eps=1e-5)),
        bound=1e-5,
    )
    for scale, shift in ((1.0, 10.0), (1e-3, 0.0)):
        for rows, width in ((4096, 320), (77, 768), (256, 1280), (77, 2048)):
            inputs = _normal((rows, width), (width,), (width,), scale=scale, shift=shift)
            name = f"layer norm {rows} x {width}, scale {scale:g}, mean {shift:g}"
            yield KernelCase(name, inputs, lambda *args: layers.layer_norm(*args, 1e-5), _layer_normalized, 1e-5)


def _group_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float, activated: bool = False) -> mx.array:
    norm = layers.GroupNorm(32, x.shape[-1], eps)
    norm.weight, norm.bias = weight, bias
    return norm.activated(x) if activated else norm(x)


def _group_normalized(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    groups = x.reshape(len(x), -1, 32, x.shape[-1] // 32)
    mean, variance = (f(groups, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    return ((groups - mean) / np.sqrt(variance + eps)).reshape(x.shape) * weight + bias


def _layer_normalized(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean, variance = (f(x, axis=-1, keepdims=True) for f in (np.mean, np.var))
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def _silu(x: np.ndarray, slope: float = 1.0) -> np.ndarray:
    return x * (1 + np.tanh(slope * x / 2)) / 2


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def _activations() -> Iterator[KernelCase]:
    for scale in (1e-2, 3.0, 20.0, 5e3):
        inputs = _normal((32, 320), scale=scale)
        yield KernelCase(f"silu, scale {scale:g}", inputs, layers.silu, _silu)
        yield KernelCase(f"gelu, scale {scale:g}", inputs, layers.gelu, _gelu)
        quick = partial(_silu, slope=1.702)
        yield KernelCase(f"quick gelu, scale {scale:g}", inputs, nn.gelu_fast_approx, quick)
    half = "gelu of half of a wider array", _normal((77, 640))
    yield KernelCase(*half, lambda x: layers.gelu(mx.split(x, 2, axis=-1)[1]), lambda x: _gelu(x[:, 320:]))


# --- quantized products ---

_QUANTIZED = (  # bits, group size, rows, width, outputs
    *((bits, 32, 77, 640, 320) for bits in (2, 3, 4, 5, 6, 8)),
    *((8, 64, rows, 768, 768) for rows in (1, 2, 77)),
    *((4, 64, 77, 1280, 1280), (8, 32, 4096, 320, 1280), (8, 32, 40000, 640, 640), (4, 32, 1024, 10240, 1280)),
)


def _levels(rows: int, width: int, outputs: int, bits: int, group_size: int) -> Inputs:
    """Draw inputs, and weights that quantization keeps exactly: each group has the lowest and the highest level."""

    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        w = rng.integers(low, high, (outputs, width // group_size, group_size))
        w[..., 0], w[..., -1] = low, high - 1
        return [rng.standard_normal((rows, width), np.float32), w.reshape(outputs, width).astype(np.float32) / 2**bits]

    return draw


def _quantized(x: mx.array, w: mx.array, bits: int, group_size: int) -> mx.array:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = w
    return linear.to_quantized(group_size=group_size, bits=bits)(x)


# --- random numbers, reductions, interpolation ---

# Every 250th of 1001 numbers of key 7, as MLX 0.32 draws them on a CPU.
_NORMAL = (0.102855064, 2.08967471, 0.883278966, 1.22986174, -0.353959143)
_UNIFORM = (0.540960968, 0.981676459, 0.811457217, 0.890625536, 0.36168474)


def _others() -> Iterator[KernelCase]:
    for name, draw, recorded, bound in (
        ("normal random numbers", mx.random.normal, _NORMAL, 2e-6),
        ("uniform random numbers", mx.random.uniform, _UNIFORM, 2e-7),
    ):
        yield KernelCase(
            f"{name}, as recorded",
            lambda rng: (),
            lambda draw=draw: draw(shape=(1001,), key=mx.random.key(7))[::250],
            partial(np.array, recorded),
            bound,
            half=None,
        )
    yield KernelCase(
        "sum of 512 x 512 positions",
        _normal((512, 512, 8), shift=1),
        lambda x: x.astype(mx.float32).sum(axis=0).sum(axis=0),  # as in GroupNorm
        lambda x: x.sum((0, 1)),
        bound=5e-6,
    )
    yield KernelCase("sorting 16384 values", _normal((16384,)), lambda x: x[mx.argsort(x)], np.sort, 0, half=0)
    first = "first of 77", _normal((2, 77)), lambda x: mx.argmax(x > 1, -1), lambda x: np.argmax(x > 1, -1)
    yield KernelCase(*first, 0, half=0)
    places = np.random.default_rng(1).integers(0, 64, 1024)
    yield KernelCase(
        "sums of rows at 64 places",
        _normal((1024, 320)),
        lambda x: mx.zeros((64, 320), x.dtype).at[mx.array(places)].add(x),
        lambda x: np.stack([x[places == i].sum(0) for i in range(64)]),
        half=5e-3,
    )
    yield KernelCase("doubling a map", _normal((2, 9, 7, 320)), upsampling.upsample_nearest, _repeated, 0, half=0)
    kernel = partial(resample, size=(23, 40))
    yield KernelCase("resampling 16 x 24 to 23 x 40", _normal((1, 16, 24, 4)), kernel, _interpolated, 5e-6)
    kernel = partial(timestep_embedding, dim=320)
    yield KernelCase("embedding of timesteps", lambda rng: [np.arange(0, 1000, 37)], kernel, _waves, 1e-4, half=None)


def _repeated(x: np.ndarray) -> np.ndarray:
    return x.repeat(2, axis=1).repeat(2, axis=2)


def _interpolated(x: np.ndarray) -> np.ndarray:
    for axis, new in ((1, 23), (2, 40)):
        old = x.shape[axis]
        places = (np.arange(new) + 0.5) * old / new - 0.5
        x = np.apply_along_axis(lambda line, at=places: np.interp(at, np.arange(len(line)), line), axis, x)
    return x


def _waves(t: np.ndarray) -> np.ndarray:
    angles = t[:, None] * np.exp(-math.log(10000) * np.arange(160) / 160)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
