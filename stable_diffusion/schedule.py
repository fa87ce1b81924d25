"""The noise schedule: betas -> sigma table, the timesteps of a run, and sigma <-> t. Python floats, no arrays.

Everything here lives in one space. A noisy latent is ``x = x0 + sigma * noise`` (Karras et al. 2022), so a model
trained on ``sqrt(a) * x0 + sqrt(1 - a) * noise`` (Ho et al. 2020) knows the level ``sigma = sqrt((1 - a) / a)``, with
``a`` the cumulative product of ``1 - beta``.
"""

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .config import ScheduleConfig

# With zero terminal SNR (Lin et al. 2024) the last sigma is infinite. In float32, 2^32 already is: x0 drowns in
# rounding, and every formula below stays finite. Samplers other than DDIM cap it where diffusers does.
_INFINITE = 2.0**32
_CAPPED = math.sqrt((1 - 2.0**-24) / 2.0**-24)


@dataclass(frozen=True)
class Steps:
    """One run: the UNet is told ``timesteps[i]`` at ``sigmas[i]``; the last of the n + 1 sigmas is where it ends."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timesteps)

    def last(self, count: int) -> "Steps":
        """The run's last ``count`` steps: image to image starts in the middle."""
        start = len(self) - count
        return Steps(self.timesteps[start:], self.sigmas[start:])


class Schedule:
    """The noise levels a model was trained on.

    The table is rounded to float32 where the training code rounds it; only so do its small sigmas come out equal to
    1e-6. All that is derived from it is float64.
    """

    def __init__(self, config: ScheduleConfig):
        self.config = config
        alphas_cumprod = _alphas_cumprod(config)
        self.alphas_cumprod: tuple[float, ...] = tuple(alphas_cumprod)
        self.sigmas: tuple[float, ...] = tuple(math.sqrt((1 - a) / a) if a > 0 else _INFINITE for a in alphas_cumprod)

    def sigma(self, t: float) -> float:
        """Noise level at ``t``, linear in sigma between two training timesteps."""
        low = min(max(math.floor(t), 0), len(self.sigmas) - 1)
        high = min(low + 1, len(self.sigmas) - 1)
        return self.sigmas[low] + (t - low) * (self.sigmas[high] - self.sigmas[low])

    def timestep(self, sigma: float) -> float:
        """Timestep of a noise level, linear in log sigma between two training timesteps and clamped to their range."""
        high = bisect_left(self.sigmas, sigma)
        if high == 0:
            return 0.0
        if high == len(self.sigmas):
            return float(high - 1)
        low = high - 1
        below, above = math.log(self.sigmas[low]), math.log(self.sigmas[high])
        return low + (math.log(sigma) - below) / (above - below)

    def steps(self, count: int, grid: str = "euler", spacing: str | None = None) -> Steps:
        """The run of ``count`` steps, from the noisiest down.

        Args:
            count: number of steps, 1 ... num_train_timesteps.
            grid: how the sampler's family spaces its steps, a key of ``GRIDS``.
            spacing: "leading", "trailing" or "linspace" (Lin et al. 2024, table 2); None takes the checkpoint's own,
                or where that is silent, the family's.
        """
        total = self.config.num_train_timesteps
        if not 1 <= count <= total:
            raise ValueError(f"{count} steps: the model was trained on {total} timesteps; choose 1 to {total}")
        family = GRIDS[grid]
        spacing = spacing or self.config.timestep_spacing or family.spacing
        if spacing not in ("leading", "trailing", "linspace"):
            raise ValueError(f"timestep spacing {spacing!r} is unknown; choose leading, trailing or linspace")
        timesteps = _timesteps(count, total, family, spacing, self.config.steps_offset)
        sigmas = [self.sigma(t) for t in timesteps]
        if not family.infinite:
            sigmas = [min(s, _CAPPED) for s in sigmas]
        final = self.sigmas[0] if family.ends_at_first and not self.config.set_alpha_to_one else 0.0
        return Steps(tuple(timesteps), (*sigmas, final))

    def initial_scale(self, steps: Steps, grid: str = "euler", spacing: str | None = None) -> float:
        """Standard deviation of the latent that a run starts from.

        A pure-noise latent of the training process has variance ``sigma^2 + 1`` here; Euler's family drops the 1 where
        its first step is the last training timestep.
        """
        spacing = spacing or self.config.timestep_spacing or GRIDS[grid].spacing
        sigma = steps.sigmas[0]
        return sigma if grid == "euler" and spacing != "leading" else math.sqrt(sigma**2 + 1)


@dataclass(frozen=True)
class Grid:
    """How a family of samplers places its timesteps, beyond what the spacing says.

    ``whole``: linspace timesteps are rounded. ``extra``: the grid has one point more, which is not visited.
    ``infinite``: an infinite sigma is taken as such. ``ends_at_first``: a run ends at the first training sigma instead
    of 0 if the checkpoint says ``set_alpha_to_one: false``.
    """

    spacing: str
    whole: bool = True
    extra: int = 0
    infinite: bool = False
    ends_at_first: bool = False


GRIDS = {
    "euler": Grid(spacing="linspace", whole=False),
    "ddim": Grid(spacing="leading", infinite=True, ends_at_first=True),
    "multistep": Grid(spacing="linspace", extra=1),
}


def _timesteps(count: int, total: int, family: Grid, spacing: str, offset: int) -> list[float]:
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
