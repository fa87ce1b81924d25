"""Peaks of memory, as MLX reports them.

The thread that walks through a graph takes buffers and the one that computes frees them, so the peak depends on how far
the first is ahead. A test asks for what holds for all peaks, or takes the least or the most of several runs.
"""

import os
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

PAGE = os.sysconf("SC_PAGE_SIZE") if mx.metal.is_available() else 1  # Metal's allocator gives whole pages


def peaks(compute: Callable[..., Any], *args: Any, runs: int = 5, limit: int = 0) -> list[int]:
    """Bytes that ``compute(*args)`` takes beside what is there before, in each of several runs.

    ``limit`` is MLX's memory limit; at 0 the first thread is ahead by at most ten kernels.
    """
    mx.set_memory_limit(limit)
    found = []
    for _ in range(runs):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(compute(*args))
        found.append(mx.get_peak_memory() - before)
    return found


def pages(*modules: nn.Module) -> int:
    """Bytes that the arrays of modules may take beside their values, as each fills its last page."""
    return PAGE * sum(len(tree_flatten(module)) for module in modules)
