"""Brownian motion over sigma, as in the library torchsde: the noise of SDE samplers in other programs."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .generators import CudaGenerator, TorchGenerator

_DIGITS = 6  # of times
_POOL_SIZE = 24  # words in which a sequence of seeds is mixed


class BrownianMotion:
    """Draw a Brownian motion between two times, as ``torchsde.BrownianTree`` does from a seed.

    The gain over the whole interval is drawn first. A Brownian bridge then gives the value at the middle of the
    interval, at the middle of the half that contains the time, and so on down to six digits (Gaines & Lyons 1997). Each
    interval has its generator; NumPy's SeedSequence derives its seed from the motion's seed and the interval's place.
    So a value does not depend on the other times that are requested, nor on their order.

    Args:
        make_generator: returns the generator of a seed.
        seed: at least 0.
        times: start of the motion, with the value 0, and end. Other times are clamped to them. All times are rounded to
            float32, as torch rounds sigmas, then to six digits.
    """

    def __init__(
        self, make_generator: Callable[[int], TorchGenerator | CudaGenerator], seed: int, times: tuple[float, float]
    ):
        self._make_generator, self._seed, self._length = make_generator, seed, times[1] - times[0]
        self._start, self._end = map(_rounded, times)
        self._last_values = lru_cache(maxsize=2)(self._values)  # an increment begins at the end of the previous one

    def increment(self, time: float, later: float, count: int) -> np.ndarray:
        """Return the gains of ``count`` independent motions from one time to a later or earlier one: float64."""
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
            fraction = (middle - start) / (end - start)
            left = fraction * gain + math.sqrt(fraction * (end - middle)) * self._normal(count, number, depth)
            if time < middle:
                end, gain, number = middle, left, 2 * number
            else:
                start, gain, number, value = middle, gain - left, 2 * number + 1, value + left
            depth += 1
        return value if time == start else value + gain


def _rounded(time: float) -> float:
    return round(float(np.float32(time)), _DIGITS)
