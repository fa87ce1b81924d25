"""Rules by which each family of samplers places its steps among the training timesteps."""

import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

SPACINGS = ("leading", "trailing", "linspace")  # Lin et al. 2024, table 2


@dataclass(frozen=True)
class SpacingRule:
    """Describe how a family of samplers places its steps, beyond spacing and schedule.

    Attributes:
        spacing: default of the family, one of ``SPACINGS``.
        integer_linspace: round the timesteps of "linspace".
        unvisited_points: number of points that are spaced too and then left out, at the end of the run.
        keeps_infinite_sigma: leave an infinite first sigma as it is, and do not cap it.
        starts_at_sigma: start from sigma times noise, unless the spacing is "leading". Otherwise the start has the
            variance of the training process, ``sigma^2 + 1``.
        curves_span_training: lay curves over all training sigmas, and not between the first and last of the run.
        rounding: for each curve with integer timesteps, the function that rounds them.
        final_sigma: "zero", "first" (training sigma), or the key of the checkpoint's config that chooses between them.
        fixed_stride: go down ``num_train_timesteps // count`` timesteps in each step, wherever the next step starts.
        distilled: take the timesteps from the ``original_inference_steps`` that the model was distilled for.
    """

    spacing: str
    integer_linspace: bool = True
    unvisited_points: int = 0
    keeps_infinite_sigma: bool = False
    starts_at_sigma: bool = False
    curves_span_training: bool = False
    rounding: Mapping[str, Callable[[float], int]] = field(default_factory=dict)
    final_sigma: str = "zero"
    fixed_stride: bool = False
    distilled: bool = False


_EULER = SpacingRule(spacing="linspace", integer_linspace=False, starts_at_sigma=True, final_sigma="final_sigmas_type")
_MULTISTEP = SpacingRule(
    spacing="linspace",
    unvisited_points=1,
    curves_span_training=True,
    rounding={"karras": round, "exponential": math.floor, "beta": math.floor},
    final_sigma="final_sigmas_type",
)
_DISTILLED = SpacingRule(spacing="leading", keeps_infinite_sigma=True, distilled=True)

SPACING_RULES = {
    "euler": _EULER,
    "dpm2": replace(_EULER, rounding={"karras": round}, final_sigma="zero"),
    "ddim": SpacingRule("leading", keeps_infinite_sigma=True, final_sigma="set_alpha_to_one", fixed_stride=True),
    "ddpm": SpacingRule("leading", keeps_infinite_sigma=True),
    "pndm": SpacingRule("leading", final_sigma="set_alpha_to_one", fixed_stride=True),
    "multistep": _MULTISTEP,
    "deis": replace(_MULTISTEP, final_sigma="first"),
    "lcm": _DISTILLED,
    "tcd": replace(_DISTILLED, final_sigma="first"),
}


def spaced_timesteps(count: int, total: int, rule: SpacingRule, spacing: str, offset: int) -> list[float]:
    """Return ``count`` descending timesteps out of ``total``, equal to diffusers' integers.

    The arithmetic is float64 and rounds half to even, as NumPy does. ``offset`` is the checkpoint's ``steps_offset``.
    """
    if spacing == "trailing":
        # Counted down from the end; one less, since training counts from 0. The ratio is rounded as arange rounds it,
        # which settles where a half goes.
        ratio = total - (total - total / count)
        return [float(round(total - i * ratio) - 1) for i in range(count)]
    points = min(count + rule.unvisited_points, total)  # there are no more points than timesteps
    if spacing == "leading":
        ascending = [float(i * (total // points) + offset) for i in range(points)]
    else:
        ratio = (total - 1) / (points - 1) if points > 1 else 0.0
        ascending = [i * ratio for i in range(points - 1)] + [float(total - 1)] * (points > 1) or [0.0]
        ascending = [float(round(t)) for t in ascending] if rule.integer_linspace else list(array("f", ascending))
    return ascending[points - count :][::-1]


def distilled_timesteps(count: int, total: int, original: int) -> list[float]:
    """Return ``count`` of the ``original`` timesteps that a model was distilled for (Luo et al. 2023), evenly spread.

    Raises ValueError for more steps than the model was distilled for.
    """
    if count > original:
        raise ValueError(f"{count} steps: the model was distilled for {original}; choose 1 to {original}")
    return [float((original - int(i * (original / count))) * (total // original) - 1) for i in range(count)]
