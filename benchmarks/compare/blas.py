"""OpenBLAS for mlx-examples, as this library brings it: without it, all of its products were fifty times slower."""

import ctypes
import sys
from contextlib import suppress

if sys.platform == "linux":
    with suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
