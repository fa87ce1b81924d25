"""Curves of noise levels between the highest and the lowest of a run. Python floats, no arrays.

Each returns ``count`` descending levels from ``high`` to ``low``; the end of a run, usually 0, comes after them.
"""

import math
from collections.abc import Callable, Sequence


def karras(count: int, high: float, low: float, rho: float = 7.0) -> list[float]:
    """Space levels evenly in the root ``rho`` of sigma (Karras et al. 2022, eq. 5): dense at the low end."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return [(first + r * (last - first)) ** rho for r in _ramp(count)]


def exponential(count: int, high: float, low: float) -> list[float]:
    """Space levels evenly in log sigma (k-diffusion)."""
    first, last = math.log(high), math.log(low)
    return [math.exp(last + (1 - r) * (first - last)) for r in _ramp(count)]


def beta(count: int, high: float, low: float) -> list[float]:
    """Space levels as quantiles of the distribution Beta(0.6, 0.6) (Lee et al. 2024): dense at both ends."""
    return [low + _beta_quantile(1 - r, 0.6) * (high - low) for r in _ramp(count)]


def kl_optimal(count: int, high: float, low: float) -> list[float]:
    """Space levels evenly in the arctangent of sigma (Sabour et al. 2024, theorem 3.1): best for normal data."""
    first, last = math.atan(high), math.atan(low)
    return [math.tan(r * last + (1 - r) * first) for r in _ramp(count)]


def linear_quadratic(count: int, high: float, low: float) -> list[float]:
    """Descend a fortieth of ``high`` linearly in half of the steps, then by a parabola to 0 (Genmo's Mochi 1).

    The parabola continues the line, value and slope. The last level follows from the parabola, not from ``low``.
    """
    linear, threshold = count // 2, 0.025
    slope, rest = threshold / max(linear, 1), count - linear
    bend = (1 - threshold - slope * rest) / rest**2
    fractions = [slope * i + bend * max(i - linear, 0) ** 2 for i in range(count)]
    return [high * (1 - fraction) for fraction in fractions]


def log_linear(table: Sequence[float], count: int) -> list[float]:
    """Interpolate ``count`` levels along ``table``, linear in log sigma (Sabour et al. 2024, for any count)."""
    logs, levels = [math.log(sigma) for sigma in table], []
    for r in _ramp(count):
        position = r * (len(table) - 1)
        low = min(int(position), len(table) - 2)
        levels.append(math.exp(logs[low] + (position - low) * (logs[low + 1] - logs[low])))
    return levels


CURVES: dict[str, Callable[..., list[float]]] = {
    "karras": karras,
    "exponential": exponential,
    "lu": exponential,  # even in lambda = -log(sigma), as Lu et al. 2022a recommend
    "polyexponential": exponential,  # with power 1, the usual choice in k-diffusion
    "beta": beta,
    "kl_optimal": kl_optimal,
    "linear_quadratic": linear_quadratic,
}

# Align Your Steps (Sabour et al. 2024): optimised levels for ten steps; the last one, their end, is
# replaced by 0 as in the authors' code.
TABLES: dict[str, tuple[float, ...]] = {
    "align_your_steps": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "align_your_steps_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


def _ramp(count: int) -> list[float]:
    return [i / (count - 1) for i in range(count)] if count > 1 else [0.0]


def _beta_quantile(p: float, a: float) -> float:
    """Return x with I_x(a, a) = p, the inverse of the regularised incomplete beta function, for 0 < a < 1.

    Newton's method in y = x^a, where I is nearly a straight line and convex: from the right it cannot overshoot. I is
    summed as its power series, x^a / B sum_n (1 - a)_n x^n / (n! (a + n)), which converges for the lower half;
    symmetry gives the upper one.
    """
    if p > 0.5:
        return 1 - _beta_quantile(1 - p, a)
    total = math.gamma(a) ** 2 / math.gamma(2 * a)
    y = p * a * total
    for _ in range(20):
        x = y ** (1 / a)
        term, series, n = 1.0, 1 / a, 0
        while term > 1e-17 * series:
            n += 1
            term *= (n - a) * x / n
            series += term / (a + n)
        step = (y * series / total - p) * a * total * (1 - x) ** (1 - a)
        y -= step
        if abs(step) <= 1e-15 * y:
            break
    return y ** (1 / a)
