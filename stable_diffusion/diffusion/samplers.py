"""Samplers: each a generator that integrates dx/dsigma = (x - D(x, sigma)) / sigma from noise to an image.

``denoise(x, sigma)`` is D, the model's estimate of the clean latent x0. ``x`` is the noisy latent
``x0 + sigma * noise``; ``sigmas`` descend to where the run ends. ``noise(draw, shape)`` is what a stochastic sampler
injects, unit normal. Each step yields the next ``x``; history lives in local variables.

Three ideas recur. A step from sigma to s along the ODE with D held fixed is ``D + (s / sigma) * (x - D)``. A
stochastic step goes to a level below its target and returns to it with fresh noise. And a multistep method weighs its
last few values as the polynomial through them is integrated, exactly, against the method's own measure.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx

Denoiser = Callable[[mx.array, float], mx.array]
Noise = Callable[[int, tuple[int, ...]], mx.array]
States = Iterator[mx.array]


def euler(denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise) -> States:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn)."""
    for sigma, target in pairwise(sigmas):
        x = _toward(x, denoise(x, sigma), sigma, target)
        yield x


def euler_ancestral(
    denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> States:
    """Euler's method to a lower sigma, then fresh noise up to the next one (k-diffusion's ancestral sampling).

    That is DDIM with ``eta`` 1, which both spell out below.
    """
    yield from ddim(denoise, x, sigmas, noise, eta=eta, s_noise=s_noise)


def heun(denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise) -> States:
    """Heun's method (Karras et al. 2022, algorithm 1): mean slope of both ends; the step to 0 is Euler's."""
    for sigma, target in pairwise(sigmas):
        x0 = denoise(x, sigma)
        ahead = _toward(x, x0, sigma, target)
        if target > 0:
            slope = ((x - x0) / sigma + (ahead - denoise(ahead, target)) / target) / 2
            ahead = x + (target - sigma) * slope
        x = ahead
        yield x


def dpm2(denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise) -> States:
    """DPM-Solver-2 (Lu et al. 2022a) in Karras's form: the slope half-way in log sigma; the step to 0 is Euler's."""
    yield from dpm2_ancestral(denoise, x, sigmas, noise, eta=0.0)


def dpm2_ancestral(
    denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> States:
    """DPM-Solver-2 to a lower sigma, then fresh noise up to the next one (k-diffusion)."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down, up = _ancestral(sigma, target, eta)
        x0 = denoise(x, sigma)
        if down > 0:
            # With eta 1 the middle is the target itself. The network is told the timestep of its sigma, and not the
            # run's own, which may be rounded: so it is kept apart by a hair.
            middle = math.sqrt(sigma * down) * (1 + 1e-12)
            halfway = _toward(x, x0, sigma, middle)
            x = x + (down - sigma) * ((halfway - denoise(halfway, middle)) / middle)
        else:
            x = x0
        if up > 0:
            x = x + (up * s_noise) * noise(i, x.shape)
        yield x


def lms(denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, order: int = 4) -> States:
    """Linear multistep method (Adams-Bashforth with uneven steps, as in k-diffusion).

    The slope is extrapolated by the polynomial in sigma through its last ``order`` values.
    """
    history: list[tuple[float, mx.array]] = []
    for sigma, target in pairwise(sigmas):
        history = [(sigma, (x - denoise(x, sigma)) / sigma), *history][:order]
        moments = [(target - sigma) ** (k + 1) / (k + 1) for k in range(len(history))]
        x = x + _blend(history, _weights([level - sigma for level, _ in history], moments))
        yield x


def ddim(
    denoise: Denoiser,
    x: mx.array,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    targets: Sequence[float] | None = None,
) -> States:
    """Denoising diffusion implicit models (Song et al. 2021, eq. 12): Euler's method here, with eta of its noise fresh.

    Their standard deviation, eq. 16, is ``eta`` times that of ancestral sampling. ``targets`` are the levels that the
    steps lead to, where these are not those at which the next steps start.
    """
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        target = after if targets is None else targets[i]
        down, up = _ancestral(sigma, target, eta)
        x = _toward(x, denoise(x, sigma), sigma, down)
        if up > 0:
            x = x + (up * s_noise) * noise(i, x.shape)
        x = _relabel(x, target, after)
        yield x


def ddpm(denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, s_noise: float = 1.0) -> States:
    """Denoising diffusion probabilistic models (Ho et al. 2020, algorithm 2, with the posterior's variance)."""
    yield from ddim(denoise, x, sigmas, noise, eta=1.0, s_noise=s_noise)


def pndm(
    denoise: Denoiser,
    x: mx.array,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    velocity: bool = False,
    targets: Sequence[float] | None = None,
    again: float | None = None,
) -> States:
    """Pseudo linear multistep method (Liu et al. 2022, algorithm 2; PLMS): Adams-Bashforth on the predicted noise.

    The first step is repeated with the mean of the noise at both its ends. ``velocity`` says that the model predicts
    v, which is then what is extrapolated. ``targets`` as for :func:`ddim`; ``again`` is the level that the repeated
    step starts from.
    """
    targets = sigmas[1:] if targets is None else targets
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
        mixed = _blend(history, _ADAMS_BASHFORTH[len(history)])
        ahead = _relabel(transfer(x, mixed, sigma, targets[i]), targets[i], after)
        if i == 0 and len(sigmas) > 2:
            start = sigma if again is None else again
            mixed = (mixed + prediction(ahead, after)) / 2
            ahead = transfer(_relabel(x, sigma, start), mixed, start, after)
        x = ahead
        yield x


_ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def dpmpp_2m(
    denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, lower_order_final: bool = False
) -> States:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): exponential integrator that extrapolates D from two steps."""
    yield from dpmpp_2m_sde(denoise, x, sigmas, noise, eta=0.0, lower_order_final=lower_order_final)


def dpmpp_2m_sde(
    denoise: Denoiser,
    x: mx.array,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    lower_order_final: bool = False,
) -> States:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, sec. 4; midpoint): the same, of the reverse SDE.

    With ``lambda = -log(sigma)`` the step length is ``h``. The first step is of first order, so is one to 0, and with
    ``lower_order_final`` the last in any case.
    """
    previous, h_previous = None, math.inf
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0 = estimate = denoise(x, sigma)
        h = math.log(sigma / target) if target > 0 else math.inf
        lower = lower_order_final and i == len(sigmas) - 2
        if previous is not None and 0 < h < math.inf and not lower:
            estimate = x0 + (x0 - previous) * (h / (2 * h_previous))
        down, up = _reverse_sde(sigma, target, eta)
        x = _toward(x, estimate, sigma, down)
        if up > 0:
            x = x + (up * s_noise) * noise(i, x.shape)
        previous, h_previous = x0, h
        yield x


def dpmpp_2s_ancestral(
    denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> States:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1), D from half-way in log sigma; ancestral noise (k-diffusion)."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down, up = _ancestral(sigma, target, eta)
        x0 = denoise(x, sigma)
        if down > 0:
            middle = math.sqrt(sigma * down)
            x0 = denoise(_toward(x, x0, sigma, middle), middle)
        x = _toward(x, x0, sigma, down)
        if up > 0:
            x = x + (up * s_noise) * noise(i, x.shape)
        yield x


def dpmpp_sde(
    denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> States:
    """DPM-Solver++ of the SDE (k-diffusion; Lu et al. 2022b): D from half-way in log sigma, with noise on both halves.

    The noise is that of one Brownian motion in sigma: its increments over the two halves are drawn, and the whole
    step's is their sum. Step i draws number 2 i and 2 i + 1.
    """
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        if 0 < target < sigma:
            middle = math.sqrt(sigma * target)
            first, second = noise(2 * i, x.shape), noise(2 * i + 1, x.shape)
            whole = math.sqrt((sigma - middle) / (sigma - target)) * first
            whole = whole + math.sqrt((middle - target) / (sigma - target)) * second
            down, up = _ancestral(sigma, middle, eta)
            halfway = _toward(x, x0, sigma, down) + (up * s_noise) * first
            down, up = _ancestral(sigma, target, eta)
            x = _toward(x, denoise(halfway, middle), sigma, down) + (up * s_noise) * whole
        else:
            x = _toward(x, x0, sigma, target)
        yield x


def dpmpp_3m_sde(
    denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> States:
    """SDE-DPM-Solver++(3M) (k-diffusion; Lu et al. 2022b): D extrapolated from three steps.

    ``slope`` and ``bend`` are the first and second divided differences of D in units of this step.
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
        if up > 0:
            x = x + (up * s_noise) * noise(i, x.shape)
        yield x


def unipc(denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, order: int = 2) -> States:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2, B(h) = e^h - 1): a predictor that the next D corrects.

    Both are steps towards a blend of D's; the corrector repeats the last step with the D found at its end. The order
    falls to 1 towards the end.
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
    denoise: Denoiser,
    x: mx.array,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    order: int = 2,
    lower_order_final: bool = False,
) -> States:
    """Diffusion exponential integrator sampler (Zhang & Chen 2023, rho-AB in log rho).

    The predicted noise is extrapolated by the polynomial in log sigma through its last ``order`` values. A step to 0
    is of first order; with ``lower_order_final`` the order falls to 1 towards the end.
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


def lcm(denoise: Denoiser, x: mx.array, sigmas: Sequence[float], noise: Noise, *, s_noise: float = 1.0) -> States:
    """Latent consistency models (Luo et al. 2023, algorithm 3): to x0 in one leap, and back to the next level."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x = denoise(x, sigma)
        if target > 0:
            x = x + (target * s_noise) * noise(i, x.shape)
        yield x


def tcd(
    denoise: Denoiser,
    x: mx.array,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 0.3,
    s_noise: float = 1.0,
    stops: Sequence[float] | None = None,
) -> States:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4; ``eta`` is their gamma).

    A leap goes beyond its target, to (1 - eta) of its time, and noise leads back. ``stops`` are the levels that it
    goes to; without them sigma is taken for the time.
    """
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        stop = (1 - eta) * target if stops is None else stops[i]
        x = _toward(x, denoise(x, sigma), sigma, stop)
        if stop < target:
            x = x + (math.sqrt(target**2 - stop**2) * s_noise) * noise(i, x.shape)
        yield x


def _toward(x: mx.array, x0: mx.array, sigma: float, target: float) -> mx.array:
    """From ``sigma`` to ``target`` along the ODE while D stays ``x0``; nothing cancels in it at large sigma."""
    return x0 + (target / sigma) * (x - x0)


def _ancestral(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """Split a step to ``target`` into an ODE step down to the first value and noise of the second, ``up <= target``."""
    up = min(target, eta * math.sqrt(max(target**2 * (sigma**2 - target**2) / sigma**2, 0.0)))
    return math.sqrt(target**2 - up**2), up


def _reverse_sde(sigma: float, target: float, eta: float) -> tuple[float, float]:
    """The same split for an exact step of the reverse SDE, whose noise decays as it is injected; eta 0 is the ODE."""
    ratio = (target / sigma) ** eta
    return target * ratio, target * math.sqrt(1 - ratio**2)


def _relabel(x: mx.array, sigma: float, level: float) -> mx.array:
    """Take a latent at ``sigma`` for one at ``level``, as it is in variance-preserving scale."""
    return x if sigma == level else x * math.sqrt((1 + level**2) / (1 + sigma**2))


def _blend(history: Sequence[tuple[float, mx.array]], weights: Sequence[float]) -> mx.array:
    """The weighted sum of the arrays in a history of (level, array)."""
    total = weights[0] * history[0][1]
    for weight, (_, value) in zip(weights[1:], history[1:], strict=True):
        total = total + weight * value
    return total


def _exponential_blend(points: Sequence[tuple[float, mx.array]], target: float) -> mx.array:
    """Blend D's so that a step towards the result integrates the polynomial in lambda through them.

    The step runs from the first point's sigma to ``target``. In units of the step, the mean of r^k under the weight
    e^(h r) is M_k = 1 / (1 - e^-h) - k / h M_(k-1). With two points M_1 is replaced by 1/2, its limit for small h.
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
    """Weights w with sum_j w_j nodes_j^k = moments_k: the rule that is exact for polynomials through the nodes.

    The weights are the moments of the Lagrange polynomials, each multiplied out from its roots.
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
    """A row of ``SAMPLERS``: the generator, and what people and the pipeline want to know of it.

    ``grid`` names how its steps are placed (``schedule.GRIDS``); ``order`` is that of the error in the step length,
    without noise; ``evaluations`` of D are made in a step (of the first one, PNDM makes two);
    ``schedulers`` are the diffusers classes that it is; ``consistency`` says that D is wrapped for a model that leaps
    (``denoise.consistency``).
    """

    run: Callable[..., States]
    grid: str = "euler"
    order: int = 1
    evaluations: int = 1
    stochastic: bool = False
    reference: str = ""
    schedulers: tuple[str, ...] = ()
    consistency: bool = False


_DPM = "DPMSolverMultistepScheduler"
_LU = "Lu et al. 2022, arXiv:2211.01095"

SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler, reference="Karras et al. 2022, arXiv:2206.00364", schedulers=("EulerDiscreteScheduler",)),
    "euler_a": Sampler(
        euler_ancestral, stochastic=True, reference="k-diffusion", schedulers=("EulerAncestralDiscreteScheduler",)
    ),
    "heun": Sampler(heun, "euler", 2, 2, False, "Karras et al. 2022, arXiv:2206.00364", ("HeunDiscreteScheduler",)),
    "dpm2": Sampler(dpm2, "dpm2", 2, 2, False, "Lu et al. 2022, arXiv:2206.00927", ("KDPM2DiscreteScheduler",)),
    "dpm2_a": Sampler(dpm2_ancestral, "dpm2", 2, 2, True, "k-diffusion", ("KDPM2AncestralDiscreteScheduler",)),
    "lms": Sampler(lms, "euler", 4, 1, False, "k-diffusion", ("LMSDiscreteScheduler",)),
    "ddim": Sampler(ddim, "ddim", 1, 1, False, "Song et al. 2021, arXiv:2010.02502", ("DDIMScheduler",)),
    "ddpm": Sampler(ddpm, "ddpm", 1, 1, True, "Ho et al. 2020, arXiv:2006.11239", ("DDPMScheduler",)),
    "pndm": Sampler(pndm, "pndm", 2, 1, False, "Liu et al. 2022, arXiv:2202.09778", ("PNDMScheduler",)),
    "dpmpp_2m": Sampler(dpmpp_2m, "multistep", 2, 1, False, _LU, (_DPM,)),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, "multistep", 2, 1, True, _LU, (f"{_DPM}:sde-dpmsolver++",)),
    "dpmpp_2s_a": Sampler(dpmpp_2s_ancestral, "euler", 2, 2, True, "k-diffusion"),
    "dpmpp_sde": Sampler(dpmpp_sde, "euler", 2, 2, True, "k-diffusion", ("DPMSolverSDEScheduler",)),
    "dpmpp_3m_sde": Sampler(dpmpp_3m_sde, "multistep", 2, 1, True, "k-diffusion"),
    "unipc": Sampler(
        unipc, "multistep", 2, 1, False, "Zhao et al. 2023, arXiv:2302.04867", ("UniPCMultistepScheduler",)
    ),
    "deis": Sampler(deis, "deis", 2, 1, False, "Zhang & Chen 2023, arXiv:2204.13902", ("DEISMultistepScheduler",)),
    "lcm": Sampler(lcm, "lcm", 1, 1, True, "Luo et al. 2023, arXiv:2310.04378", ("LCMScheduler",), consistency=True),
    "tcd": Sampler(tcd, "tcd", 1, 1, True, "Zheng et al. 2024, arXiv:2402.19159", ("TCDScheduler",)),
}

# Classes without a sampler of their own here, and the nearest; names in use elsewhere, as `_key` writes them.
_NEAREST = {"DPMSolverSinglestepScheduler": "dpmpp_2m", f"{_DPM}:sde-dpmsolver": "dpmpp_2m_sde"}
_ALIASES = {
    "plms": "pndm",
    "eulerancestral": "euler_a",
    "dpm2ancestral": "dpm2_a",
    "dpmpp2sancestral": "dpmpp_2s_a",
}
_SCHEDULE_WORDS = {
    "karras": "karras",
    "polyexponential": "polyexponential",
    "exponential": "exponential",
    "sgmuniform": "sgm_uniform",
    "alignyoursteps": "align_your_steps",
    "beta": "beta",
}


def read_name(name: str) -> tuple[str, str | None]:
    """(sampler, schedule) of a name as people write it: "dpmpp_2m", "DPM++ 2M Karras", "Euler a", "k_lms".

    The schedule is None where the name has none. ValueError lists the samplers.
    """
    key, schedule = _key(name), None
    for word, value in _SCHEDULE_WORDS.items():
        if key.endswith(word):
            key, schedule = key.removesuffix(word), value
            break
    known = {_key(sampler): sampler for sampler in SAMPLERS} | _ALIASES
    for candidate in (key, key.removeprefix("k")):
        if candidate in known:
            return known[candidate], schedule
    raise ValueError(f"sampler {name!r} is unknown; choose one of {', '.join(SAMPLERS)}")


def _key(name: str) -> str:
    return "".join(c for c in name.lower().replace("+", "p") if c.isalnum())


def find_sampler(name: str | Callable[..., States]) -> Sampler:
    """The row of a sampler's name, or one for a function with a sampler's signature; ValueError lists the names."""
    return Sampler(name) if callable(name) else SAMPLERS[read_name(name)[0]]


def sampler_for(scheduler: str, algorithm: str | None = None) -> tuple[str, bool]:
    """The sampler for a checkpoint's scheduler class, and whether it is that very method or the nearest there is.

    ``algorithm`` is the scheduler's ``algorithm_type``, where it has one.
    """
    for wanted in (f"{scheduler}:{algorithm}", scheduler):
        for name, sampler in SAMPLERS.items():
            if wanted in sampler.schedulers:
                return name, True
        if wanted in _NEAREST:
            return _NEAREST[wanted], False
    return "euler", False


def keywords(run: Callable[..., States]) -> set[str]:
    """The names of the keyword arguments that a sampler takes beyond the four that all have."""
    parameters = inspect.signature(run).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def options(sampler: Sampler, **given: Any) -> dict[str, Any]:
    """Those of the ``given`` options that are not None; ValueError for one that the sampler has no use for."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if unknown := chosen.keys() - keywords(sampler.run):
        name = getattr(sampler.run, "__name__", "of your own")
        raise ValueError(f"sampler {name} takes no {', '.join(sorted(unknown))}; leave it out")
    return chosen


def table() -> str:
    """All samplers, one a line: name, order, evaluations of the model in a step, stochastic or not, reference."""
    rows = [("sampler", "order", "evaluations", "stochastic", "reference")]
    for name, s in SAMPLERS.items():
        rows.append((name, str(s.order), str(s.evaluations), "yes" if s.stochastic else "no", s.reference))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
