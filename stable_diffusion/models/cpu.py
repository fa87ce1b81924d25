"""Hold all code that is specific to a CPU: OpenBLAS, its threads, parallel streams, and float32 kernels.

On Linux, MLX is built with the reference BLAS, whose float32 products run at about 2 GFLOP/s. OpenBLAS, if it is
installed, is loaded here before MLX, so that its symbols are used: its products are about fifty times faster.

GPUs of the M5 and later, and NVIDIA's, round the factors of float32 products to TF32, 11 bits, unless MLX_ENABLE_TF32
is 0 when MLX first computes. Networks run in float32 because they need this precision, so 0 is the default here.

The kernels are polynomials, which a compiler turns into loops of products and sums. MLX computes exp and erf one value
at a time, which is most of the time of a softmax over 4096 positions. The results are equal, to rounding.
"""

import ctypes
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from typing import Any

_openblas: Any = None
if sys.platform == "linux":
    with suppress(OSError):
        _openblas = ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)

os.environ.setdefault("MLX_ENABLE_TF32", "0")

# isort: split
import mlx.core as mx  # noqa: E402

from . import winograd  # noqa: E402

DEVICES = ("cpu", "gpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h
_cores = 1  # for products and streams; tune() counts them
_thread = threading.local()  # MLX's streams belong to threads

# Held while this process waits for others (app/sharing.py). Without a GPU, MLX frees buffers only when all streams are
# done, also those of other threads. Meanwhile no thread runs Python, not even the one that would end the wait.
collective: AbstractContextManager[Any] = nullcontext() if mx.is_available(mx.gpu) else threading.Lock()


def tune() -> None:
    """Tune this process for a CPU: memory allocator, threads for matrix products, and parallel streams.

    Call it once, before the first run. It has no effect on a Mac. glibc would return freed arrays above 32 MB to the
    system, at ten times the cost of an elementwise product. So it keeps them: the process stays at its memory peak.
    """
    global _cores
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    count = getattr(_openblas, "openblas_get_num_threads", None)  # some builds use other names
    _cores = 1 if count is None else count()


def choose_device(name: str | None = None) -> None:
    """Set the default device, "cpu" or "gpu". By default it is SD_DEVICE from the environment, or MLX's.

    On a Mac without command line tools, MLX looks for a compiler before it computes on the CPU, and macOS opens a
    dialog that offers to install them. So ``mx.compile`` is turned off there.

    Raises ValueError for another name, or a device that MLX does not find.
    """
    if name := name or os.environ.get("SD_DEVICE"):
        if name not in DEVICES:
            raise ValueError(f"the device {name!r} is unknown; choose cpu or gpu")
        if not mx.is_available(device := mx.Device(getattr(mx, name))):
            raise ValueError(f"MLX {mx.__version__} finds no {name} here; omit the device, also in SD_DEVICE")
        mx.set_default_device(device)
    if sys.platform == "darwin" and mx.default_device() == mx.cpu:
        import subprocess

        if subprocess.run(["xcode-select", "-p"], capture_output=True, check=False).returncode:
            mx.disable_compile()


def parts(rows: int) -> int:
    """Return the number of equal parts in which to compute a batch of ``rows`` in parallel, each on one core.

    OpenBLAS uses all cores for a product, but MLX computes everything else on one core. Parts on different streams run
    in parallel: on two cores, a step of SD 2.1 with guidance takes four fifths of the time. It is one part if the rows
    do not divide by the cores, on a GPU, and in low memory, where MLX must not work ahead.
    """
    divides = mx.default_device() == mx.cpu and mx.get_memory_limit() > 0 and rows % _cores == 0
    return _cores if divides else 1


def stream_of(part: int, count: int) -> AbstractContextManager:
    """Build the graph of one of ``count`` parts within this context: on its stream, with its part of the cores."""
    if _cores == 1:
        return nullcontext()
    _openblas.openblas_set_num_threads(_cores // count)
    if part == 0:
        return nullcontext()
    streams = _thread.__dict__.setdefault("streams", {})
    if part not in streams:
        streams[part] = mx.new_stream(mx.cpu)
    return mx.stream(streams[part])


def all_cores() -> None:
    """Let products use all cores again, after parallel parts. It has no effect before :func:`tune`."""
    if _cores > 1:
        _openblas.openblas_set_num_threads(_cores)


def clear_cache() -> None:
    """Free the memory that MLX holds for reuse. If that waits for all streams, other threads run meanwhile."""
    with collective:
        mx.clear_cache()


class _AtThreadEnd:
    """Clear MLX's streams of the thread that holds this object, when the thread ends and drops it."""

    def __del__(self) -> None:
        mx.synchronize()
        mx.clear_streams()


def clear_streams_at_thread_end() -> None:
    """Clear MLX's streams of this thread when it ends.

    Otherwise MLX (0.32) aborts the process at exit once a worker thread has computed. The main thread is not affected.
    """
    if threading.current_thread() is not threading.main_thread() and not hasattr(_thread, "end"):
        _thread.end = _AtThreadEnd()


def for_float32(kernel: Callable[..., mx.array], otherwise: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Return a function that calls ``kernel`` for float32 on the CPU as default device, and else ``otherwise``."""

    def dispatch(x: mx.array, *args: Any) -> mx.array:
        return (kernel if mx.default_device() == mx.cpu and x.dtype == mx.float32 else otherwise)(x, *args)

    return dispatch


def convolve(x: mx.array, weight: mx.array, stride: Sequence[int], padding: Sequence[int]) -> mx.array:
    """Convolve maps [B, H, W, C] by ``weight`` [O, kh, kw, C], large ones by Winograd's algorithm.

    The gradient of the maps is a product, too. MLX (0.32) copies the weights twice for it, up to eleven times the cost
    of the product for small maps. At stride 2 it uses a loop that is forty times slower. Here they are copied once, for
    large maps only.
    """
    return _convolution(tuple(stride), tuple(padding))(x, weight)


@cache
def _convolution(stride: tuple[int, int], padding: tuple[int, int]) -> Callable[[mx.array, mx.array], mx.array]:
    @mx.custom_function
    def convolution(x: mx.array, weight: mx.array) -> mx.array:
        h, w = (n + 2 * p for n, p in zip(x.shape[1:3], padding, strict=True))
        is_large = len(x) * (h - 2) * (w - 2) >= winograd.fewest_positions(len(weight))
        if not (is_large and winograd.suits(weight, stride)):
            return mx.conv2d(x, weight, stride, padding)
        x = mx.pad(x, [(0, 0), *((p, p) for p in padding), (0, 0)])
        return winograd.convolve(x, winograd.transform(weight))

    @convolution.vjp
    def gradients(inputs: Sequence[mx.array], change: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        x, weight = inputs
        (o, *_, c), positions = weight.shape, change.size // change.shape[-1]
        gathers = stride == (1, 1) and 2 * positions * c > positions * o + o * c  # values that it copies
        of_weight = mx.vjp(partial(mx.conv2d, x, stride=stride, padding=padding), [weight], [change])[1][0]
        if gathers:
            return _gather(x.shape, weight, padding, change), of_weight
        return _scatter(x.shape, weight, stride, padding, change), of_weight

    return convolution


def _gather(shape: tuple[int, ...], weight: mx.array, padding: tuple[int, int], change: mx.array) -> mx.array:
    """Compute the gradient of maps of ``shape``: convolve the changes by a rotated kernel."""
    (b, h, w, c), (_, kh, kw, _) = shape, weight.shape
    sides = [(k - 1 - p,) * 2 for k, p in zip((kh, kw), padding, strict=True)]
    y = mx.pad(change, [(0, 0), *sides, (0, 0)])
    parts = [y[:, i : i + h, j : j + w] for i in reversed(range(kh)) for j in reversed(range(kw))]
    return (mx.concatenate(parts, axis=-1) @ weight.transpose(1, 2, 0, 3).reshape(-1, c)).reshape(b, h, w, c)


def _scatter(
    shape: tuple[int, ...], weight: mx.array, stride: tuple[int, int], padding: tuple[int, int], change: mx.array
) -> mx.array:
    """Compute the same gradient from one product for all kernel positions, added at their places."""
    (b, h, w, c), (o, kh, kw, _), (_, rows, columns, _) = shape, weight.shape, change.shape
    y = (change.reshape(-1, o) @ weight.reshape(o, -1)).reshape(b, rows, 1, columns, 1, -1)
    if max(stride) > 1:
        y = mx.pad(y, [(0, 0), (0, 0), (0, stride[0] - 1), (0, 0), (0, stride[1] - 1), (0, 0)])
    y = y.reshape(b, rows * stride[0], columns * stride[1], kh, kw, c)
    below, right = (max(n + p - m, 0) for n, p, m in zip((h, w), padding, y.shape[1:3], strict=True))
    y = mx.pad(y, [(0, 0), (kh - 1, below), (kw - 1, right), (0, 0), (0, 0), (0, 0)])
    tops, lefts = (range(p + k - 1, p - 1, -1) for p, k in zip(padding, (kh, kw), strict=True))
    parts = (y[:, top : top + h, left : left + w, i, j] for i, top in enumerate(tops) for j, left in enumerate(lefts))
    return sum(parts, mx.zeros(()))


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attend from q [B, heads, N, D] to k and v [B, heads, M, D]; a column of ones sums the weights beside v."""
    scores = q @ k.swapaxes(-1, -2)
    weights = _exp(_scaled_difference(scores, scores.max(axis=-1, keepdims=True), mx.array(q.shape[-1] ** -0.5)))
    sums = weights @ mx.pad(v, [(0, 0), (0, 0), (0, 0), (0, 1)], constant_values=1)
    weighted, total = mx.split(sums, [v.shape[-1]], axis=-1)
    return weighted / total


def softmax(x: mx.array) -> mx.array:
    """Compute the softmax of the last axis."""
    weights = _exp(_scaled_difference(x, x.max(axis=-1, keepdims=True), mx.array(1.0)))
    return weights / weights.sum(axis=-1, keepdims=True)


@mx.custom_function
def silu(x: mx.array) -> mx.array:
    """Compute x * sigmoid(x), element by element."""
    return _silu(x, _exp(_minus_size(x)))


@silu.vjp
def _silu_gradient(x: mx.array, change: mx.array, _: mx.array) -> mx.array:
    return change * _silu_slope(x)


@mx.custom_function
def scaled_silu(x: mx.array, mean: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """Compute the SiLU of (x - mean) * scale + shift, which broadcast over x."""
    y, exponent = _scaled_and_minus_size(x, mean, scale, shift)
    return _silu(y, _exp(exponent))


@scaled_silu.vjp
def _scaled_silu_gradients(inputs: Sequence[mx.array], change: mx.array, _: mx.array) -> list[mx.array]:
    def y(x: mx.array, mean: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
        return (x - mean) * scale + shift

    return mx.vjp(y, list(inputs), [change * _silu_slope(y(*inputs))])[1]


@mx.custom_function
def gelu(x: mx.array) -> mx.array:
    """Compute x * (1 + erf(x / sqrt(2))) / 2, element by element."""
    x = x + 0.0  # a contiguous copy: loops over half of a wider array, as in GEGLU, are not vectorized
    return _gelu(x, _erf_polynomial(x), _exp(_minus_half_square(x)))


@gelu.vjp
def _gelu_gradient(x: mx.array, change: mx.array, _: mx.array) -> mx.array:
    """Multiply by Φ(x) + x φ(x), the normal distribution and its density."""
    e = _power_of_e(-0.5 * x * x)
    return change * (0.5 + 0.5 * mx.sign(x) * (1 - _erf_polynomial(x) * e) + (0.5 / math.pi) ** 0.5 * x * e)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Normalize the last axis. Products sum it, closer to float64 than MLX's kernel."""
    y, mean = x.reshape(-1, x.shape[-1]), mx.full((x.shape[-1], 1), 1 / x.shape[-1])
    y, squares = _centred(y, y @ mean)
    return _scaled_rows(y, mx.rsqrt(squares @ mean + eps), weight, bias).reshape(x.shape)


def _exp(x: mx.array) -> mx.array:
    """exp(x) for -32 <= x <= 0, to 1e-6 of the largest value 1: Taylor's polynomial of x / 16, to the power of 16."""
    return _sixteenth_power(_taylor(x))


def _silu_slope(x: mx.array) -> mx.array:
    e = _power_of_e(mx.minimum(-x, 80.0))
    s = 1 / (1 + e)
    return s + x * (e * s) * s  # e s is 1 - s


def _power_of_e(x: mx.array) -> mx.array:
    """exp(x), as one operation for gradients, where MLX does not fuse: a third of the time of MLX's exp."""
    return mx.power(math.e, x)


# Each function below becomes one loop. mx.compile fuses chains of at most 11 operations, and a maximum keeps the C
# compiler from vectorizing its loop, so longer chains are split.
_loop = partial(mx.compile, shapeless=True)


@mx.compile
def _taylor(x: mx.array) -> mx.array:
    """exp(x / 16) - 1, which keeps the last bits of an exponential near 1."""
    a, b, c, d, e, f, g = (1 / (16**k * math.factorial(k)) for k in range(1, 8))
    x2 = x * x
    return ((a + b * x) + (c + d * x) * x2 + ((e + f * x) + g * x2) * (x2 * x2)) * x


@mx.compile
def _sixteenth_power(y: mx.array) -> mx.array:
    """(1 + y)^16, squared twice as y and twice as 1 + y."""
    y = y * (2 + y)
    p = 1 + y * (2 + y)
    p = p * p
    return p * p


# What _exp is computed of.
_scaled_difference = _loop(lambda x, largest, scale: mx.maximum((x - largest) * scale, -32.0))
_minus_size = _loop(lambda x: mx.maximum(-mx.abs(x), -32.0))
_minus_half_square = _loop(lambda x: mx.maximum(-0.5 * x * x, -32.0))


@mx.compile
def _scaled_and_minus_size(x: mx.array, mean: mx.array, scale: mx.array, shift: mx.array) -> tuple[mx.array, mx.array]:
    y = (x - mean) * scale + shift
    return y, mx.maximum(-mx.abs(y), -32.0)


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
def _centred(x: mx.array, mean: mx.array) -> tuple[mx.array, mx.array]:
    """The distances from the mean, and their squares."""
    y = x - mean
    return y, y * y


@mx.compile
def _scaled_rows(x: mx.array, scale: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return x * scale * weight + bias
