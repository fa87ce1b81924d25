"""The noise schedule: betas -> sigma table, the steps of a run, and sigma <-> t. Python floats, no arrays.

Everything here lives in one space. A noisy latent is ``x = x0 + sigma * noise`` (Karras et al. 2022). A model trained
on ``sqrt(a) * x0 + sqrt(1 - a) * noise`` (Ho et al. 2020) knows this level as ``sigma = sqrt((1 - a) / a)``, with ``a``
the cumulative product of ``1 - beta``.
"""

import math
import operator
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from .curves import CURVES, TABLES, log_linear
from .spacing import SPACING_RULES, SPACINGS, SpacingRule, distilled_timesteps, spaced_timesteps

SCHEDULES = ("default", *CURVES, "sgm_uniform", *TABLES)

# With zero terminal SNR (Lin et al. 2024) the last sigma is infinite. In float32, 2^32 already is: x0 drowns in
# rounding, and every formula below stays finite. Samplers other than DDIM cap it where diffusers does.
_INFINITE = 2.0**32
_CAPPED = math.sqrt((1 - 2.0**-24) / 2.0**-24)


_SCHEDULE_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace", None),
    "final_sigmas_type": ("zero", "sigma_min"),
}

# Settings that would change the noise levels or the timesteps, with the values that change nothing.
_SCHEDULE_FIXED: Mapping[str, tuple] = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (),
    "use_lu_lambdas": (),
    "sigma_min": (),
    "sigma_max": (),
}

# Settings of a checkpoint's preferred sampler, with the values that the sampler here has; then those of its class.
_SAMPLER_FIXED: Mapping[str, tuple] = {
    "thresholding": (False,),
    "clip_sample": (False,),
    "disable_corrector": ([],),
    "solver_p": (),
    "predict_x0": (True,),
}
_MULTISTEP_FIXED: Mapping[str, tuple] = {"solver_order": (2,), "solver_type": ("midpoint",)}
_SAMPLER_OF_CLASS: Mapping[str, Mapping[str, tuple]] = {
    "DPMSolverMultistepScheduler": _MULTISTEP_FIXED | {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),
        "lower_order_final": (True,),
    },
    "DEISMultistepScheduler": {"solver_order": (2,)},
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    "DDPMScheduler": {"variance_type": ("fixed_small",)},
}


# The pipelines in which diffusers reads any steps_offset as 1: old files lack it, and were trained with 1.
_OFFSET_ONE = {f"StableDiffusion{mode}Pipeline" for mode in ("", "Img2Img", "Inpaint")}


@dataclass(frozen=True)
class ScheduleConfig:
    """Describe the noise that a model was trained on and its preferred sampler, from ``scheduler_config.json``.

    ``timestep_spacing`` is None where the file has none: the default then depends on the sampler. ``sigma_schedule``
    gathers the flags ``use_karras_sigmas``, ``use_exponential_sigmas`` and ``use_beta_sigmas``. ``not_followed`` lists
    settings of the preferred sampler, such as "solver_order=3", that the samplers here do not have.
    """

    class_name: str = "DDIMScheduler"
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    sigma_schedule: str = "default"
    final_sigmas_type: str = "zero"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    algorithm_type: str | None = None
    lower_order_final: bool = True
    not_followed: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], pipeline: str = "") -> "ScheduleConfig":
        """Read a scheduler's JSON; ValueError names a setting of the noise that is not computed here.

        ``pipeline`` is the class of diffusers that the checkpoint is for.
        """
        fields = {k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None}
        if pipeline in _OFFSET_ONE:
            fields["steps_offset"] = 1
        fields["class_name"] = raw.get("_class_name", "DDIMScheduler")
        if fields.get("trained_betas") is not None:
            fields["trained_betas"] = tuple(fields["trained_betas"])
        curves = [name for name in ("karras", "exponential", "beta") if raw.get(f"use_{name}_sigmas")]
        if len(curves) > 1:
            raise ValueError(f"scheduler config: only one of use_{'_sigmas, use_'.join(curves)}_sigmas can hold")
        fields["sigma_schedule"] = curves[0] if curves else "default"
        for key, supported in _SCHEDULE_FIXED.items():
            if raw.get(key) not in (None, False, *supported):
                raise ValueError(f"scheduler config: {key}={raw[key]!r} is not supported")
        followed = _SAMPLER_FIXED | _SAMPLER_OF_CLASS.get(fields["class_name"], {})
        fields["not_followed"] = tuple(
            f"{key}={raw[key]!r}" for key, supported in followed.items() if raw.get(key) not in (None, *supported)
        )
        return cls(**fields)

    def __post_init__(self) -> None:
        for key, allowed in _SCHEDULE_CHOICES.items():
            if (value := getattr(self, key)) not in allowed:
                names = ", ".join(repr(a) for a in allowed if a)
                raise ValueError(f"scheduler config: {key}={value!r} is not supported (supported: {names})")


class Sigma(float):
    """Hold a noise level of a run with the ``step`` that starts there and the ``timestep`` that the network gets.

    Arithmetic gives plain floats. So a level that a sampler computes knows neither.
    """

    __slots__ = ("step", "timestep")
    step: int
    timestep: float

    def __new__(cls, sigma: float, step: int, timestep: float) -> "Sigma":
        """Make the level ``sigma`` of one step."""
        self = super().__new__(cls, sigma)
        self.step, self.timestep = step, timestep
        return self

    def __getnewargs__(self) -> tuple[float, int, float]:
        """Return the arguments that copy and pickle make the level from."""
        return float(self), self.step, self.timestep


@dataclass(frozen=True)
class Steps:
    """Hold the noise levels of one run: a :class:`Sigma` for each step, and last the plain float where the run ends.

    ``total`` is the number of steps before :meth:`last` cut some off. ``stride`` is the number of timesteps that each
    step goes down, or 0 where a step leads to the start of the next (see :meth:`Schedule.target_sigmas`).
    """

    sigmas: tuple[float, ...]
    total: int
    stride: int = 0

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Return the timestep of each step, descending."""
        return tuple(sigma.timestep for sigma in self.sigmas[:-1])

    def last(self, count: int) -> "Steps":
        """Return the run of the last ``count`` steps: image to image starts in the middle."""
        levels = self.sigmas[len(self) - count : -1]
        return replace(self, sigmas=(*_numbered(levels, [level.timestep for level in levels]), self.sigmas[-1]))

    def step_at(self, sigma: float) -> int:
        """Return the step that a noise level belongs to: a Sigma's own, or the last that starts at it or above."""
        if isinstance(sigma, Sigma):
            return sigma.step
        rounded = sigma * (1 - 1e-6)  # a level of the run that went through float32 belongs to its step
        return max(sum(level >= rounded for level in self.sigmas[:-1]) - 1, 0)


def _numbered(sigmas: Sequence[float], timesteps: Sequence[float]) -> list[Sigma]:
    return [Sigma(sigma, step, t) for step, (sigma, t) in enumerate(zip(sigmas, timesteps, strict=True))]


class Schedule:
    """Hold the noise levels that a model was trained on, and lay runs through them.

    The tables are rounded to float32 where the training code and diffusers round them. Only so do the small sigmas
    equal theirs to 1e-6, and timesteps on the edge of a whole number fall to the same side. What is derived from the
    tables is float64.
    """

    def __init__(self, config: ScheduleConfig):
        self.config = config
        alphas_cumprod = _alphas_cumprod(config)
        self.alphas_cumprod: tuple[float, ...] = tuple(alphas_cumprod)
        complements = array("f", (1 - a for a in alphas_cumprod))
        odds = array("f", (b / a if a > 0 else _INFINITE**2 for a, b in zip(alphas_cumprod, complements, strict=True)))
        self.sigmas: tuple[float, ...] = tuple(array("f", map(math.sqrt, odds)))
        self._finite = tuple(_CAPPED if a == 0 else s for a, s in zip(alphas_cumprod, self.sigmas, strict=True))
        self._logs = tuple(array("f", map(math.log, self._finite)))

    def sigma(self, t: float) -> float:
        """Return the noise level at ``t``, linear in sigma between two training timesteps."""
        low = min(max(math.floor(t), 0), len(self.sigmas) - 1)
        if low == t:
            return self.sigmas[low]
        high = min(low + 1, len(self.sigmas) - 1)
        return self._finite[low] + (t - low) * (self._finite[high] - self._finite[low])

    def timestep(self, sigma: float) -> float:
        """Return the timestep of a noise level: a Sigma's own, or computed for a plain float.

        It is linear in log sigma between two training timesteps, and clamped to their range.
        """
        if isinstance(sigma, Sigma):
            return sigma.timestep
        log = math.log(max(sigma, 1e-10))
        high = bisect_right(self._logs, log)
        if high in (0, len(self._logs)):
            return float(min(high, len(self._logs) - 1))
        below, above = self._logs[high - 1 : high + 1]
        return high - 1 + (log - below) / (above - below)

    def steps(self, count: int, rule: str = "euler", spacing: str | None = None, schedule: str | None = None) -> Steps:
        """Lay a run of ``count`` steps, from the noisiest down.

        Args:
            count: number of steps, 1 ... num_train_timesteps.
            rule: how the sampler's family places its steps, a key of ``SPACING_RULES``.
            spacing: one of ``SPACINGS``, how the timesteps are spread. None takes the checkpoint's spacing, or the
                rule's default where the checkpoint names none.
            schedule: one of ``SCHEDULES``. "default" follows the timesteps, "sgm_uniform" is even in timesteps and
                stops one short of the last, the others lay the sigmas along a curve (see ``curves``). None is the
                checkpoint's.

        Raises:
            ValueError: a number or name out of range.
        """
        total, family = self.config.num_train_timesteps, SPACING_RULES[rule]
        if not 1 <= count <= total:
            raise ValueError(f"{count} steps: the model was trained on {total} timesteps; choose 1 to {total}")
        schedule = self.config.sigma_schedule if schedule is None else schedule
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        timesteps = self._timesteps(count, family, spacing)
        if schedule == "default":
            stride = total // count if family.fixed_stride else 0
            return self._run(timesteps, self._levels(timesteps, family), family, stride)
        sigmas = self._curve(
            schedule, count, self._finite if family.curves_span_training else self._levels(timesteps[::-1], family)
        )
        timesteps = [self.timestep(sigma) for sigma in sigmas]
        if schedule in family.rounding:
            timesteps = [float(family.rounding[schedule](t)) for t in timesteps]
        return self._run(timesteps, sigmas, family)

    def at_timesteps(self, timesteps: Sequence[float], rule: str = "euler") -> Steps:
        """Lay a run through descending ``timesteps``; it ends where the ``rule`` says."""
        total, family = self.config.num_train_timesteps, SPACING_RULES[rule]
        if not timesteps or any(a <= b for a, b in pairwise((total, *timesteps, -1))):
            raise ValueError(f"timesteps {list(timesteps)} must descend and lie in 0 ... {total - 1}")
        return self._run([float(t) for t in timesteps], self._levels(timesteps, family), family)

    def at_sigmas(self, sigmas: Sequence[float]) -> Steps:
        """Lay a run through descending noise levels, of which the last, usually 0, is where it ends."""
        if len(sigmas) < 2 or sigmas[-1] < 0 or any(a <= b for a, b in pairwise(sigmas)):
            raise ValueError(f"sigmas {list(sigmas)} must descend and be at least two, of which the last is the end")
        levels = _numbered(sigmas[:-1], [self.timestep(sigma) for sigma in sigmas[:-1]])
        return Steps((*levels, float(sigmas[-1])), total=len(levels))

    def remaining(self, steps: Steps, share: float) -> int:
        """Count the steps that are left when ``share`` of the training noise is gone: all at 0, none at 1."""
        total = self.config.num_train_timesteps
        return len(steps) if share == 0 else sum(t < round(total - share * total) for t in steps.timesteps)

    def initial_scale(self, steps: Steps, rule: str = "euler", spacing: str | None = None) -> float:
        """Return the standard deviation of the latent that a run starts from.

        The noisiest latent of the training process has variance ``sigma^2 + 1`` here. Euler's family drops the 1 where
        its first step is the last training timestep.
        """
        sigma, family = steps.sigmas[0], SPACING_RULES[rule]
        at_sigma = family.starts_at_sigma and self._spacing(family, spacing) != "leading"
        return float(sigma) if at_sigma else math.sqrt(sigma**2 + 1)

    def target_sigmas(self, steps: Steps) -> list[float]:
        """Return the level that each step leads to: ``stride`` timesteps down.

        In diffusers, DDIM and PNDM leave a timestep t for t - total // count. Then they take the latent, in variance
        preserving scale, for one at the next timestep. With "leading" spacing the two are the same. With the others
        they differ where the number of steps does not divide the number of timesteps.
        """
        if not steps.stride:
            return list(steps.sigmas[1:])
        below = [t - steps.stride for t in steps.timesteps]
        return [self.sigma(t) if t >= 0 else steps.sigmas[-1] for t in below]

    def repeat_sigma(self, steps: Steps) -> float:
        """Return the level that PNDM repeats its first step from: ``stride`` timesteps above the second step."""
        if not steps.stride or len(steps) < 2:
            return steps.sigmas[0]
        return self.sigma(steps.timesteps[1] + steps.stride)

    def tcd_sigmas(self, steps: Steps, gamma: float) -> list[float]:
        """Return the levels that TCD leaps to: (1 - gamma) of the timestep of each target, rounded down."""
        timesteps = (*steps.timesteps[1:], 0.0)
        leaps = [self.sigma(math.floor(round((1 - gamma) * t, 4))) for t in timesteps]
        return [min(leap, target) for leap, target in zip(leaps, steps.sigmas[1:], strict=True)]

    def _spacing(self, family: SpacingRule, spacing: str | None) -> str:
        spacing = spacing or self.config.timestep_spacing or family.spacing
        if spacing not in SPACINGS:
            raise ValueError(f"timestep spacing {spacing!r} is unknown; choose leading, trailing or linspace")
        return spacing

    def _timesteps(self, count: int, family: SpacingRule, spacing: str | None) -> list[float]:
        total = self.config.num_train_timesteps
        if family.distilled and spacing is None:
            return distilled_timesteps(count, total, self.config.original_inference_steps)
        return spaced_timesteps(count, total, family, self._spacing(family, spacing), self.config.steps_offset)

    def _levels(self, timesteps: Sequence[float], family: SpacingRule) -> list[float]:
        sigmas = [self.sigma(t) for t in timesteps]
        return sigmas if family.keeps_infinite_sigma else [_CAPPED if s == _INFINITE else s for s in sigmas]

    def _curve(self, schedule: str, count: int, ascending: Sequence[float]) -> list[float]:
        """Return ``count`` levels of a schedule that is no "default"; curves run between the ends of ``ascending``."""
        if schedule in CURVES:
            high = self._finite[-1] if ascending[-1] == _INFINITE else ascending[-1]
            return CURVES[schedule](count, high, ascending[0])
        if schedule in TABLES:
            return log_linear(TABLES[schedule], count + 1)[:-1]
        return [self._log_sigma((len(self._logs) - 1) * (1 - i / count)) for i in range(count)]

    def _log_sigma(self, t: float) -> float:
        """Return the noise level at ``t``, linear in log sigma: the inverse of :meth:`timestep`."""
        low = min(int(t), len(self._logs) - 2)
        below, above = self._logs[low : low + 2]
        return math.exp(below + (t - low) * (above - below))

    def _run(self, timesteps: Sequence[float], sigmas: Sequence[float], family: SpacingRule, stride: int = 0) -> Steps:
        ends_at_first = {
            "zero": False,
            "first": True,
            "final_sigmas_type": self.config.final_sigmas_type == "sigma_min",
            "set_alpha_to_one": not self.config.set_alpha_to_one,
        }
        final = self.sigmas[0] if ends_at_first[family.final_sigma] else 0.0
        return Steps((*_numbered(sigmas, timesteps), final), len(timesteps), stride)


def _alphas_cumprod(config: ScheduleConfig) -> Sequence[float]:
    """Return the cumulative products of 1 - beta, in float32 with a float64 accumulator as in training."""
    alphas = array("f", (1 - beta for beta in _betas(config)))
    if not config.rescale_betas_zero_snr:
        return _cumulative_product(alphas)
    # Lin et al. 2024, algorithm 1: shift sqrt(a) so that it ends in 0, scale so that it starts where it did.
    roots = array("f", map(math.sqrt, _cumulative_product(alphas)))
    first, last = roots[0], roots[-1]
    shifted = array("f", (root - last for root in roots))
    factor = array("f", [first / array("f", [first - last])[0]])[0]
    rescaled = array("f", (root * factor for root in shifted))
    squares = array("f", (root * root for root in rescaled))
    ratios = array("f", (b / a for a, b in pairwise(squares)))
    # Through betas and back, as the schedulers do: two more roundings.
    betas = array("f", (1 - a for a in (squares[0], *ratios)))
    return _cumulative_product(array("f", (1 - beta for beta in betas)))


def _cumulative_product(factors: Sequence[float]) -> array:
    return array("f", accumulate(factors, operator.mul))


def _betas(config: ScheduleConfig) -> Sequence[float]:
    count, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        return array("f", config.trained_betas)
    if config.beta_schedule == "linear":
        return _linspace(start, end, count)
    if config.beta_schedule == "scaled_linear":  # Rombach et al. 2022
        return array("f", (root * root for root in _linspace(math.sqrt(start), math.sqrt(end), count)))
    # squaredcos_cap_v2: Nichol & Dhariwal 2021, eq. 17, with beta capped at 0.999.
    curve = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return array("f", (min(1 - curve[i + 1] / curve[i], 0.999) for i in range(count)))


def _linspace(start: float, end: float, count: int) -> array:
    """Return ``count`` even float32 numbers, from both ends to the middle as the training code's linspace rounds."""
    if count == 1:
        return array("f", [start])
    first, last = array("f", [start, end])
    step = array("f", [(last - first) / (count - 1)])[0]
    return array("f", (first + step * i if i < count // 2 else last - step * (count - 1 - i) for i in range(count)))
