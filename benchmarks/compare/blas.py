"""The BLAS that this library brings, for both columns with MLX: one of them must not import it."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[2] / "stable_diffusion" / "blas.py"))
