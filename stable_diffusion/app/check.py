"""Check this machine: kernels, networks, the bundled model's picture and memory, each within a bound, and then times.

Nothing is downloaded: networks have random weights of a seed. The default device is compared with formulas in float64
(``check_kernels``) and with MLX's CPU in float32. On a CPU as default device shapes are small, and times few.
"""

import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import mlx.core as mx

from .check_kernels import bounds, kernel_cases, kernel_error
from .check_networks import Check, full_size_checks, kernel_times, network_checks


@dataclass(frozen=True)
class Measurement:
    """Hold the value of a check, or the ``error`` that it ended with."""

    check: Check
    value: float = math.nan
    error: str = ""

    @property
    def passed(self) -> bool:
        """Return whether there is a value, within its bounds."""
        return self.check.lowest <= self.value <= self.check.highest


def find_checks(words: Sequence[str] = ()) -> list[Check]:
    """Return the checks for the default device whose names contain all ``words``; nothing is computed."""
    on_cpu = mx.default_device() == mx.cpu
    kernels = (
        Check(case.name, dtype, partial(kernel_error, case, dtype), bound)
        for case in kernel_cases()
        for dtype, bound in bounds(case.bound, case.half).items()
        if not on_cpu or dtype in case.on_cpu
    )
    checks = chain(kernels, network_checks(on_cpu), full_size_checks(on_cpu), kernel_times(on_cpu))
    return [check for check in checks if all(word in check.name for word in words)]


def measure(check: Check) -> Measurement:
    """Return what a check measures. Whatever error a machine ends with is a result too."""
    try:
        return Measurement(check, check.measure())
    except Exception as error:
        return Measurement(check, error=" ".join(f"{type(error).__name__}: {error}".split()))


def findings(memory_limit: float) -> Iterator[str]:
    """Yield what there is to say of the machine, in lines; ``memory_limit`` is what a run may take, in bytes."""
    info = mx.device_info()
    yield f"MLX {mx.__version__}, {platform.platform()}, Python {platform.python_version()}"
    yield f"device: {mx.default_device()}, {info.get('device_name', '')}, {info.get('architecture', '')}"
    figures = {"memory": info.get("memory_size"), "recommended": info.get("max_recommended_working_set_size")}
    parts = [f"{name} {size / 1e9:.1f} GB" for name, size in figures.items() if size]
    yield ", ".join([*parts, f"a run may take {memory_limit / 1e9:.1f} GB"])
    if mx.default_device() == mx.cpu:
        yield "on a CPU shapes are small, and half precision is what MLX's CPU makes of it"
        return
    tf32 = os.environ.get("MLX_ENABLE_TF32", "1") != "0"
    yield f"TF32 is {'on: from the M5 on float32 has 11 bits' if tf32 else 'off'} (MLX_ENABLE_TF32)"
    winograd = os.environ.get("MLX_CONV_WINOGRAD_WORKING_SET") != "1"
    yield f"Winograd convolutions are {'on' if winograd else 'off'} (MLX_CONV_WINOGRAD_WORKING_SET)"
