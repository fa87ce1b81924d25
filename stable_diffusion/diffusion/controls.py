"""ControlNets (Zhang et al. 2023) and T2I-Adapters (Mou et al. 2023) in a run: their images, strengths and steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..models.controlnet import ControlNetModel, T2IAdapter, scaled_residuals
from ..models.layers import Context
from ..models.unet import Residuals


@dataclass(frozen=True)
class Control:
    """Describe how a ControlNet or T2I-Adapter steers a run.

    Args:
        network: see ``StableDiffusion.load_controlnet``.
        image: the control image [H, W, 3] in [0, 1], of the output's size.
        scale: factor on what the network adds to the UNet's maps; at 0 it has no effect.
        start: share of the steps, 0 ... 1, after which it acts.
        end: share of the steps up to which it acts.
        guess: steer the rows of the prompt only, and the UNet's deeper layers more than the others, so that the image
            matters more than the prompt ("guess mode"). Adapters have no such mode.

    Raises ValueError for numbers out of range.
    """

    network: ControlNetModel | T2IAdapter
    image: mx.array
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale {self.scale} of a ControlNet is not a finite number")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"a ControlNet cannot act from {self.start} to {self.end}; give shares, 0 <= start < end <= 1"
            )
        if self.guess and isinstance(self.network, T2IAdapter):
            raise ValueError("a T2I-Adapter has no guess mode, since it does not read the prompt; leave it out")

    def acts(self, step: int, steps: int) -> bool:
        """Return True where all of a step lies between start and end."""
        return self.scale != 0 and step / steps >= self.start and (step + 1) / steps <= self.end


Embedded = mx.array | list[mx.array]  # a control's image, as its network embeds it


def control_outputs(
    acting: Sequence[tuple[Control, Embedded]],
    x: mx.array,
    t: float,
    text_time: tuple[mx.array, mx.array] | None,
    context: Context,
    is_cond: mx.array,
) -> tuple[Residuals | None, list[mx.array]]:
    """Return the sums of the ControlNets' residuals and of the adapters' features that a step adds to the UNet.

    ``x`` [B, h, w, 4] is the UNet's input, without the extra channels of some checkpoints. The other arguments are of
    the same rows, see ``UNet2DConditionModel`` and ``GuidanceBatch``.
    """
    residuals: Residuals | None = None
    features: list[mx.array] = []
    for control, embedded in acting:
        if isinstance(control.network, T2IAdapter):
            added = [control.scale * feature for feature in embedded]
            features = _sums(features, added) if features else added
            continue
        temb = control.network.embed_time(t, x.dtype, text_time)
        down, middle = scaled_residuals(control.network(x, temb, context, embedded), control.scale, control.guess)
        if control.guess or control.network.config.global_pool_conditions:
            of_cond = is_cond.astype(x.dtype)[:, None, None, None]
            down, middle = [of_cond * residual for residual in down], of_cond * middle
        residuals = (_sums(residuals[0], down), residuals[1] + middle) if residuals else (down, middle)
    return residuals, features


def _sums(first: Sequence[mx.array], second: Sequence[mx.array]) -> list[mx.array]:
    return [a + b for a, b in zip(first, second, strict=True)]
