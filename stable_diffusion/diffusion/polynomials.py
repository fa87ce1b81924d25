"""Polynomials through the last evaluations, integrated exactly over a step, for methods of all orders.

An exponential integrator takes lambda = -log(sigma) for its variable and solves the part of the ODE that is linear in x
exactly (:func:`exponential_step`). Adams-Bashforth's methods need :func:`lagrange_weights` alone.
"""

import math
from collections.abc import Callable, Sequence

import mlx.core as mx

from .transitions import reverse_sde, toward

Points = Sequence[tuple[float, mx.array]]  # (sigma, evaluation)


def exponential_step(
    x: mx.array,
    points: Points,
    target: float,
    moments: Callable[[float, int], list[float]],
    eta: float,
    predict_x0: bool,
) -> tuple[mx.array, float]:
    """Integrate the polynomial through ``points`` from the first one's sigma to ``target``.

    In r = (lambda - lambda_0) / h, with h the step in lambda, the weight of D is e^(length r) with a ``length`` of
    (1 + eta) h, and that of the noise is e^(-h r). Of both, ``moments`` gives the means of the powers of r. Returns the
    next ``x`` and the standard deviation of the noise that belongs to it. A step to 0 is of first order.
    """
    sigma, evaluation = points[0]
    h = math.log(sigma / target) if target > 0 else math.inf
    if 0 < h < math.inf and len(points) > 1:
        nodes = [math.log(sigma / level) / h for level, _ in points]
        weights = lagrange_weights(nodes, moments((1 + eta) * h if predict_x0 else -h, len(points)))
        first = evaluation
        for weight, (_, other) in zip(weights[1:], points[1:], strict=True):
            evaluation = evaluation + weight * (other - first)
    if predict_x0:
        down, up = reverse_sde(sigma, target, eta)
        return toward(x, evaluation, sigma, down), up
    eta = eta if target > 0 else 0.0
    up = eta * math.sqrt(max(sigma**2 - target**2, 0.0))
    return x + ((1 + eta**2) * (target - sigma)) * evaluation, up


def dpm_moments(
    length: float, count: int, solver_type: str, bend: float = 1.0, bend_offset: float = 0.0
) -> list[float]:
    """Return the means of r^k, k < ``count``, under the weight e^(length r): M_k = 1 / (1 - e^-l) - k / l M_(k-1).

    With two points "midpoint" and "bh2" take 1/2 for M_1, its limit for small l, and "bh1" takes l / 2 / (1 - e^-l).
    ``bend`` is a factor on M_2. diffusers writes one constant of the SDE's third order with the other sign;
    ``bend_offset`` 1 does too.
    """
    total = -1 / math.expm1(-length)
    means = [1.0]
    for k in range(1, count):
        means.append(total - k / length * means[-1])
    if count == 2 and solver_type != "heun":
        means[1] = total * length / 2 if solver_type == "bh1" else 0.5
    elif count == 3:
        means[2] = bend * (means[2] - 2 * bend_offset * total)
    return means


def blend(history: Points, weights: Sequence[float]) -> mx.array:
    """Return the weighted sum of the arrays in a history of (level, array)."""
    return sum(weight * evaluation for weight, (_, evaluation) in zip(weights, history, strict=True))


def lagrange_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Return weights w with sum_j w_j nodes_j^k = moments_k, exact for polynomials through the nodes.

    They are the moments of the Lagrange polynomials, each multiplied out from its roots.
    """
    weights = []
    for j, node in enumerate(nodes):
        coefficients, scale = [1.0], 1.0
        for other in (*nodes[:j], *nodes[j + 1 :]):
            shifted, same = [0.0, *coefficients], [*coefficients, 0.0]
            coefficients = [a - other * b for a, b in zip(shifted, same, strict=True)]
            scale *= node - other
        weights.append(sum(c * m for c, m in zip(coefficients, moments, strict=True)) / scale)
    return weights
