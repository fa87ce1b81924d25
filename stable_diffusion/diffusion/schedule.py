"""The noise schedule: betas -> sigma table, the steps of a run, and sigma <-> t. Runs are Python floats, no arrays.

A noisy latent is ``x = x0 + sigma * noise`` (Karras et al. 2022). A model trained on ``sqrt(a) * x0 + sqrt(1 - a) *
noise`` (Ho et al. 2020) knows this level as ``sigma = sqrt((1 - a) / a)``, with ``a`` the cumulative product of
``1 - beta``. A model of EDM (Karras et al. 2022) knows sigma itself. Its table here is even in log sigma.
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

# With zero terminal SNR (Lin et al. 2024) the last sigma is infinite. In float32, 2^32 already is: x0 drowns in
# rounding, and every formula below stays finite. Samplers other than DDIM cap it where diffusers does.
_INFINITE = 2.0**32
_CAPPED = math.sqrt((1 - 2.0**-24) / 2.0**-24)


@dataclass(frozen=True)
class SpacingRule:
    """Describe how a family of samplers places its steps, beyond spacing and schedule."""

    spacing: str  # the default, one of SPACINGS
    integer_linspace: bool = True  # round the timesteps of "linspace"
    unvisited_points: int = 0  # points that are spaced too and then left out, at the end of the run
    keeps_infinite_sigma: bool = False  # and does not cap it
    starts_at_sigma: bool = False  # times noise, unless the spacing is "leading", see Schedule.initial_scale
    reads_curve: bool = True  # of the checkpoint, as its class in diffusers does
    curves_span_training: bool = False  # lay curves over all training sigmas, not from the first to the last of the run
    reads_interpolation: bool = False  # of the checkpoint: "log_linear" is even in log sigma, whatever the timesteps
    rounding: Mapping[str, Callable[[float], int]] = field(default_factory=dict)  # of timesteps, by the curve's name
    final_sigma: str = "zero"  # or "first" (training sigma), or the key of the config that chooses between them
    set_alpha_to_one: bool = True  # the default of this key
    fixed_stride: bool = False  # go down num_train_timesteps // count timesteps, wherever the next step starts
    distilled: bool = False  # take timesteps of those that the model was distilled for, unless a spacing is chosen


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
    """Hold a noise level of a run with the ``step`` that starts there and the ``timestep`` that the network gets.

    Arithmetic gives plain floats. So a level that a sampler computes knows neither.
    """

    step: int
    timestep: float

    def __new__(cls, sigma: float, step: int = 0, timestep: float = 0.0) -> "Sigma":
        self = super().__new__(cls, sigma)
        self.step, self.timestep = step, timestep
        return self


@dataclass(frozen=True)
class Steps:
    """Hold the noise levels of one run: a :class:`Sigma` for each step, and last the plain float where the run ends.

    ``total`` is the number of steps before :meth:`last` cut some off, and ``highest`` their first level, None where
    none are. ``stride`` is the number of timesteps that each step goes down, or 0 where a step leads to the start of
    the next (see :meth:`Schedule.target_sigmas`).
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
        """Return the lowest level above 0 and the highest one, of the whole run."""
        highest = self.sigmas[0] if self.highest is None else self.highest
        return min(sigma for sigma in (*self.sigmas, highest) if sigma > 0), highest

    def last(self, count: int) -> "Steps":
        """Return the run of the last ``count`` steps: image to image starts in the middle."""
        first = len(self) - count
        levels = [Sigma(sigma, sigma.step - first, sigma.timestep) for sigma in self.sigmas[first:-1]]
        return replace(self, sigmas=(*levels, self.sigmas[-1]), highest=self.span[1])


class Schedule:
    """Hold the noise levels that a model was trained on, and lay runs through them.

    The tables are rounded to float32 where the training code and diffusers round them. Only so do the small sigmas
    equal theirs to 1e-6, and timesteps on the edge of a whole number fall to the same side. What is derived from the
    tables is float64.
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
        self._last = config.num_train_timesteps - sum(-log < clipped for log in self._logs)  # that runs may start at

    def sigma(self, t: float, capped: bool = False) -> float:
        """Return the noise level at ``t``, linear in sigma between two timesteps; an infinite one may be ``capped``."""
        low = min(max(math.floor(t), 0), len(self.sigmas) - 1)
        if low == t:
            return self._finite[low] if capped else self.sigmas[low]
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

    def c_noise(self, sigma: float) -> float:
        """Return what the network gets for a noise level: its timestep or, if that is continuous, log(sigma) / 4."""
        return 0.25 * math.log(sigma) if self.config.timestep_type == "continuous" else self.timestep(sigma)

    def steps(self, count: int, rule: str = "euler", spacing: str | None = None, schedule: str | None = None) -> Steps:
        """Lay a run of ``count`` steps, from the noisiest down.

        Args:
            count: number of steps, 1 ... num_train_timesteps.
            rule: how the sampler's family places its steps, a key of ``SPACING_RULES``.
            spacing: one of ``SPACINGS``, how the timesteps are spread. None takes the checkpoint's spacing, or the
                rule's default where the checkpoint names none.
            schedule: one of ``SCHEDULES``. "default" follows the timesteps, "simple" and "ddim_uniform" those of
                ComfyUI: even from the last one down, or from 1 up. "sgm_uniform" is even in timesteps and stops one
                short of the last, the others lay the sigmas along a curve (see ``curves``). None is the checkpoint's.

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
        """Lay a run through descending ``timesteps``; it ends where the ``rule`` says."""
        total = self.config.num_train_timesteps
        if not timesteps or any(a <= b for a, b in pairwise((total, *timesteps, -1))):
            raise ValueError(f"timesteps {list(timesteps)} must descend and lie in 0 ... {total - 1}")
        return self._run([float(t) for t in timesteps], SPACING_RULES[rule])

    def at_sigmas(self, sigmas: Sequence[float]) -> Steps:
        """Lay a run through descending noise levels, of which the last, usually 0, is where it ends."""
        if len(sigmas) < 2 or sigmas[-1] < 0 or any(a <= b for a, b in pairwise(sigmas)):
            raise ValueError(f"sigmas {list(sigmas)} must descend and have at least two values, with the end last")
        *levels, end = sigmas
        return Steps((*map(Sigma, levels, range(len(levels)), map(self.timestep, levels)), float(end)), len(levels))

    def remaining(self, steps: Steps, share: float) -> int:
        """Count the steps that are left when ``share`` of the training noise is gone, which is above 0."""
        total = self.config.num_train_timesteps
        return sum(t < round(total - share * total) for t in steps.timesteps)

    def initial_scale(self, steps: Steps, rule: str = "euler", spacing: str | None = None) -> float:
        """Return the standard deviation of the latent that a run starts from.

        The noisiest latent of the training process has variance ``sigma^2 + 1`` here. Euler's family drops the 1 where
        its first step is the last training timestep, but not for a model of EDM.
        """
        sigma, rules = steps.sigmas[0], SPACING_RULES[rule]
        at_sigma = rules.starts_at_sigma and (spacing or self.config.timestep_spacing) != "leading"
        return float(sigma) if at_sigma and not self.is_edm else math.sqrt(sigma**2 + 1)

    def target_sigmas(self, steps: Steps) -> list[float]:
        """Return the level that each step leads to: ``stride`` timesteps down.

        In diffusers, DDIM and PNDM leave a timestep t for t - total // count. Then they take the latent, in variance
        preserving scale, for one at the next timestep. With "leading" spacing the two are the same. With the others
        they differ where the number of steps does not divide the number of timesteps.
        """
        if not steps.stride:
            return list(steps.sigmas[1:])
        below = [sigma.timestep - steps.stride for sigma in steps.sigmas[:-1]]
        return [self.sigma(t) if t >= 0 else steps.sigmas[-1] for t in below]

    def repeat_sigma(self, steps: Steps) -> float:
        """Return the level that PNDM repeats its first step from: ``stride`` timesteps above the second step."""
        if not steps.stride or len(steps) < 2:
            return steps.sigmas[0]
        return self.sigma(steps.timesteps[1] + steps.stride)

    def half_sigmas(self, steps: Steps) -> list[tuple[float, float]]:
        """Return, for each of PNDM's three first steps, the levels that its first half leads to and that follows.

        In diffusers the half is half a ``stride`` down, and what follows is half a stride above the end of the step. A
        run of less than four steps has none.
        """
        if len(steps) < 4:
            return []
        if not steps.stride:
            return [(math.sqrt(a * b),) * 2 for a, b in pairwise(steps.sigmas[:4])]
        half = steps.stride // 2
        return [(self.sigma(t - half), self.sigma(below + half)) for t, below in pairwise(steps.timesteps[:4])]

    def beta_sigmas(self, steps: Steps) -> list[float]:
        """Return the noise of DDPM's steps with the variance beta (Ho et al. 2020, 3.2); the step from 0 has none."""
        shares = [(a**2 - b**2) / (1 + a**2) for a, b in pairwise(steps.sigmas)]  # the betas
        targets = zip(shares, steps.sigmas[1:], steps.timesteps, strict=True)
        return [math.sqrt(beta * (1 + target**2)) if t > 0 else 0.0 for beta, target, t in targets]

    def tcd_sigmas(self, steps: Steps, gamma: float) -> list[float]:
        """Return the levels that TCD leaps to: (1 - gamma) of the timestep of each target, rounded down."""
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
            # Counted down from the end; one less, since training counts from 0. The ratio is rounded as NumPy's arange
            # rounds it, which settles where a half goes. What ``lambda_min_clipped`` leaves no room for is not made.
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
        """Lay a run along a curve between the timesteps ``ends``, or the config's levels, or along a table."""
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
