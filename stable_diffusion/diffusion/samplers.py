"""Samplers: each a generator that integrates dx/dsigma = (x - D(x, sigma)) / sigma from noise to an image.

``denoise(x, sigma)`` is D, the model's estimate of the clean latent x0. ``x`` is the noisy latent
``x0 + sigma * noise``; ``sigmas`` descend to where the run ends. ``noise(draw, shape)`` gives the unit normal noise
that a stochastic sampler injects. Each step yields the next ``x``; history lives in local variables.

Three ideas recur. A step from sigma to s along the ODE with D held fixed is ``D + (s / sigma) * (x - D)``. A
stochastic step goes to a level below its target and returns to it with fresh noise. A multistep method lays a
polynomial through its last few evaluations and integrates it exactly.

The ``sigmas`` of a run carry their timesteps (``schedule.Sigma``). Levels that a sampler computes between them are
plain floats, for which the denoiser computes the timestep.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import mlx.core as mx

Denoise = Callable[[mx.array, float], mx.array]
Noise = Callable[[int, tuple[int, ...]], mx.array]
States = Iterator[mx.array]
Sigmas = Sequence[float]


def euler(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise) -> States:
    """Run Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn)."""
    for sigma, target in pairwise(sigmas):
        x = _toward(x, denoise(x, sigma), sigma, target)
        yield x


def euler_ancestral(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run Euler's method to a lower sigma and add noise up to the next one (k-diffusion): DDIM with ``eta`` 1."""
    yield from ddim(denoise, x, sigmas, noise, eta=eta)


def heun(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise) -> States:
    """Run Heun's method (Karras et al. 2022, algorithm 1): mean slope of both ends; the step to 0 is Euler's."""
    for sigma, target in pairwise(sigmas):
        x0 = denoise(x, sigma)
        ahead = _toward(x, x0, sigma, target)
        if target > 0:
            slope = ((x - x0) / sigma + (ahead - denoise(ahead, target)) / target) / 2
            ahead = x + (target - sigma) * slope
        x = ahead
        yield x


def dpm2_ancestral(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run DPM-Solver-2 (Lu et al. 2022a), with the slope half-way in log sigma; the step to 0 is Euler's.

    Above ``eta`` 0 it goes to a lower sigma, and noise leads back (k-diffusion).
    """
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down, up = _ancestral(sigma, target, eta)
        x0 = denoise(x, sigma)
        if down > 0:
            middle = math.sqrt(sigma * down)
            halfway = _toward(x, x0, sigma, middle)
            x = x + (down - sigma) * ((halfway - denoise(halfway, middle)) / middle)
        else:
            x = x0
        x = _noised(x, up, noise, i)
        yield x


def lms(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, order: int = 4) -> States:
    """Run a linear multistep method (Adams-Bashforth with uneven steps, as in k-diffusion).

    A polynomial in sigma through the last ``order`` slopes extrapolates the slope.
    """
    history: list[tuple[float, mx.array]] = []
    for sigma, target in pairwise(sigmas):
        history = [(sigma, (x - denoise(x, sigma)) / sigma), *history][:order]
        moments = [(target - sigma) ** (k + 1) / (k + 1) for k in range(len(history))]
        x = x + _blend(history, _weights([level - sigma for level, _ in history], moments))
        yield x


def ddim(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    eta: float = 0.0,
    target_sigmas: Sigmas | None = None,
) -> States:
    """Run denoising diffusion implicit models (Song et al. 2021, eq. 12): Euler's method with some of its noise fresh.

    The standard deviation of that noise, eq. 16, is ``eta`` times the one of ancestral sampling. ``target_sigmas`` are
    the levels that the steps lead to, where the next steps start at other ones.
    """
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        target = after if target_sigmas is None else target_sigmas[i]
        down, up = _ancestral(sigma, target, eta)
        x = _noised(_toward(x, denoise(x, sigma), sigma, down), up, noise, i)
        x = _relabel(x, target, after)
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
) -> States:
    """Run the pseudo linear multistep method (Liu et al. 2022, algorithm 2; PLMS): Adams-Bashforth on the noise.

    The first step is repeated, from ``repeat_sigma``, with the mean of the noise at both its ends. With ``velocity``
    the model predicts v, which is extrapolated in place of the noise. ``target_sigmas`` as for :func:`ddim`.
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
        e = _blend(history, _ADAMS_BASHFORTH[len(history) - 1])
        ahead = _relabel(transfer(x, e, sigma, target_sigmas[i]), target_sigmas[i], after)
        if i == 0 and len(sigmas) > 2:
            start = sigma if repeat_sigma is None else repeat_sigma
            e = (e + prediction(ahead, after)) / 2
            ahead = transfer(_relabel(x, sigma, start), e, start, after)
        x = ahead
        yield x


_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def dpmpp_2m_sde(
    denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0, lower_order_final: bool = False
) -> States:
    """Run SDE-DPM-Solver++(2M) (Lu et al. 2022b, sec. 4; midpoint): an exponential integrator with D from two steps.

    The step length ``h`` is in ``lambda = -log(sigma)``. The first step is of first order, and so is one to 0. With
    ``lower_order_final`` the last step always is.
    """
    previous, h_previous = None, math.inf
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0 = estimate = denoise(x, sigma)
        h = math.log(sigma / target) if target > 0 else math.inf
        lower = lower_order_final and i == len(sigmas) - 2
        if previous is not None and 0 < h < math.inf and not lower:
            estimate = x0 + (x0 - previous) * (h / (2 * h_previous))
        down, up = _reverse_sde(sigma, target, eta)
        x = _noised(_toward(x, estimate, sigma, down), up, noise, i)
        previous, h_previous = x0, h
        yield x


def dpmpp_2s_ancestral(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1): D from half-way in log sigma, with ancestral noise."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down, up = _ancestral(sigma, target, eta)
        x0 = denoise(x, sigma)
        if down > 0:
            middle = math.sqrt(sigma * down)
            x0 = denoise(_toward(x, x0, sigma, middle), middle)
        x = _noised(_toward(x, x0, sigma, down), up, noise, i)
        yield x


def dpmpp_sde(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run DPM-Solver++ on the SDE (k-diffusion; Lu et al. 2022b): D from half-way in log sigma, noise on both halves.

    The noise is a Brownian motion in sigma. Its increments over the two halves are drawn, numbers 2 i and 2 i + 1 in
    step i; their sum is the increment over the step.
    """
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        if 0 < target < sigma:
            middle = math.sqrt(sigma * target)
            first, second = noise(2 * i, x.shape), noise(2 * i + 1, x.shape)
            both = math.sqrt((sigma - middle) / (sigma - target)) * first
            both = both + math.sqrt((middle - target) / (sigma - target)) * second
            down, up = _ancestral(sigma, middle, eta)
            halfway = _toward(x, x0, sigma, down) + up * first
            down, up = _ancestral(sigma, target, eta)
            x = _toward(x, denoise(halfway, middle), sigma, down) + up * both
        else:
            x = _toward(x, x0, sigma, target)
        yield x


def dpmpp_3m_sde(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run SDE-DPM-Solver++(3M) (k-diffusion; Lu et al. 2022b): D extrapolated from three steps.

    ``slopes`` and ``bend`` are the first and second divided differences of D in units of this step.
    """
    history: list[tuple[float, mx.array]] = []  # (lambda, D), newest first
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        history = [(-math.log(sigma), denoise(x, sigma)), *history][:3]
        down, up = _reverse_sde(sigma, target, eta)
        x = _toward(x, history[0][1], sigma, down)
        if 0 < target < sigma and len(history) > 1:
            h, length = math.log(sigma / target), math.log(sigma / down)
            phi_2 = 1 - (1 - down / sigma) / length
            slopes = [(b - a) * (h / (t - s)) for (t, b), (s, a) in pairwise(history)]
            if len(slopes) == 1:
                x = x + phi_2 * slopes[0]
            else:
                r = [(t - s) / h for (t, _), (s, _) in pairwise(history)]
                bend = (slopes[0] - slopes[1]) / (r[0] + r[1])
                x = x + phi_2 * (slopes[0] + r[0] * bend) - (phi_2 / length - 0.5) * bend
        x = _noised(x, up, noise, i)
        yield x


def unipc(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, order: int = 2) -> States:
    """Run UniPC (Zhao et al. 2023, algorithms 1 and 2, B(h) = e^h - 1): a predictor that the next D corrects.

    Both are steps towards a blend of D's; the corrector repeats the last step with the D at its end. The order falls
    to 1 in the last steps.
    """
    history: list[tuple[float, mx.array]] = []
    start, used = x, 0
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        if history:
            corrected = [*history[:used], (sigma, x0)]
            x = _toward(start, _exponential_blend(corrected, sigma), history[0][0], sigma)
        history = [(sigma, x0), *history][:order]
        used = min(len(history), len(sigmas) - 1 - i)
        start = x
        x = _toward(x, _exponential_blend(history[:used], target), sigma, target)
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
        x = x + _blend(used, _weights([math.log(level / sigma) for level, _ in used], moments))
        yield x


def tcd(
    denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 0.3, tcd_sigmas: Sigmas | None = None
) -> States:
    """Run trajectory consistency distillation (Zheng et al. 2024, algorithm 4; ``eta`` is their gamma).

    A step leaps beyond its target, to (1 - eta) of the target's time, and noise leads back. ``tcd_sigmas`` are the
    levels of the leaps; without them sigma is taken for the time.
    """
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down = (1 - eta) * target if tcd_sigmas is None else tcd_sigmas[i]
        up = math.sqrt(max(target**2 - down**2, 0.0))
        x = _noised(_toward(x, denoise(x, sigma), sigma, down), up, noise, i)
        yield x


# Samplers that are others with some of their options bound, which then cannot be chosen.
dpm2 = partial(dpm2_ancestral, eta=0.0)
ddpm = partial(ddim, eta=1.0)  # Ho et al. 2020, algorithm 2, with the posterior's variance
dpmpp_2m = partial(dpmpp_2m_sde, eta=0.0)  # on the ODE: Lu et al. 2022b, algorithm 2
lcm = partial(tcd, eta=1.0, tcd_sigmas=None)  # every leap goes to x0: Luo et al. 2023, algorithm 3


def _toward(x: mx.array, x0: mx.array, sigma: float, target: float) -> mx.array:
    """Step from ``sigma`` to ``target`` along the ODE while D stays ``x0``; nothing cancels at large sigma."""
    return x0 + (target / sigma) * (x - x0)


def _noised(x: mx.array, up: float, noise: Noise, draw: int) -> mx.array:
    """Add noise of the standard deviation ``up``; at 0 none is drawn."""
    return x + up * noise(draw, x.shape) if up > 0 else x


def _ancestral(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """Split a step to ``target`` into an ODE step down to the first value and noise of the second, ``up <= target``."""
    up = min(target, eta * math.sqrt(max(target**2 * (sigma**2 - target**2) / sigma**2, 0.0)))
    return math.sqrt(target**2 - up**2), up


def _reverse_sde(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """Split an exact step of the reverse SDE likewise, whose noise decays as it is injected; eta 0 is the ODE."""
    ratio = min(target / sigma, 1.0) ** eta  # a curve may end an ulp below the end of the run
    return target * ratio, target * math.sqrt(1 - ratio**2)


def _relabel(x: mx.array, sigma: float, level: float) -> mx.array:
    """Rescale a latent at ``sigma`` to ``level`` so that it stays the same in variance-preserving scale."""
    return x if sigma == level else x * math.sqrt((1 + level**2) / (1 + sigma**2))


def _blend(history: Sequence[tuple[float, mx.array]], weights: Sequence[float]) -> mx.array:
    """Return the weighted sum of the arrays in a history of (level, array)."""
    return sum(weight * evaluation for weight, (_, evaluation) in zip(weights, history, strict=True))


def _exponential_blend(points: Sequence[tuple[float, mx.array]], target: float) -> mx.array:
    """Blend D's so that a step towards the result integrates the polynomial in lambda through them.

    The step runs from the first point's sigma to ``target``. In units of the step, the mean of r^k under the weight
    e^(h r) is M_k = 1 / (1 - e^-h) - k / h M_(k-1). With two points M_1 is replaced by 1/2, its limit for small h: the
    midpoint form, which :func:`dpmpp_2m_sde` has too.
    """
    sigma, x0 = points[0]
    if len(points) == 1:
        return x0
    h = math.log(sigma / target)
    moments = [1.0]
    for k in range(1, len(points)):
        moments.append(-1 / math.expm1(-h) - k / h * moments[-1])
    if len(points) == 2:
        moments[1] = 0.5
    return _blend(points, _weights([math.log(sigma / level) / h for level, _ in points], moments))


def _weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
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


@dataclass(frozen=True)
class Sampler:
    """Describe a sampler: a row of ``SAMPLERS``."""

    run: Callable[..., States]  # the generator function
    spacing_rule: str = "euler"  # places its steps, a key of SPACING_RULES
    order: int = 1  # of the error in the step length, without noise
    evaluations: int = 1  # of D in a step; PNDM makes two in its first step
    stochastic: bool = False  # injects noise by default
    scheduler: str = ""  # class of diffusers that computes the same; after ":" its algorithm_type, where that decides
    reference: str = ""  # the paper or program that defines it
    consistency: bool = False  # wrap D for consistency models, see denoiser.consistency

    @property
    def option_names(self) -> set[str]:
        """Return the names of the options that may be chosen: keyword arguments that no ``partial`` has bound.

        A factor on the noise, "s_noise", may be chosen where there is noise.
        """
        parameters = inspect.signature(self.run).parameters.values()
        names = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        names -= getattr(self.run, "keywords", {}).keys()
        return names | {"s_noise"} if self.stochastic or "eta" in names else names


_two = partial(Sampler, order=2, evaluations=2)
_K = "k-diffusion"
_KARRAS = "Karras et al. 2022, arXiv:2206.00364"
_LU_A, _LU_B = "Lu et al. 2022, arXiv:2206.00927", "Lu et al. 2022, arXiv:2211.01095"
_HO, _SONG = "Ho et al. 2020, arXiv:2006.11239", "Song et al. 2021, arXiv:2010.02502"
_ZHANG, _ZHAO = "Zhang & Chen 2023, arXiv:2204.13902", "Zhao et al. 2023, arXiv:2302.04867"
_LUO, _ZHENG = "Luo et al. 2023, arXiv:2310.04378", "Zheng et al. 2024, arXiv:2402.19159"

SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler, scheduler="EulerDiscrete", reference=_KARRAS),
    "euler_a": Sampler(euler_ancestral, stochastic=True, scheduler="EulerAncestralDiscrete", reference=_K),
    "heun": _two(heun, scheduler="HeunDiscrete", reference=_KARRAS),
    "dpm2": _two(dpm2, "dpm2", scheduler="KDPM2Discrete", reference=_LU_A),
    "dpm2_a": _two(dpm2_ancestral, "dpm2", stochastic=True, scheduler="KDPM2AncestralDiscrete", reference=_K),
    "lms": Sampler(lms, order=4, scheduler="LMSDiscrete", reference=_K),
    "ddim": Sampler(ddim, "ddim", scheduler="DDIM", reference=_SONG),
    "ddpm": Sampler(ddpm, "ddpm", stochastic=True, scheduler="DDPM", reference=_HO),
    "pndm": Sampler(pndm, "pndm", order=2, scheduler="PNDM", reference="Liu et al. 2022, arXiv:2202.09778"),
    "dpmpp_2m": Sampler(dpmpp_2m, "multistep", order=2, scheduler="DPMSolverMultistep", reference=_LU_B),
    "dpmpp_2m_sde": Sampler(
        dpmpp_2m_sde, "multistep", 2, stochastic=True, scheduler="DPMSolverMultistep:sde-dpmsolver++", reference=_LU_B
    ),
    "dpmpp_2s_a": _two(dpmpp_2s_ancestral, stochastic=True, reference=_K),
    "dpmpp_sde": _two(dpmpp_sde, stochastic=True, scheduler="DPMSolverSDE", reference=_K),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, "multistep", order=2, stochastic=True, reference=_K),
    "unipc": Sampler(unipc, "multistep", order=2, scheduler="UniPCMultistep", reference=_ZHAO),
    "deis": Sampler(deis, "deis", order=2, scheduler="DEISMultistep", reference=_ZHANG),
    "lcm": Sampler(lcm, "lcm", stochastic=True, scheduler="LCM", reference=_LUO, consistency=True),
    "tcd": Sampler(tcd, "tcd", stochastic=True, scheduler="TCD", reference=_ZHENG),
}
