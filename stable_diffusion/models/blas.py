"""On Linux, what MLX's CPU backend needs from the system to be quick. On a Mac nothing of it happens.

The Linux wheel of MLX carries the reference BLAS, whose float32 products run at about 2 GFLOP/s. Symbols that are
already loaded win, so loading OpenBLAS before MLX, where it is installed, makes them about fifty times faster.

MLX frees an array as soon as it is not needed, and glibc gives arrays above 32 MB back to the system each time, to take
them again page by page: on the next array, that costs ten times as much as a product of each of its values. So glibc
is told to keep what it has; what a process holds stays at the most it has needed.
"""

import ctypes
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h
_openblas = None

if sys.platform == "linux":
    with suppress(OSError):
        _openblas = ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def threads() -> int:
    """How many threads compute a product; 1 without OpenBLAS."""
    ask = getattr(_openblas, "openblas_get_num_threads", None)  # which some builds call otherwise
    return 1 if ask is None else ask()


def set_threads(count: int) -> None:
    """Let so many threads compute a product."""
    if _openblas is not None:
        _openblas.openblas_set_num_threads(count)
