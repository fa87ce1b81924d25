"""The noise schedule: betas -> sigma table, the steps of a run, and sigma <-> t. Runs are Python floats, not arrays.

A noisy latent is ``x = x0 + sigma * noise`` (Karras et al. 2022). A model trained on ``sqrt(a) * x0 + sqrt(1 - a) *
noise`` (Ho et al. 2020) has ``sigma = sqrt((1 - a) / a)``, with ``a`` the cumulative product of ``1 - beta``. An EDM
model (Karras et al. 2022) uses sigma directly. Its table here is even in log sigma.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from .curves import CURVES, TABLES, log_linear
from .schedule_config import SPACINGS, ScheduleConfig

SCHEDULES = ("default", *CURVES, "simple", "ddim_uniform", "sgm_uniform", *TABLES)

# With zero terminal SNR (Lin et al. 2024) the last sigma is infinite. In float32, 2^32 has the same
# effect: x0 is lost in rounding, and every formula below stays finite. Samplers other than DDIM cap it as in diffusers.
_INFINITE = 2.0**32
_CAPPED = math.sqrt((1 - 2.0**-24) / 2.0**-24)


@dataclass(frozen=True)
class SpacingRule:
    """Describe how a family of samplers spaces its steps, beyond spacing and schedule."""

    spacing: str  # the default, one of SPACINGS
    integer_linspace: bool = True  # round the timesteps of "linspace"
    unvisited_points: int = 0  # extra points at the end of the run, which are spaced and then dropped
    keeps_infinite_sigma: bool = False  # instead of capping it
    starts_at_sigma: bool = False  # unless the spacing is "leading", see Schedule.initial_scale
    reads_curve: bool = True  # the checkpoint's, as its class in diffusers does
    curves_span_training: bool = False  # curves cover all training sigmas, not only those of the run
    reads_interpolation: bool = False  # the checkpoint's: "log_linear" is even in log sigma
    rounding: Mapping[str, Callable[[float], int]] = field(default_factory=dict)  # of timesteps, by curve
    final_sigma: str = "zero"  # or "first" (training sigma), or the config key that selects one
    set_alpha_to_one: bool = True  # default of this config key
    fixed_stride: bool = False  # every step descends num_train_timesteps // count timesteps
    distilled: bool = False  # use the timesteps of the distillation unless a spacing is chosen


_EULER_RULE = SpacingRule(
    "linspace",
    integer_linspace=False,
    starts_at_sigma=True,
    reads_interpolation=True,
    final_sigma="final_sigmas_type",
)
_MULTISTEP_RULE = SpacingRule(
    "linspace",
    unvisited_points=1,
    curves_span_training=True,
    rounding={"karras": round, "lu": round, "exponential": math.floor, "beta": math.floor},
    final_sigma="final_sigmas_type",
)
_LEADING_RULE = SpacingRule("leading", reads_curve=False)
_DISTILLED_RULE = replace(_LEADING_RULE, keeps_infinite_sigma=True, distilled=True)

SPACING_RULES = {
    "euler": _EULER_RULE,
    "euler_a": replace(_EULER_RULE, reads_curve=False, reads_interpolation=False, final_sigma="zero"),
    "dpm2": replace(_EULER_RULE, reads_interpolation=False, rounding={"karras": round}, final_sigma="zero"),
    "ddim": replace(_LEADING_RULE, keeps_infinite_sigma=True, final_sigma="set_alpha_to_one", fixed_stride=True),
    "ddpm": replace(_LEADING_RULE, keeps_infinite_sigma=True),
    "pndm": replace(_LEADING_RULE, final_sigma="set_alpha_to_one", set_alpha_to_one=False, fixed_stride=True),
    "multistep": _MULTISTEP_RULE,
    "deis": replace(_MULTISTEP_RULE, final_sigma="first"),
    "lcm": _DISTILLED_RULE,
    "tcd": replace(_DISTILLED_RULE, final_sigma="first"),
}


class Sigma(float):
    """Hold a noise level of a run, with the ``step`` that starts there and its ``timestep`` for the network.

    Arithmetic gives plain floats, so a level that a sampler computes has neither.
    """

    step: int
    timestep: float

    def __new__(cls, sigma: float, step: int = 0, timestep: float = 0.0) -> "Sigma":
        self = super().__new__(cls, sigma)
        self.step, self.timestep = step, timestep
        return self


@dataclass(frozen=True)
class Steps:
    """Hold the noise levels of one run: a :class:`Sigma` for each step, then a plain float, the end of the run.

    ``total`` is the number of steps before :meth:`last` removed some, and ``highest`` their first level, or None.
    ``stride`` is the number of timesteps that each step descends, or 0 if each step ends where the next one starts (see
    :meth:`Schedule.target_sigmas`).
    """

    sigmas: tuple[float, ...]
    total: int
    stride: int = 0
    highest: float | None = None

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Return the timestep of each step, descending."""
        return tuple(sigma.timestep for sigma in self.sigmas[:-1])

    @property
    def span(self) -> tuple[float, float]:
        """Return the lowest level above 0 and the highest level of the whole run."""
        highest = self.sigmas[0] if self.highest is None else self.highest
        return min(sigma for sigma in (*self.sigmas, highest) if sigma > 0), highest

    def last(self, count: int) -> "Steps":
        """Return only the last ``count`` steps, as image to image needs."""
        first = len(self) - count
        levels = [Sigma(sigma, sigma.step - first, sigma.timestep) for sigma in self.sigmas[first:-1]]
        return replace(self, sigmas=(*levels, self.sigmas[-1]), highest=self.span[1])


class Schedule:
    """Hold the noise levels that a model was trained on, and space the steps of runs.

    The tables are rounded to float32 as in the training code and diffusers. Otherwise small sigmas would differ by more
    than 1e-6, and timesteps near a half would round differently. Values derived from the tables are float64.
    """

    def __init__(self, config: ScheduleConfig):
        self.config = config
        self.is_edm = config.sigma_data is not None
        if self.is_edm:
            self.sigmas = tuple(log_linear((config.sigma_min, config.sigma_max), config.num_train_timesteps))
        else:
            products = _alphas_cumprod(config)
            odds = np.full_like(products, _INFINITE**2)
            with np.errstate(over="ignore"):
                np.divide(1 - products, products, out=odds, where=products > 0)
            self.alphas_cumprod, self.sigmas = tuple(products.tolist()), tuple(np.sqrt(odds).tolist())
        self._finite = tuple(_CAPPED if sigma == _INFINITE else sigma for sigma in self.sigmas)
        self._logs = _rounded(map(math.log, self._finite))
        clipped = -math.inf if config.lambda_min_clipped is None else config.lambda_min_clipped
        self._last = config.num_train_timesteps - sum(-log < clipped for log in self._logs)  # last allowed start

    def sigma(self, t: float, capped: bool = False) -> float:
        """Return the noise level at ``t``, linear in sigma between two timesteps; ``capped`` limits an infinite one."""
        low = min(max(math.floor(t), 0), len(self.sigmas) - 1)
        if low == t:
            return self._finite[low] if capped else self.sigmas[low]
        high = min(low + 1, len(self.sigmas) - 1)
        return self._finite[low] + (t - low) * (self._finite[high] - self._finite[low])

    def timestep(self, sigma: float) -> float:
        """Return the timestep of a noise level: stored in a Sigma, computed for a plain float.

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

    def c_noise(self, sigma: float) -> float:
        """Return the network's input for a noise level: its timestep or, if that is continuous, log(sigma) / 4."""
        return 0.25 * math.log(sigma) if self.config.timestep_type == "continuous" else self.timestep(sigma)

    def steps(self, count: int, rule: str = "euler", spacing: str | None = None, schedule: str | None = None) -> Steps:
        """Return the levels of ``count`` steps, from the noisiest down.

        Args:
            count: number of steps, 1 ... num_train_timesteps.
            rule: the spacing rule of the sampler's family, a key of ``SPACING_RULES``.
            spacing: timestep spacing, one of ``SPACINGS``. Default: the checkpoint's, or else the rule's.
            schedule: one of ``SCHEDULES``. "default" follows the timesteps. "simple" and "ddim_uniform" are ComfyUI's:
                even from the last timestep down, or from 1 up. "sgm_uniform" is even in timesteps and stops one
                short of the last. The others space the sigmas along a curve (see ``curves``). Default: the
                checkpoint's.

        Raises ValueError for a number or name out of range.
        """
        total, rules = self.config.num_train_timesteps, SPACING_RULES[rule]
        if not 1 <= count <= self._last:
            text = f"{count} steps: the model was trained on {total} timesteps"
            raise ValueError(f"{text}; choose 1 to {self._last}")
        if schedule is None:
            schedule = self.config.sigma_schedule if rules.reads_curve or self.is_edm else "default"
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        timesteps = self._timesteps(count, rules, spacing)
        is_log_linear = rules.reads_interpolation and self.config.interpolation_type == "log_linear"
        if schedule == "default" and is_log_linear:
            sigmas = log_linear((self._finite[-1], self._finite[0]), count + 1)[:-1]
            return self._run(timesteps, replace(rules, final_sigma="first"), sigmas)
        if schedule == "default":
            return self._run(timesteps, rules, stride=total // count if rules.fixed_stride else 0)
        if schedule == "simple":
            return self._run([float(total - 1 - int(i * (total / count))) for i in range(count)], rules)
        if schedule == "ddim_uniform":
            first = min(1, total - 1 - (count - 1) * (total // count))
            return self._run([float(first + i * (total // count)) for i in reversed(range(count))], rules)
        spans_training = rules.curves_span_training or is_log_linear
        ends = (total - 1, 0) if spans_training else (timesteps[0], timesteps[-1])
        return self._run_along(schedule, count, rules, ends)

    def at_timesteps(self, timesteps: Sequence[float], rule: str = "euler") -> Steps:
        """Return the levels of a run at descending ``timesteps``; the ``rule`` gives the end."""
        total = self.config.num_train_timesteps
        if not timesteps or any(a <= b for a, b in pairwise((total, *timesteps, -1))):
            raise ValueError(f"timesteps {list(timesteps)} must descend and lie in 0 ... {total - 1}")
        return self._run([float(t) for t in timesteps], SPACING_RULES[rule])

    def at_sigmas(self, sigmas: Sequence[float]) -> Steps:
        """Return a run at descending noise levels; it ends at the last one, usually 0."""
        if len(sigmas) < 2 or sigmas[-1] < 0 or any(a <= b for a, b in pairwise(sigmas)):
            raise ValueError(f"sigmas {list(sigmas)} must descend and have at least two values, with the end last")
        *levels, end = sigmas
        return Steps((*map(Sigma, levels, range(len(levels)), map(self.timestep, levels)), float(end)), len(levels))

    def remaining(self, steps: Steps, fraction: float) -> int:
        """Count the steps that remain after a ``fraction`` of the denoising, above 0."""
        total = self.config.num_train_timesteps
        return sum(t < round(total - fraction * total) for t in steps.timesteps)

    def initial_scale(self, steps: Steps, rule: str = "euler", spacing: str | None = None) -> float:
        """Return the standard deviation of the initial latents of a run.

        The noisiest latent of the training process has variance ``sigma^2 + 1`` here. Euler's family omits the 1 if its
        first step is the last training timestep, but not for EDM models.
        """
        sigma, rules = steps.sigmas[0], SPACING_RULES[rule]
        at_sigma = rules.starts_at_sigma and (spacing or self.config.timestep_spacing) != "leading"
        return float(sigma) if at_sigma and not self.is_edm else math.sqrt(sigma**2 + 1)

    def target_sigmas(self, steps: Steps) -> list[float]:
        """Return the level at the end of each step: ``stride`` timesteps down.

        In diffusers, DDIM and PNDM step from a timestep t to t - total // count. Then they treat the latent, in
        variance-preserving scale, as one at the next timestep. With "leading" spacing the two are the same. With other
        spacings they differ if the number of steps does not divide the number of timesteps.
        """
        if not steps.stride:
            return list(steps.sigmas[1:])
        below = [sigma.timestep - steps.stride for sigma in steps.sigmas[:-1]]
        return [self.sigma(t) if t >= 0 else steps.sigmas[-1] for t in below]

    def repeat_sigma(self, steps: Steps) -> float:
        """Return the level from which PNDM repeats its first step: ``stride`` timesteps above the second step."""
        if not steps.stride or len(steps) < 2:
            return steps.sigmas[0]
        return self.sigma(steps.timesteps[1] + steps.stride)

    def half_sigmas(self, steps: Steps) -> list[tuple[float, float]]:
        """Return, for each of PNDM's first three steps, the level after its first half and the level that follows.

        In diffusers the first half is half a ``stride`` down, and the level that follows is half a stride above the end
        of the step. A run of less than four steps has no such levels.
        """
        if len(steps) < 4:
            return []
        if not steps.stride:
            return [(math.sqrt(a * b),) * 2 for a, b in pairwise(steps.sigmas[:4])]
        half = steps.stride // 2
        return [(self.sigma(t - half), self.sigma(below + half)) for t, below in pairwise(steps.timesteps[:4])]

    def beta_sigmas(self, steps: Steps) -> list[float]:
        """Return the noise of DDPM's steps with the variance beta (Ho et al. 2020, 3.2); 0 for the step from 0."""
        betas = [(a**2 - b**2) / (1 + a**2) for a, b in pairwise(steps.sigmas)]
        targets = zip(betas, steps.sigmas[1:], steps.timesteps, strict=True)
        return [math.sqrt(beta * (1 + target**2)) if t > 0 else 0.0 for beta, target, t in targets]

    def tcd_sigmas(self, steps: Steps, gamma: float) -> list[float]:
        """Return the levels of TCD's jumps: (1 - gamma) of the timestep of each target, rounded down."""
        timesteps = (*steps.timesteps[1:], 0.0)
        leaps = [self.sigma(math.floor(round((1 - gamma) * t, 4))) for t in timesteps]
        return [min(leap, target) for leap, target in zip(leaps, steps.sigmas[1:], strict=True)]

    def _timesteps(self, count: int, rule: SpacingRule, spacing: str | None) -> list[float]:
        """Return ``count`` descending timesteps, equal to diffusers' integers: float64, half rounded to even."""
        total, original = self.config.num_train_timesteps, self.config.original_inference_steps
        last = self._last
        if rule.distilled and spacing is None:  # evenly spread over those of the distillation (Luo et al. 2023)
            if count > original:
                raise ValueError(f"{count} steps: the model was distilled for {original}; choose 1 to {original}")
            return [float((original - int(i * (original / count))) * (total // original) - 1) for i in range(count)]
        spacing = spacing or self.config.timestep_spacing or rule.spacing
        if spacing not in SPACINGS:
            raise ValueError(f"timestep spacing {spacing!r} is unknown; choose leading, trailing or linspace")
        if spacing == "trailing":
            # Counted down from the end; one less, since training counts from 0. The ratio is rounded as in NumPy's
            # arange, which decides the rounding of halves. Steps below ``lambda_min_clipped`` are dropped.
            ratio = last - (last - total / count)
            return [float(round(last - i * ratio) - 1) for i in range(count) if last - i * ratio > 1e-9]
        points = min(count + rule.unvisited_points, last)  # there are no more points than timesteps
        if spacing == "leading":
            stride = last // points
            offset = min(self.config.steps_offset, total - 1 - (points - 1) * stride)  # no timestep beyond the last
            ascending = [float(i * stride + offset) for i in range(points)]
        else:
            ratio = (last - 1) / (points - 1) if points > 1 else 0.0
            ascending = [i * ratio for i in range(points - 1)] + [float(last - 1) if points > 1 else 0.0]
            ascending = [float(round(t)) for t in ascending] if rule.integer_linspace else _rounded(ascending)
        return ascending[points - count :][::-1]

    def _run_along(self, schedule: str, count: int, rule: SpacingRule, ends: tuple[float, float]) -> Steps:
        """Space a run along a curve between the timesteps ``ends`` or the config's levels, or along a table."""
        lowest = None
        if schedule in CURVES:
            chosen = self.config.sigma_max, self.config.sigma_min
            ends = [self.sigma(t, capped=True) if c is None else c for t, c in zip(ends, chosen, strict=True)]
            shape = {"rho": self.config.rho} if schedule == "karras" else {}
            sigmas = CURVES[schedule](count, *ends, **shape)
            lowest = self.config.sigma_min if rule.curves_span_training else None
        else:
            sigmas = log_linear(TABLES.get(schedule, self._finite[::-1]), count + 1)[:-1]
        rounding = rule.rounding.get(schedule, float)
        return self._run([float(rounding(self.timestep(sigma))) for sigma in sigmas], rule, sigmas, lowest=lowest)

    def _run(
        self,
        timesteps: Sequence[float],
        rule: SpacingRule,
        sigmas: Sequence[float] | None = None,
        stride: int = 0,
        lowest: float | None = None,
    ) -> Steps:
        """Lay a run through ``timesteps``, whose levels are ``sigmas`` or those of the training.

        Where it does not end at 0, it does at ``lowest`` or the first training sigma.
        """
        if sigmas is None:
            sigmas = [self.sigma(t, capped=not rule.keeps_infinite_sigma) for t in timesteps]
        # The value of the config's key, or "zero" or "first" itself.
        final = getattr(self.config, rule.final_sigma, rule.final_sigma)
        final = rule.set_alpha_to_one if final is None else final
        lowest = self.sigmas[0] if lowest is None else lowest
        end = lowest if final in ("first", "sigma_min", False) else 0.0
        count = len(timesteps)
        return Steps((*map(Sigma, sigmas, range(count), timesteps), end), count, stride)


def _rounded(values: Iterable[float]) -> list[float]:
    return np.array(list(values), np.float32).tolist()


def _alphas_cumprod(config: ScheduleConfig) -> np.ndarray:
    """Return the cumulative products of 1 - beta, in float32 with a float64 accumulator as in training."""
    count, ends = config.num_train_timesteps, (config.beta_start, config.beta_end)
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas, np.float32)
    elif config.beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17, with beta capped at 0.999
        curve = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        betas = np.array([min(1 - b / a, 0.999) for a, b in pairwise(curve)], np.float32)
    else:
        scaled = config.beta_schedule == "scaled_linear"  # even roots of beta (Rombach et al. 2022)
        first, last = _rounded(map(math.sqrt, ends) if scaled else ends)
        # From both ends to the middle, as the training code's linspace rounds.
        (step,), i = _rounded([(last - first) / max(count - 1, 1)]), np.arange(count)
        even = np.where(i < max(count // 2, 1), first + step * i, last - step * (count - 1 - i)).astype(np.float32)
        betas = even**2 if scaled else even
    products = np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)
    return _zero_terminal_snr(products) if config.rescale_betas_zero_snr else products


def _zero_terminal_snr(products: np.ndarray) -> np.ndarray:
    """Rescale cumulative products: their roots start where they did and end in 0 (Lin et al. 2024, algorithm 1)."""
    roots = np.sqrt(products)
    shifted = roots - roots[-1]
    squares = (shifted * (float(roots[0]) / float(shifted[0]))) ** 2
    ratios = [b / a for a, b in pairwise(squares.tolist())]
    betas = 1 - np.array([squares[0], *ratios], np.float32)  # and back, as the schedulers do: two more roundings
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)
