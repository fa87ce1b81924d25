"""Samplers: each a generator that integrates dx/dsigma = (x - D(x, sigma)) / sigma from noise to an image.

``denoise(x, sigma)`` is D, the model's estimate of the clean latent x0. ``x`` is the noisy latent
``x0 + sigma * noise``; ``sigmas`` descend to the end of the run. ``noise(draw, shape)`` gives the unit normal noise
that a stochastic sampler adds. Each step yields the next ``x``; history lives in local variables.

Three ideas recur. A step from sigma to s along the ODE with constant D is ``D + (s / sigma) * (x - D)``. A stochastic
step goes to a level below its target and returns to it with fresh noise. A multistep method fits a polynomial to its
last few evaluations and integrates it exactly.

The ``sigmas`` of a run carry their timesteps (``schedule.Sigma``). Levels that a sampler computes between them are
plain floats; the denoiser computes their timesteps.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import mlx.core as mx

from .multistep import (
    deis,
    dpmpp_2m,
    dpmpp_2m_cfg_pp,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_3m_sde,
    er_sde,
    ipndm,
    lms,
    pndm,
    res_multistep_ancestral,
    sa_solver,
    unipc,
)
from .transitions import Denoise, Noise, Sigmas, States, ancestral, churned, guided_and_uncond, noised, relabel, toward


def euler(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> States:
    """Run Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 2 without the second slope).

    ``s_churn``, 0 ... 0.41 times the number of steps, adds noise before each step with a sigma between ``s_tmin`` and
    ``s_tmax``, see :func:`transitions.churned`.
    """
    for i, target in enumerate(sigmas[1:]):
        x, sigma = churned(x, sigmas, noise, i, s_churn, s_tmin, s_tmax)
        x = toward(x, denoise(x, sigma), sigma, target)
        yield x


def euler_ancestral(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run Euler's method to a lower sigma and add noise up to the next one (k-diffusion): DDIM with ``eta`` 1."""
    yield from ddim(denoise, x, sigmas, noise, eta=eta)


def euler_ancestral_cfg_pp(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run CFG++ (Chung et al. 2024, algorithm 2): a step from the guided D that adds the unconditional noise.

    This is Euler's step for an ``x`` that guidance has shifted like D.
    """
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, target, eta)
        x0, uncond = guided_and_uncond(denoise(x, sigma), x)
        x = noised(toward(x + x0 - uncond, x0, sigma, down), up, noise, i)
        yield x


def heun(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
) -> States:
    """Run Heun's method (Karras et al. 2022, algorithm 2): the mean slope of both ends; the step to 0 is Euler's.

    ``s_churn``, ``s_tmin`` and ``s_tmax`` as for :func:`euler`.
    """
    for i, target in enumerate(sigmas[1:]):
        x, sigma = churned(x, sigmas, noise, i, s_churn, s_tmin, s_tmax)
        x0 = denoise(x, sigma)
        ahead = toward(x, x0, sigma, target)
        if target > 0:
            slope = ((x - x0) / sigma + (ahead - denoise(ahead, target)) / target) / 2
            ahead = x + (target - sigma) * slope
        x = ahead
        yield x


def dpm2_ancestral(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run DPM-Solver-2 (Lu et al. 2022a), with the slope half-way in log sigma; the step to 0 is Euler's.

    With ``eta`` above 0 it steps to a lower sigma and adds noise (k-diffusion).
    """
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, target, eta)
        x0 = denoise(x, sigma)
        if down > 0:
            middle = math.sqrt(sigma * down)
            halfway = toward(x, x0, sigma, middle)
            x = x + (down - sigma) * ((halfway - denoise(halfway, middle)) / middle)
        else:
            x = x0
        x = noised(x, up, noise, i)
        yield x


def ddim(
    denoise: Denoise,
    x: mx.array,
    sigmas: Sigmas,
    noise: Noise,
    *,
    eta: float = 0.0,
    target_sigmas: Sigmas | None = None,
    clip: Callable[[mx.array], mx.array] | None = None,
    noise_sigmas: Sigmas | None = None,
) -> States:
    """Run denoising diffusion implicit models (Song et al. 2021, eq. 12): Euler's method with partly fresh noise.

    The standard deviation of the fresh noise, eq. 16, is ``eta`` times that of ancestral sampling, or ``noise_sigmas``.
    ``target_sigmas`` are the levels where steps end, if the next steps start elsewhere. ``clip`` limits only x0: the
    noise in ``x`` follows from the estimate before clipping.
    """
    for i, (sigma, after) in enumerate(pairwise(sigmas)):
        target = after if target_sigmas is None else target_sigmas[i]
        down, up = ancestral(sigma, target, eta)
        x0 = denoise(x, sigma)
        up = up if noise_sigmas is None else noise_sigmas[i]
        x = noised(toward(x, x0, sigma, down), up, noise, i)
        if clip is not None:
            x = x + (clip(x0) - x0)
        x = relabel(x, target, after)
        yield x


def dpmpp_2s_ancestral(denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 1.0) -> States:
    """Run DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1): D from half-way in log sigma, with ancestral noise."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, target, eta)
        x0 = denoise(x, sigma)
        if down > 0:
            middle = math.sqrt(sigma * down)
            x0 = denoise(toward(x, x0, sigma, middle), middle)
        x = noised(toward(x, x0, sigma, down), up, noise, i)
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
            down, up = ancestral(sigma, middle, eta)
            halfway = toward(x, x0, sigma, down) + up * first
            down, up = ancestral(sigma, target, eta)
            x = toward(x, denoise(halfway, middle), sigma, down) + up * both
        else:
            x = toward(x, x0, sigma, target)
        yield x


def tcd(
    denoise: Denoise, x: mx.array, sigmas: Sigmas, noise: Noise, *, eta: float = 0.3, tcd_sigmas: Sigmas | None = None
) -> States:
    """Run trajectory consistency distillation (Zheng et al. 2024, algorithm 4; ``eta`` is their gamma).

    A step jumps beyond its target, to (1 - eta) of the target's time, and adds noise. ``tcd_sigmas`` are the levels of
    these jumps; without them sigma serves as the time.
    """
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        down = (1 - eta) * target if tcd_sigmas is None else tcd_sigmas[i]
        up = math.sqrt(max(target**2 - down**2, 0.0))
        x = noised(toward(x, denoise(x, sigma), sigma, down), up, noise, i)
        yield x


# Samplers that are others with fixed options.
euler_cfg_pp = partial(euler_ancestral_cfg_pp, eta=0.0)
dpm2 = partial(dpm2_ancestral, eta=0.0)
ddpm = partial(ddim, eta=1.0, clip=None)  # Ho et al. 2020, algorithm 2, with the posterior's variance
res_multistep = partial(res_multistep_ancestral, eta=0.0)
lcm = partial(tcd, eta=1.0, tcd_sigmas=None)  # every leap goes to x0: Luo et al. 2023, algorithm 3


@dataclass(frozen=True)
class Sampler:
    """Describe a sampler: a row of ``SAMPLERS``."""

    run: Callable[..., States]  # the generator function
    spacing_rule: str = "euler"  # places its steps, a key of SPACING_RULES
    order: int = 1  # order of the error in the step length, without noise
    highest_order: int = 4  # largest value of the option ``order``, if the sampler has it
    evaluations: int = 1  # evaluations of D in a step; PNDM has two in its first step
    stochastic: bool = False  # injects noise by default
    scheduler: str = ""  # the same scheduler of diffusers; after ":" the start of its algorithm_type
    reference: str = ""  # the paper or program that defines it
    consistency: bool = False  # wrap D for consistency models, see denoiser.consistency
    brownian: tuple[str, ...] = ()  # noise sources with Brownian noise for this sampler
    cfg_pp: bool = False  # D is [2, *x.shape]: guided, at any guidance scale, and unconditional

    @property
    def option_names(self) -> set[str]:
        """Return the names of the options: keyword arguments that are not bound by a ``partial``.

        Samplers with noise also have its factor, "s_noise".
        """
        parameters = inspect.signature(self.run).parameters.values()
        names = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        names -= getattr(self.run, "keywords", {}).keys()
        return names | {"s_noise"} if self.stochastic or names & {"eta", "s_churn"} else names


_two = partial(Sampler, order=2, evaluations=2)
_K = "k-diffusion"
_KARRAS = "Karras et al. 2022, arXiv:2206.00364"
_LU_A, _LU_B = "Lu et al. 2022, arXiv:2206.00927", "Lu et al. 2022, arXiv:2211.01095"
_HO, _SONG = "Ho et al. 2020, arXiv:2006.11239", "Song et al. 2021, arXiv:2010.02502"
_ZHANG, _ZHAO = "Zhang & Chen 2023, arXiv:2204.13902", "Zhao et al. 2023, arXiv:2302.04867"
_LUO, _ZHENG = "Luo et al. 2023, arXiv:2310.04378", "Zheng et al. 2024, arXiv:2402.19159"
_CHUNG = "Chung et al. 2024, arXiv:2406.08070"
_RES, _XUE = "Zhang et al. 2023, arXiv:2308.02157", "Xue et al. 2023, arXiv:2309.05019"
_dpmpp = partial(Sampler, spacing_rule="multistep", order=2, highest_order=3, reference=_LU_B)

SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(euler, scheduler="EulerDiscrete", reference=_KARRAS),
    "euler_a": Sampler(euler_ancestral, "euler_a", stochastic=True, scheduler="EulerAncestralDiscrete", reference=_K),
    "heun": _two(heun, scheduler="HeunDiscrete", reference=_KARRAS),
    "dpm2": _two(dpm2, "dpm2", scheduler="KDPM2Discrete", reference=_LU_A),
    "dpm2_a": _two(dpm2_ancestral, "dpm2", stochastic=True, scheduler="KDPM2AncestralDiscrete", reference=_K),
    "lms": Sampler(lms, order=4, scheduler="LMSDiscrete", reference=_K),
    "ddim": Sampler(ddim, "ddim", scheduler="DDIM", reference=_SONG),
    "ddpm": Sampler(ddpm, "ddpm", stochastic=True, scheduler="DDPM", reference=_HO),
    "pndm": Sampler(pndm, "pndm", order=2, scheduler="PNDM", reference="Liu et al. 2022, arXiv:2202.09778"),
    "dpmpp_2m": _dpmpp(dpmpp_2m, scheduler="DPMSolverMultistep"),
    "dpmpp_2m_sde": _dpmpp(dpmpp_2m_sde, stochastic=True, scheduler="DPMSolverMultistep:sde", brownian=("cuda",)),
    "dpmpp_2s": _dpmpp(dpmpp_2s, scheduler="DPMSolverSinglestep"),
    "dpmpp_2s_a": _two(dpmpp_2s_ancestral, stochastic=True, reference=_K),
    "dpmpp_sde": _two(dpmpp_sde, stochastic=True, scheduler="DPMSolverSDE", reference=_K, brownian=("torch", "cuda")),
    "dpmpp_3m_sde": Sampler(
        dpmpp_3m_sde, "multistep", order=2, stochastic=True, reference=_K, brownian=("torch", "cuda")
    ),
    "unipc": Sampler(unipc, "multistep", order=2, scheduler="UniPCMultistep", reference=_ZHAO),
    "deis": Sampler(deis, "deis", order=2, highest_order=3, scheduler="DEISMultistep", reference=_ZHANG),
    "ipndm": Sampler(ipndm, order=2, reference=_ZHANG),
    "res_multistep": Sampler(res_multistep, order=2, reference=_RES),
    "res_multistep_a": Sampler(res_multistep_ancestral, order=2, stochastic=True, reference=_RES),
    "er_sde": Sampler(er_sde, order=2, highest_order=3, stochastic=True, reference="Cui et al. 2023, arXiv:2309.06169"),
    "sa_solver": Sampler(sa_solver, "deis", order=2, stochastic=True, scheduler="SASolver", reference=_XUE),
    "lcm": Sampler(lcm, "lcm", stochastic=True, scheduler="LCM", reference=_LUO, consistency=True),
    "tcd": Sampler(tcd, "tcd", stochastic=True, scheduler="TCD", reference=_ZHENG),
    "euler_cfg_pp": Sampler(euler_cfg_pp, reference=_CHUNG, cfg_pp=True),
    "euler_a_cfg_pp": Sampler(euler_ancestral_cfg_pp, "euler_a", stochastic=True, reference=_CHUNG, cfg_pp=True),
    "dpmpp_2m_cfg_pp": Sampler(dpmpp_2m_cfg_pp, "multistep", order=2, reference=_CHUNG, cfg_pp=True),
}
