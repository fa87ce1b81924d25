"""Random generators of other programs: the normal numbers that torch draws from a seed, on the CPU and with CUDA.

Both turn uniform numbers into normal ones by the transform of Box and Muller (1958), in float32. The CPU generator
equals torch's to the bit on x86 with AVX2, where torch uses fused polynomials of the Cephes library. Builds of torch
for other processors use the functions of their C library, and differ by up to 2e-6.
"""

from collections.abc import Callable, Sequence

import numpy as np

_FLOAT = np.float32
_SMALL = 16  # values; from this number on torch draws floats, below it doubles

# Of the Cephes library (Moshier 1992), highest power first: logf on [sqrt(1/2), sqrt(2)], sinf and cosf to pi / 4.
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_LN_2 = (-2.12194440e-4, 0.693359375)  # their sum is log 2
_QUARTER_PI = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # their sum is pi / 4

# Of Philox 4x32, table 2 of the paper; the steps of the key are the golden ratio and the root of 3.
_FACTORS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class TorchGenerator:
    """Draw as ``torch.Generator("cpu")`` does: a Mersenne Twister (Matsumoto & Nishimura 1998) of the seed's low bits.

    The numbers of a call depend on their count. Below 16 they are pairs of doubles; a single last one is kept for the
    next such call. From 16 on, the i-th and the (i + 8)-th number of each 16 are a pair. If the count is not a multiple
    of 16, the last 16 are drawn again.
    """

    def __init__(self, seed: int):
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._waiting: list[float] = []

    def normal(self, count: int) -> np.ndarray:
        """Return the next ``count`` unit normal values, as ``torch.randn(count)`` does: float32."""
        if count < _SMALL:
            return np.array([self._next_double() for _ in range(count)], dtype=_FLOAT)
        uniform = self._uniform(count)
        whole = count - count % _SMALL
        values = np.empty(count, dtype=_FLOAT)
        values[:whole] = _box_muller(uniform[:whole])
        if whole < count:
            values[whole:] = uniform[whole:]
            values[-_SMALL:] = _box_muller(self._uniform(_SMALL))
        return values

    def _uniform(self, count: int) -> np.ndarray:
        bits = self._twister.randint(0, 1 << 32, count, dtype=np.uint32)
        return (bits & 0xFFFFFF).astype(_FLOAT) * _FLOAT(2**-24)

    def _next_double(self) -> float:
        if self._waiting:
            return self._waiting.pop()
        high, low = self._twister.randint(0, 1 << 32, (2, 2), dtype=np.uint32).astype(np.uint64).T
        angle, u = (((high << np.uint64(32)) | low) & np.uint64(2**53 - 1)) * 2.0**-53
        radius = np.sqrt(-2 * np.log1p(-u))
        self._waiting.append(radius * np.sin(2 * np.pi * angle))
        return radius * np.cos(2 * np.pi * angle)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Return normal values from uniform ones in [0, 1): 8 for the radius and 8 for the angle in turn."""
    first, second = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
    radius = np.sqrt(_FLOAT(-2) * _log(1 - first))
    return np.stack([radius * part for part in _cos_sin(_FLOAT(2 * np.pi) * second)], axis=1).reshape(-1)


def _fused(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> np.ndarray:
    """Return ``a * b + c``, rounded once to float32. Python numbers are rounded to float32 first."""
    return (a * np.float64(_FLOAT(b)) + _FLOAT(c)).astype(_FLOAT)


def _polynomial(x: np.ndarray, coefficients: Sequence[float]) -> np.ndarray:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fused(y, x, coefficient)
    return y


def _log(x: np.ndarray) -> np.ndarray:
    fraction, exponent = np.frexp(x)
    is_low = fraction < _FLOAT(np.sqrt(0.5))
    fraction, exponent = np.where(is_low, 2 * fraction, fraction) - 1, (exponent - is_low).astype(_FLOAT)
    square = fraction * fraction
    y = _fused(_polynomial(fraction, _LOG) * fraction, square, exponent * _FLOAT(_LN_2[0]))
    return _fused(exponent, _LN_2[1], fraction + _fused(square, -0.5, y))


def _cos_sin(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return cosine and sine of float32 values in [0, 2 pi]."""
    octant = ((x * _FLOAT(4 / np.pi)).astype(np.int32) + 1) & ~1
    for part in _QUARTER_PI:
        x = _fused(octant.astype(_FLOAT), -part, x)
    square = x * x
    cos = _fused(_polynomial(square, _COS) * square, square, square * _FLOAT(-0.5)) + 1
    sin = _fused(_polynomial(square, _SIN) * square, x, x)
    is_swapped = (octant & 2) != 0
    signs = [np.where(bits & 4, -1, 1).astype(_FLOAT) for bits in (octant + 2, octant)]
    return signs[0] * np.where(is_swapped, sin, cos), signs[1] * np.where(is_swapped, cos, sin)


class CudaGenerator:
    """Draw as ``torch.Generator("cuda")`` does: Philox 4x32 with 10 rounds (Salmon et al. 2011).

    The key is the seed; the counter holds the numbers of the call and of the value. Each value is the first of the four
    that its counter gives. This equals torch as long as the GPU has a thread for each value: about 43,000 values on a
    small GPU, 270,000 on a large one. A GPU approximates the functions; the difference is within 2e-6.
    """

    def __init__(self, seed: int):
        self._key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
        self._calls = 0

    def normal(self, count: int) -> np.ndarray:
        """Return the next ``count`` unit normal values, as ``torch.randn(count, device="cuda")`` does: float32."""
        index = np.arange(count, dtype=np.uint64)
        first, second, *_ = philox(
            [np.full_like(index, self._calls), np.zeros_like(index), index, index >> 32], self._key
        )
        self._calls += 1
        radius = np.sqrt(-2 * np.log((first + 0.5) * 2.0**-32))
        return (radius * np.sin((second + 0.5) * (2 * np.pi * 2.0**-32))).astype(_FLOAT)


def philox(counter: Sequence[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Encrypt counters by Philox 4x32-10 (Salmon et al. 2011, section 3.3): four words of 32 bits, in arrays of uint64.

    ``key`` are two words.
    """
    a, b, c, d = (word & _LOW for word in counter)
    for i in range(10):
        keys = [np.uint64((word + i * step) & 0xFFFFFFFF) for word, step in zip(key, _KEY_STEPS, strict=True)]
        first, second = a * _FACTORS[0], c * _FACTORS[1]
        a, b = second >> _HALF ^ b ^ keys[0], second & _LOW
        c, d = first >> _HALF ^ d ^ keys[1], first & _LOW
    return [a, b, c, d]


Source = Callable[[int], np.ndarray]  # returns the given number of values
GENERATORS = {"torch": TorchGenerator, "cuda": CudaGenerator}
NOISE_SOURCES = ("mlx", *GENERATORS)


def draw(sources: Sequence[Source], shape: tuple[int, ...]) -> np.ndarray:
    """Draw noise [n, *shape] from one source per image, in the order C, h, w."""
    height, width, channels = shape
    images = [source(channels * height * width).reshape(channels, height, width) for source in sources]
    return np.stack(images).transpose(0, 2, 3, 1)
