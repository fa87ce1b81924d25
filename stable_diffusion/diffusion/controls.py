"""ControlNets (Zhang et al. 2023) and T2I-Adapters (Mou et al. 2023) in a run: what each is shown, and when it acts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..models.controlnet import ControlNetModel, T2IAdapter, scaled
from ..models.layers import Context
from ..models.unet import Residuals
from .guidance import Stage


@dataclass(frozen=True)
class Control:
    """A ControlNet or T2I-Adapter and what it does in a run.

    Args:
        network: see ``StableDiffusion.load_controlnet``.
        hint: what it is shown, [H, W, 3] in [0, 1], of the picture's size.
        scale: factor on what it says; at 0 it has no effect.
        start: from which share of the steps on it acts, 0 ... 1.
        end: up to which share.
        guess: let it steer without the prompt's help: it is asked for the prompt only, not for the negative one, and
            deeper layers are heard more ("guess mode"). Adapters have no such mode.

    Raises ValueError for numbers out of range.
    """

    network: ControlNetModel | T2IAdapter
    hint: mx.array
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
            raise ValueError("a T2I-Adapter has no guess mode: it does not hear the prompt; leave it out")

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, which has to lie between its start and its end as a whole."""
        return self.scale != 0 and step / steps >= self.start and (step + 1) / steps <= self.end


class Steering:
    """The controls of a run of ``steps`` steps; each looks at its hint once."""

    def __init__(self, controls: Sequence[Control], steps: int, dtype: mx.Dtype):
        self._steps = steps
        self._seen = [(c, c.network.embed(c.hint[None].astype(dtype))) for c in controls if c.scale != 0]

    def __call__(
        self,
        step: int,
        x: mx.array,
        t: float | mx.array,
        context: Context,
        stage: Stage,
        text_time: tuple[mx.array, mx.array] | None,
    ) -> dict[str, Any]:
        """What the UNet is told in a step by all that act: the sums of ControlNets' residuals and adapters' features.

        ``x`` [B, h, w, 4] are the latents, as the UNet sees them.
        """
        residuals: Residuals | None = None
        features: list[mx.array] = []
        for control, seen in self._seen:
            if not control.acts(step, self._steps):
                continue
            if isinstance(control.network, T2IAdapter):  # what it has seen is all it says
                added = [control.scale * feature for feature in seen]
                features = [a + b for a, b in zip(features, added, strict=True)] if features else added
                continue
            down, middle = scaled(
                control.network(x, t, context, seen, text_time=text_time), control.scale, control.guess
            )
            if control.guess or control.network.config.global_pool_conditions:
                heard = stage.wanted.astype(x.dtype)[:, None, None, None]
                down, middle = [heard * residual for residual in down], heard * middle
            if residuals is not None:
                down, middle = [a + b for a, b in zip(residuals[0], down, strict=True)], residuals[1] + middle
            residuals = down, middle
        return {"residuals": residuals, "features": features}
