"""Brownian motion over sigma, of which other programs take the noise of SDE samplers: that of the library torchsde."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .generators import CudaGenerator, TorchGenerator

_DIGITS = 6  # of times
_POOL_SIZE = 24  # words in which a sequence of seeds is mixed


class BrownianMotion:
    """Draw a Brownian motion between two times, as ``torchsde.BrownianTree`` does from a seed.

    The gain over the whole interval is drawn first. Then a Brownian bridge leads to the middle of the interval, to that
    of the half in which a time lies, and so on until the time is met, to six digits (Gaines & Lyons 1997). An interval
    draws from a generator of its own, whose seed NumPy's SeedSequence makes of the motion's and of the interval's
    place. So a value depends neither on the times that are asked for nor on their order.

    Args:
        make_generator: returns the generator of a seed.
        seed: at least 0.
        times: where the motion begins, with 0, and where it ends; times beyond are taken for these. All times are
            rounded to float32, as torch rounds sigmas, before the six digits.
    """

    def __init__(
        self, make_generator: Callable[[int], TorchGenerator | CudaGenerator], seed: int, times: tuple[float, float]
    ):
        self._make_generator, self._seed, self._length = make_generator, seed, times[1] - times[0]
        self._start, self._end = map(_rounded, times)
        self._last_values = lru_cache(maxsize=2)(self._values)  # an increment begins where the one before has ended

    def increment(self, time: float, later: float, count: int) -> np.ndarray:
        """Return what ``count`` independent motions gain from one time to another, which may lie before it: float64."""
        values = [self._last_values(_rounded(one), count) for one in (time, later)]
        return values[1] - values[0]

    def _normal(self, count: int, *place: int) -> np.ndarray:
        sequence = np.random.SeedSequence(self._seed, spawn_key=place, pool_size=_POOL_SIZE)
        return self._make_generator(int(sequence.generate_state(1)[0])).normal(count).astype(np.float64)

    def _values(self, time: float, count: int) -> np.ndarray:
        time = min(max(time, self._start), self._end)
        start, end, value = self._start, self._end, np.zeros(count)
        gain = math.sqrt(self._length) * self._normal(count)
        number, depth = 0, 0  # of the interval, in its row
        while start < time < end:
            middle = round(0.5 * (end + start), _DIGITS)
            share = (middle - start) / (end - start)
            left = share * gain + math.sqrt(share * (end - middle)) * self._normal(count, number, depth)
            if time < middle:
                end, gain, number = middle, left, 2 * number
            else:
                start, gain, number, value = middle, gain - left, 2 * number + 1, value + left
            depth += 1
        return value if time == start else value + gain


def _rounded(time: float) -> float:
    return round(float(np.float32(time)), _DIGITS)
