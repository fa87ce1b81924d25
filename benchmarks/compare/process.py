"""The memory and the rate of a process that measures, for columns that do not know their own."""

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRODUCT = 2048  # side of the square matrices whose product tells the rate
_PRODUCTS = 5  # of which the fastest counts
_CLEAR_REFS = Path("/proc/self/clear_refs")


def reset_peak() -> int:
    """Begin a new peak of the memory; returns where it begins. On a Mac the process has but one, of all its life."""
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")
    return peak()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def product_rate(multiply: Callable[[], Any]) -> float:
    """FLOP/s of ``multiply()``, which computes the product of two matrices of the side ``PRODUCT`` and waits for it."""
    times = []
    for _ in range(_PRODUCTS):
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return 2 * PRODUCT**3 / min(times)
