"""ControlNets in a run (Zhang et al. 2023): what each is shown, how strongly and when it acts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .guidance import Stage
from .models.controlnet import ControlNetModel, scaled
from .models.unet import Residuals


@dataclass(frozen=True)
class Control:
    """A ControlNet and what it does in a run.

    Args:
        network: see ``StableDiffusion.load_controlnet``.
        hint: what it is shown, [H, W, 3] in [0, 1], of the picture's size.
        scale: factor on what it says; at 0 it has no effect.
        start: from which share of the steps on it acts, 0 ... 1.
        end: up to which share.
        guess: let it steer without the prompt's help: it is asked for the prompt only, not for the negative one, and
            deeper layers are heard more ("guess mode").

    Raises ValueError for numbers out of range.
    """

    network: ControlNetModel
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

    def acts(self, step: int, steps: int) -> bool:
        """Whether it acts in a step, which has to lie between its start and its end as a whole."""
        return self.scale != 0 and step / steps >= self.start and (step + 1) / steps <= self.end


class Steering:
    """The controls of a run of ``steps`` steps; each looks at its hint once."""

    def __init__(self, controls: Sequence[Control], steps: int, dtype: mx.Dtype):
        self._steps = steps
        self._shown = [(c, c.network.embed(c.hint[None].astype(dtype))) for c in controls if c.scale != 0]

    def __call__(
        self,
        step: int,
        x: mx.array,
        t: mx.array,
        context: mx.array | tuple[mx.array, mx.array],
        stage: Stage,
        text_time: tuple[mx.array, mx.array] | None,
    ) -> Residuals | None:
        """The sum of what the controls add to the UNet's maps in a step; None where none acts.

        ``x`` [B, h, w, 4] are the latents, as the UNet sees them.
        """
        total: Residuals | None = None
        for control, hint in self._shown:
            if not control.acts(step, self._steps):
                continue
            down, middle = scaled(
                control.network(x, t, context, hint, text_time=text_time), control.scale, control.guess
            )
            if control.guess or control.network.config.global_pool_conditions:
                heard = stage.wanted.astype(x.dtype)[:, None, None, None]
                down, middle = [heard * residual for residual in down], heard * middle
            if total is not None:
                down, middle = [a + b for a, b in zip(total[0], down, strict=True)], total[1] + middle
            total = down, middle
        return total
