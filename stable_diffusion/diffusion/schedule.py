"""The noise schedule: betas -> sigma table, the timesteps of a run, and sigma <-> t. Python floats, no arrays.

Everything here lives in one space. A noisy latent is ``x = x0 + sigma * noise`` (Karras et al. 2022), so a model
trained on ``sqrt(a) * x0 + sqrt(1 - a) * noise`` (Ho et al. 2020) knows the level ``sigma = sqrt((1 - a) / a)``, with
``a`` the cumulative product of ``1 - beta``.
"""

import math
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ..models.config import ScheduleConfig
from .curves import CURVES, TABLES, log_linear

# With zero terminal SNR (Lin et al. 2024) the last sigma is infinite. In float32, 2^32 already is: x0 drowns in
# rounding, and every formula below stays finite. Samplers other than DDIM cap it where diffusers does.
_INFINITE = 2.0**32
_CAPPED = math.sqrt((1 - 2.0**-24) / 2.0**-24)


@dataclass(frozen=True)
class Steps:
    """One run: the UNet is told ``timesteps[i]`` at ``sigmas[i]``; the last of the n + 1 sigmas is where it ends.

    ``total`` is the number of steps of the whole run that these are the last ones of. ``stride`` is 0, or how many
    timesteps each step goes down, which can differ from where the next one starts (see :meth:`Schedule.targets`).
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    total: int
    stride: int = 0

    def __len__(self) -> int:
        return len(self.timesteps)

    def last(self, count: int) -> "Steps":
        """The run's last ``count`` steps: image to image starts in the middle."""
        start = len(self) - count
        return replace(self, timesteps=self.timesteps[start:], sigmas=self.sigmas[start:])


@dataclass(frozen=True)
class Grid:
    """How a family of samplers places its steps, beyond what spacing and schedule say.

    Attributes:
        spacing: the family's default.
        whole: linspace timesteps are rounded.
        extra: the grid has so many points more, which are not visited.
        infinite: an infinite sigma is taken as such.
        pure: a run starts from sigma times noise, without the 1 in the variance of the training process, unless the
            spacing is "leading".
        full_range: the curves run over all training sigmas and not from the grid's first to its last.
        rounding: how the timesteps of a curve become whole numbers, where they do.
        end: a run ends at "zero"; at the "first" training sigma; or there if the checkpoint says so with
            "final_sigmas_type" or "set_alpha_to_one".
        strided: a step goes down by total // count timesteps, wherever the next one starts.
        distilled: timesteps are among those of the ``original_inference_steps`` that the model was distilled for.
    """

    spacing: str
    whole: bool = True
    extra: int = 0
    infinite: bool = False
    pure: bool = False
    full_range: bool = False
    rounding: Mapping[str, Callable[[float], int]] = field(default_factory=dict)
    end: str = "zero"
    strided: bool = False
    distilled: bool = False


_MULTISTEP = Grid(
    spacing="linspace",
    extra=1,
    full_range=True,
    rounding={"karras": round, "exponential": math.floor, "beta": math.floor},
    end="final_sigmas_type",
)
_DISTILLED = Grid(spacing="leading", infinite=True, distilled=True)

GRIDS = {
    "euler": Grid(spacing="linspace", whole=False, pure=True, end="final_sigmas_type"),
    "dpm2": Grid(spacing="linspace", whole=False, pure=True, rounding={"karras": round}),
    "ddim": Grid(spacing="leading", infinite=True, end="set_alpha_to_one", strided=True),
    "ddpm": Grid(spacing="leading", infinite=True),
    "pndm": Grid(spacing="leading", end="set_alpha_to_one", strided=True),
    "multistep": _MULTISTEP,
    "deis": replace(_MULTISTEP, end="first"),
    "lcm": _DISTILLED,
    "tcd": replace(_DISTILLED, end="first"),
}

SPACINGS = ("leading", "trailing", "linspace")  # Lin et al. 2024, table 2
SCHEDULES = ("default", *CURVES, "sgm_uniform", *TABLES)


class Schedule:
    """The noise levels a model was trained on, and the runs through them.

    The tables are rounded to float32 where the training code and diffusers round them; only so do the small sigmas
    come out equal to 1e-6, and timesteps on the edge of a whole number fall to the same side. All that is derived from
    them is float64.
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
        """Noise level at ``t``, linear in sigma between two training timesteps."""
        low = min(max(math.floor(t), 0), len(self.sigmas) - 1)
        if low == t:
            return self.sigmas[low]
        high = min(low + 1, len(self.sigmas) - 1)
        return self._finite[low] + (t - low) * (self._finite[high] - self._finite[low])

    def timestep(self, sigma: float) -> float:
        """Timestep of a noise level, linear in log sigma between two training timesteps and clamped to their range."""
        log = math.log(max(sigma, 1e-10))
        high = bisect_right(self._logs, log)
        if high in (0, len(self._logs)):
            return float(min(high, len(self._logs) - 1))
        below, above = self._logs[high - 1 : high + 1]
        return high - 1 + (log - below) / (above - below)

    def steps(
        self, count: int, grid: str = "euler", spacing: str | None = None, schedule: str | None = None, **shape: float
    ) -> Steps:
        """The run of ``count`` steps, from the noisiest down.

        Args:
            count: number of steps, 1 ... num_train_timesteps.
            grid: how the sampler's family places its steps, a key of ``GRIDS``.
            spacing: one of ``SPACINGS``, how the timesteps are spread; None takes the checkpoint's own, or where that
                is silent, the family's.
            schedule: one of ``SCHEDULES``: "default" follows the timesteps, the others lay the sigmas along a curve
                (see ``curves``), "sgm_uniform" is even in timesteps and stops one short of the last. None is the
                checkpoint's own.
            shape: what a curve can be told beside its ends, such as ``rho`` of "karras".

        Raises:
            ValueError: a number or name out of range.
        """
        total, family = self.config.num_train_timesteps, GRIDS[grid]
        if not 1 <= count <= total:
            raise ValueError(f"{count} steps: the model was trained on {total} timesteps; choose 1 to {total}")
        if schedule is None:
            schedule = self.config.sigma_schedule
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        timesteps = self._timesteps(count, family, spacing)
        if schedule == "default":
            return self._run(timesteps, self._levels(timesteps, family), family, stride=total // count)
        if schedule in CURVES:
            sigmas = self._finite if family.full_range else self._levels(timesteps, family)[::-1]
            high = self._finite[-1] if sigmas[-1] == _INFINITE else sigmas[-1]
            sigmas = CURVES[schedule](count, high, sigmas[0], **shape)
        elif schedule in TABLES:
            sigmas = log_linear(TABLES[schedule], count + 1)[:-1]
        else:
            sigmas = [self._log_sigma((total - 1) * (1 - i / count)) for i in range(count)]
        timesteps = [self.timestep(sigma) for sigma in sigmas]
        if schedule in family.rounding:
            timesteps = [float(family.rounding[schedule](t)) for t in timesteps]
        return self._run(timesteps, sigmas, family)

    def at_timesteps(self, timesteps: Sequence[float], grid: str = "euler") -> Steps:
        """The run through the given timesteps, descending, to the end that the family has."""
        total = self.config.num_train_timesteps
        if not timesteps or any(a <= b for a, b in pairwise((total, *timesteps, -1))):
            raise ValueError(f"timesteps {list(timesteps)} must descend and lie in 0 ... {total - 1}")
        return self._run([float(t) for t in timesteps], self._levels(timesteps, GRIDS[grid]), GRIDS[grid])

    def at_sigmas(self, sigmas: Sequence[float]) -> Steps:
        """The run through the given noise levels, descending; the last, usually 0, is where it ends."""
        if len(sigmas) < 2 or sigmas[-1] < 0 or any(a <= b for a, b in pairwise(sigmas)):
            raise ValueError(f"sigmas {list(sigmas)} must descend and be at least two, of which the last is the end")
        timesteps = tuple(self.timestep(sigma) for sigma in sigmas[:-1])
        return Steps(timesteps, tuple(map(float, sigmas)), len(timesteps))

    def remaining(self, steps: Steps, share: float) -> int:
        """How many of a run's steps are left when ``share`` of the training noise is gone: all at 0, none at 1."""
        total = self.config.num_train_timesteps
        return len(steps) if share == 0 else sum(t < round(total - share * total) for t in steps.timesteps)

    def initial_scale(self, steps: Steps, grid: str = "euler", spacing: str | None = None) -> float:
        """Standard deviation of the latent that a run starts from.

        A pure-noise latent of the training process has variance ``sigma^2 + 1`` here; Euler's family drops the 1 where
        its first step is the last training timestep.
        """
        sigma, pure = steps.sigmas[0], GRIDS[grid].pure and self._spacing(GRIDS[grid], spacing) != "leading"
        return sigma if pure else math.sqrt(sigma**2 + 1)

    def targets(self, steps: Steps) -> list[float]:
        """Where each step leads to: the level ``stride`` timesteps down.

        In diffusers, DDIM and PNDM leave a timestep t for t - total // count, and then take the latent, in variance
        preserving scale, for one of the next timestep. With "leading" spacing the two are the same; with the others
        they differ where the number of steps does not divide that of the timesteps.
        """
        if not steps.stride:
            return list(steps.sigmas[1:])
        below = [t - steps.stride for t in steps.timesteps]
        return [self.sigma(t) if t >= 0 else steps.sigmas[-1] for t in below]

    def start_of_repeat(self, steps: Steps) -> float:
        """The level that PNDM's repeated first step starts from: ``stride`` timesteps above the second step."""
        if not steps.stride or len(steps) < 2:
            return steps.sigmas[0]
        return self.sigma(steps.timesteps[1] + steps.stride)

    def stops(self, steps: Steps, gamma: float) -> list[float]:
        """The levels that TCD leaps to: (1 - gamma) of the timestep of each target, rounded down."""
        timesteps = (*steps.timesteps[1:], 0.0)
        stops = [self.sigma(math.floor(round((1 - gamma) * t, 4))) for t in timesteps]
        return [min(stop, target) for stop, target in zip(stops, steps.sigmas[1:], strict=True)]

    def _spacing(self, family: Grid, spacing: str | None) -> str:
        spacing = spacing or self.config.timestep_spacing or family.spacing
        if spacing not in SPACINGS:
            raise ValueError(f"timestep spacing {spacing!r} is unknown; choose leading, trailing or linspace")
        return spacing

    def _timesteps(self, count: int, family: Grid, spacing: str | None) -> list[float]:
        total = self.config.num_train_timesteps
        if not family.distilled or spacing is not None:
            return _spaced(count, total, family, self._spacing(family, spacing), self.config.steps_offset)
        # Luo et al. 2023: of the steps that the model was distilled for, as many as are wanted, evenly.
        original = self.config.original_inference_steps
        if count > original:
            raise ValueError(f"{count} steps: the model was distilled for {original}; choose 1 to {original}")
        return [float((original - int(i * (original / count))) * (total // original) - 1) for i in range(count)]

    def _levels(self, timesteps: Sequence[float], family: Grid) -> list[float]:
        sigmas = [self.sigma(t) for t in timesteps]
        return sigmas if family.infinite else [_CAPPED if sigma == _INFINITE else sigma for sigma in sigmas]

    def _log_sigma(self, t: float) -> float:
        """Noise level at ``t``, linear in log sigma: the inverse of :meth:`timestep`."""
        low = min(int(t), len(self._logs) - 2)
        below, above = self._logs[low : low + 2]
        return math.exp(below + (t - low) * (above - below))

    def _run(self, timesteps: Sequence[float], sigmas: Sequence[float], family: Grid, stride: int = 0) -> Steps:
        above_zero = {
            "zero": False,
            "first": True,
            "final_sigmas_type": self.config.final_sigmas_type == "sigma_min",
            "set_alpha_to_one": not self.config.set_alpha_to_one,
        }
        final = self.sigmas[0] if above_zero[family.end] else 0.0
        return Steps(tuple(timesteps), (*sigmas, final), len(timesteps), stride if family.strided else 0)


def _spaced(count: int, total: int, family: Grid, spacing: str, offset: int) -> list[float]:
    """Descending timesteps. The arithmetic is float64 and rounds half to even, as NumPy does."""
    if spacing == "trailing":
        # Counted down from the end; one less, since training counts from 0. The ratio is rounded as arange rounds it,
        # which settles where a half goes.
        ratio = total - (total - total / count)
        return [float(round(total - i * ratio) - 1) for i in range(count)]
    points = min(count + family.extra, total)  # with as many steps as there are timesteps, there is none to leave out
    if spacing == "leading":
        ascending = [float(i * (total // points) + offset) for i in range(points)]
    else:
        ratio = (total - 1) / (points - 1) if points > 1 else 0.0
        ascending = [i * ratio for i in range(points - 1)] + [float(total - 1)] * (points > 1) or [0.0]
        ascending = [float(round(t)) for t in ascending] if family.whole else list(array("f", ascending))
    return ascending[points - count :][::-1]


def _alphas_cumprod(config: ScheduleConfig) -> Sequence[float]:
    """Cumulative product of 1 - beta, in float32 with a float64 accumulator as in training."""
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


def _cumulative_product(values: Sequence[float]) -> array:
    product, products = 1.0, array("f")
    for value in values:
        product *= value
        products.append(product)
    return products


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
    """float32 values from both ends towards the middle, which is how the training code's linspace rounds."""
    if count == 1:
        return array("f", [start])
    first, last = array("f", [start, end])
    step = array("f", [(last - first) / (count - 1)])[0]
    return array("f", (first + step * i if i < count // 2 else last - step * (count - 1 - i) for i in range(count)))
