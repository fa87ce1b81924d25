"""On Linux, let MLX compute with the system's OpenBLAS where there is one.

The Linux wheel of MLX carries the reference BLAS, whose float32 products run at about 2 GFLOP/s. Symbols that are
already loaded win, so loading OpenBLAS before MLX makes them about fifty times faster. It changes nothing on a Mac, or
where the library is not installed, or in a program that has imported MLX before.
"""

import ctypes
import sys
from contextlib import suppress

if sys.platform == "linux":
    with suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
