"""Networks as modules, and the MLX that they need."""

import re

_OLDEST_MLX = "0.32.3"


def check_mlx() -> None:
    """Raise ImportError, one line, for an MLX that is too old."""
    import mlx.core as mx  # not above: cpu.py loads OpenBLAS before it

    found, needed = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (mx.__version__, _OLDEST_MLX))
    if found < needed:
        remedy = 'pip install -U mlx, or on Linux "mlx[cpu]"'
        raise ImportError(f"MLX {mx.__version__} is too old, {_OLDEST_MLX} or newer is needed: {remedy}")
