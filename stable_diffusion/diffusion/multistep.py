"""Multistep samplers: they integrate a polynomial through the last evaluations over each step, see ``polynomials``.

DPM-Solver, UniPC, DEIS, RES and SA-Solver are exponential integrators. Their polynomial goes through D (``predict_x0``:
DPM-Solver++, Lu et al. 2022b) or through the noise ``(x - D) / sigma`` (DPM-Solver, Lu et al. 2022a).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import mlx.core as mx

from .polynomials import blend, dpm_moments, exponential_step, lagrange_weights
from .transitions import Denoise, Noise, Sigmas, States, ancestral, guided_and_uncond, noised, relabel, toward


def lms(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, order: int = 4) -> States:
    """Run a linear multistep method (Adams-Bashforth with uneven steps, as in k-diffusion).

    A polynomial in sigma through the last ``order`` slopes extrapolates the slope.
    """
    history: list[tuple[float, mx.array]] = []
    for sigma, target in pairwise(sigmas):
        history = [(sigma, (x - denoise(x, sigma)) / sigma), *history][:order]
        moments = [(target - sigma) ** (k + 1) / (k + 1) for k in range(len(history))]
        x = x + blend(history, lagrange_weights([level - sigma for level, _ in history], moments))
        yield x


def pndm(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    velocity: bool = False,
    target_sigmas: Sigmas | None = None,
    repeat_sigma: float | None = None,
    half_sigmas: Sequence[tuple[float, float]] = (),
) -> States:
    """Run the pseudo linear multistep method (Liu et al. 2022, algorithm 2; PLMS): Adams-Bashforth on the noise.

    The first step is repeated, from ``repeat_sigma``, with the mean of the noise at both ends. With ``half_sigmas``,
    see ``Schedule.half_sigmas``, Runge and Kutta's method replaces these first steps (algorithm 1). With ``velocity``
    the model predicts v, which is extrapolated instead of the noise. ``target_sigmas`` as for :func:`ddim`.
    """
    target_sigmas = sigmas[1:] if target_sigmas is None else target_sigmas
    history: list[tuple[float, mx.array]] = []

    def prediction(x: mx.array, sigma: float) -> mx.array:
        x0 = denoise(x, sigma)
        e = (x - x0) / sigma
        return (e - sigma * x0) / math.sqrt(1 + sigma**2) if velocity else e

    def transfer(x: mx.array, e: mx.array, sigma: float, target: float) -> mx.array:
        if velocity:
            e = (math.sqrt(1 + sigma**2) * e + sigma * x) / (1 + sigma**2)
        return x + (target - sigma) * e

    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        history = [(sigma, prediction(x, sigma)), *history][:4]
        if i < len(half_sigmas):
            ahead = _runge_kutta(prediction, transfer, x, history[0][1], (sigma, *half_sigmas[i], after))
        else:
            e = blend(history, _ADAMS_BASHFORTH[len(history) - 1])
            ahead = relabel(transfer(x, e, sigma, target_sigmas[i]), target_sigmas[i], after)
        if len(history) == 1 and not half_sigmas and len(sigmas) > 2:
            start = sigma if repeat_sigma is None else repeat_sigma
            e = (e + prediction(ahead, after)) / 2
            ahead = transfer(relabel(x, sigma, start), e, start, after)
        x = ahead
        yield x


def _runge_kutta(
    prediction: Callable[[mx.array, float], mx.array],
    transfer: Callable[[mx.array, mx.array, float, float], mx.array],
    x: mx.array,
    first: mx.array,
    levels: tuple[float, float, float, float],
) -> mx.array:
    """Compute a fourth-order step from a ``first`` prediction and three more; ``levels`` are start, 2 halves, end."""
    sigma, left, half, target = levels
    second = prediction(relabel(transfer(x, first, sigma, left), left, half), half)
    third = prediction(transfer(x, second, sigma, half), half)
    last = prediction(transfer(x, third, sigma, target), target)
    return transfer(x, (first + 2 * second + 2 * third + last) / 6, sigma, target)


_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, order: int = 4) -> States:
    """Run iPNDM (Zhang & Chen 2023): Adams-Bashforth on the noise for steps of equal length, starting with one point.

    A step to 0 is of first order, as in ComfyUI.
    """
    history: list[tuple[float, mx.array]] = []
    for sigma, target in pairwise(sigmas):
        x0 = denoise(x, sigma)
        history = [(sigma, (x - x0) / sigma), *history][:order]
        x = x + (target - sigma) * blend(history, _ADAMS_BASHFORTH[len(history) - 1]) if target > 0 else x0
        yield x


def dpmpp_2m_sde(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    eta: float = 1.0,
    order: int = 2,
    solver_type: str = "midpoint",
    predict_x0: bool = True,
    lower_order_final: bool = False,
    euler_at_final: bool = False,
    bend_offset: float = 0.0,
) -> States:
    """Run SDE-DPM-Solver++(2M) (Lu et al. 2022b, sec. 4): an exponential integrator through the last ``order`` D's.

    A step to 0 has first order. ``lower_order_final`` lowers the order to 1 in the last steps, ``euler_at_final`` only
    in the last one. For ``solver_type``, "midpoint" or "heun", and ``bend_offset`` see ``dpm_moments``. The coefficient
    of the third order has half of its exact weight, as in diffusers.
    """
    moments = partial(dpm_moments, solver_type=solver_type, bend=0.5, bend_offset=bend_offset)
    history: list[tuple[float, mx.array]] = []
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        history = [(sigma, _prediction(denoise, x, sigma, predict_x0)), *history][:order]
        remaining = len(sigmas) - 1 - i
        highest = remaining if lower_order_final or (euler_at_final and remaining == 1) else order
        x, up = exponential_step(x, history[:highest], target, moments, eta, predict_x0)
        x = noised(x, up, noise, i)
        yield x


def dpmpp_2m_cfg_pp(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise) -> States:
    """Run DPM-Solver++(2M) with CFG++ (Chung et al. 2024): from an ``x`` that guidance has shifted like D.

    The line goes through the guided D and the unconditional D of the previous step, as in ComfyUI.
    """
    moments = partial(dpm_moments, solver_type="midpoint")
    before: list[tuple[float, mx.array]] = []
    for sigma, target in pairwise(sigmas):
        x0, uncond = guided_and_uncond(denoise(x, sigma), x)
        x, _ = exponential_step(x + x0 - uncond, [(sigma, x0), *before], target, moments, 0.0, True)
        before = [(sigma, uncond)]
        yield x


dpmpp_2m = partial(dpmpp_2m_sde, eta=0.0)  # on the ODE: Lu et al. 2022b, algorithm 2
dpmpp_3m_sde = partial(  # k-diffusion
    dpmpp_2m_sde,
    order=3,
    solver_type="heun",
    predict_x0=True,
    lower_order_final=False,
    euler_at_final=False,
    bend_offset=0.0,
)


def dpmpp_2s(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    eta: float = 0.0,
    order: int = 2,
    solver_type: str = "midpoint",
    predict_x0: bool = True,
    orders: Sequence[int] | None = None,
    bend_offset: float = 0.0,
) -> States:
    """Run DPM-Solver++ in single steps (Lu et al. 2022b, algorithm 1), with one D for each of the ``sigmas``.

    Steps form groups of ``order``. The first step of a group has first order. Each further step starts at the beginning
    of the group, with all D's of the group. ``orders`` has the order of each step, see :func:`singlestep_orders`.
    """
    if orders is None:
        orders = singlestep_orders(order, len(sigmas) - 1, sigmas[-1] == 0)
    start, group = x, []
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        if orders[i] == 1 or not group:
            start, group = x, []
        group.append((sigma, _prediction(denoise, x, sigma, predict_x0)))
        # The third-order midpoint method omits the second D (Lu et al. 2022a, algorithm 2).
        is_midpoint = solver_type == "midpoint" and len(group) == 3
        points = [group[0], group[2]] if is_midpoint else group
        rule = partial(dpm_moments, solver_type="heun" if is_midpoint else solver_type, bend_offset=bend_offset)
        x, up = exponential_step(start, points, target, rule, eta, predict_x0)
        x = noised(x, up, noise, i)
        yield x


def singlestep_orders(order: int, count: int, is_to_zero: bool = True, lower_order_final: bool = True) -> list[int]:
    """Return the orders of ``count`` steps in groups 1, 2, ..., ``order``; the last group may be shorter.

    If all groups are complete, ``lower_order_final`` gives the last step first order (Lu et al. 2022a, algorithm 3). In
    a run to sigma 0, ``is_to_zero``, it always has first order.
    """
    orders = [i % order + 1 for i in range(count)]
    if is_to_zero or (lower_order_final and orders[-1] == order):
        orders[-1] = 1
    return orders


def unipc(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
) -> States:
    """Run UniPC (Zhao et al. 2023, algorithms 1 and 2): a predictor that the next D corrects.

    The corrector repeats the last step with the D at its end, except for the steps ``disable_corrector``. With
    ``lower_order_final`` the order falls to 1 in the last steps. ``solver_type`` "bh1" is B(h) = h, "bh2" is
    B(h) = e^h - 1.
    """
    moments = partial(dpm_moments, solver_type=solver_type)
    history: list[tuple[float, mx.array]] = []
    start, used = x, 0
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        evaluation = _prediction(denoise, x, sigma, predict_x0)
        if history and i - 1 not in disable_corrector:
            corrected = [*history[:used], (sigma, evaluation)]
            x, _ = exponential_step(start, corrected, sigma, moments, 0.0, predict_x0)
        history = [(sigma, evaluation), *history][:order]
        used = min(len(history), len(sigmas) - 1 - i if lower_order_final else order)
        start = x
        x, _ = exponential_step(x, history[:used], target, moments, 0.0, predict_x0)
        yield x


def sa_solver(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    eta: float = 1.0,
    order: int = 2,
    corrector_order: int = 2,
    predict_x0: bool = True,
    lower_order_final: bool = True,
    taus: Sequence[float] | None = None,
) -> States:
    """Run SA-Solver (Xue et al. 2023, algorithm 1): a predictor on the SDE, corrected by the next D and its noise.

    The predictor goes through ``order`` points, the corrector through ``corrector_order``, one of them at its end. The
    orders fall in the last steps with ``lower_order_final``. ``taus`` are the fractions of fresh noise in the steps, by
    default ``eta`` in all: 0 is the ODE, 1 the reverse SDE.
    """
    moments = partial(dpm_moments, solver_type="bh1" if predict_x0 else "heun")
    history: list[tuple[float, mx.array]] = []
    start, kept, share, fresh = x, history, 0.0, x
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        evaluation = _prediction(denoise, x, sigma, predict_x0)
        if history:
            points = [*kept, (sigma, evaluation)] if kept else [(history[0][0], evaluation)]
            x, up = exponential_step(start, points, sigma, moments, share, predict_x0)
            x = x + up * fresh
        history = [(sigma, evaluation), *history][: max(order, corrector_order - 1)]
        highest = len(sigmas) - 1 - i if lower_order_final else len(history)
        kept = history[: min(corrector_order - 1, highest)]
        share = eta if taus is None else taus[i]
        share = share**2 if predict_x0 else share
        start, fresh = x, noise(i, x.shape)  # also drawn in steps without noise, as in diffusers
        x, up = exponential_step(start, history[: min(order, highest)], target, moments, share, predict_x0)
        x = x + up * fresh
        yield x


def deis(
    denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, order: int = 2, lower_order_final: bool = False
) -> States:
    """Run the diffusion exponential integrator sampler (Zhang & Chen 2023, rho-AB in log rho).

    A polynomial in log sigma through the last ``order`` predictions extrapolates the noise. A step to 0 is of first
    order; with ``lower_order_final`` the order falls to 1 in the last steps.
    """
    history: list[tuple[float, mx.array]] = []
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        history = [(sigma, (x - denoise(x, sigma)) / sigma), *history][:order]
        remaining = len(sigmas) - 1 - i
        used = history[: 1 if target == 0 else remaining if lower_order_final else order]
        # The integrals of log(s / sigma)^k from sigma to the target, each from the one before by parts.
        moments, u = [target - sigma], math.log(target / sigma) if target > 0 else 0.0
        for k in range(1, len(used)):
            moments.append(target * u**k - k * moments[-1])
        x = x + blend(used, lagrange_weights([math.log(level / sigma) for level, _ in used], moments))
        yield x


def res_multistep_ancestral(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run the refined exponential solver (RES), second-order multistep (Zhang et al. 2023), with the last two D's.

    With ``eta`` above 0 it steps to a lower sigma and adds noise. The distance of the older D is then the length in log
    sigma of the step down from it, as in ComfyUI.
    """
    moments = partial(dpm_moments, solver_type="heun")
    older: list[tuple[float, mx.array]] = []  # D, and the factor of the step down from it
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, target, eta)
        x0 = denoise(x, sigma)
        points = [(sigma, x0), *((sigma * factor, other) for factor, other in older)]
        x, _ = exponential_step(x, points, down, moments, 0.0, True)
        x = noised(x, up, noise, i)
        older = [(sigma / down, x0)] if down > 0 else []
        yield x


def er_sde(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    order: int = 3,
    noise_scaler: Callable[[float], float] = lambda sigma: sigma * (math.exp(sigma**0.3) + 10),
) -> States:
    """Run ER-SDE-Solver (Cui et al. 2023) on the extended reverse-time SDE of a ``noise_scaler``, phi in the paper.

    The default is their SDE 5; phi(sigma) = sigma is the ODE. A Taylor polynomial of D, its derivatives from the last
    ``order`` D's, is integrated with the weight phi' / phi^2 by parts. The remaining integrals of 1 / phi are sums over
    200 points, as in ComfyUI. A step to 0 has first order.
    """
    history: list[tuple[float, mx.array]] = []
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        history = [(sigma, x0), *history][: order if target > 0 else 1]
        start, end = noise_scaler(sigma), noise_scaler(target)
        x = toward(x, x0, start, end)
        if len(history) > 1:
            nodes, h = [level - sigma for level, _ in history], target - sigma
            offsets = [h - h * k / 200 for k in range(200)]
            inverses = [-h / 200 * end / noise_scaler(sigma + offset) for offset in offsets]
            first = h + sum(inverses)
            second = h**2 + 2 * sum(map(math.prod, zip(offsets, inverses, strict=True)))
            # The first derivative is the slope to the last D, not the slope of the parabola through all three.
            moments = [0.0, first, second + nodes[1] * first][: len(history)]
            x = x + blend(history, lagrange_weights(nodes, moments))
        x = noised(x, math.sqrt(max(target**2 - (sigma * end / start) ** 2, 0.0)), noise, i)
        yield x


def _prediction(denoise: Denoise, x: mx.array, sigma: float, predict_x0: bool) -> mx.array:
    x0 = denoise(x, sigma)
    return x0 if predict_x0 else (x - x0) / sigma
