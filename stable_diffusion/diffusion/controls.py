"""ControlNets (Zhang et al. 2023) and T2I-Adapters (Mou et al. 2023) in a run: control images, scales and steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..models.controlnet import T2IAdapter, scaled_residuals
from ..models.layers import Context
from ..models.lllite import ControlNetLLLite, ControlNetwork
from ..models.unet import Residuals, UNet2DConditionModel


class Acting:
    """Act with a ``scale`` in the steps between ``start`` and ``end``, fractions of a run."""

    scale: float
    start: float
    end: float

    def check_strength(self, network: str) -> None:
        """Raise ValueError unless the scale is finite and start and end are valid fractions."""
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale {self.scale} of {network} is not a finite number")
        if not 0 <= self.start < self.end <= 1:
            text = f"{network} cannot act from {self.start} to {self.end} of the steps"
            raise ValueError(f"{text}; give fractions, 0 <= start < end <= 1")

    def acts(self, step: int, steps: int) -> bool:
        """Return whether a step lies completely between start and end."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


@dataclass(frozen=True)
class Control(Acting):
    """Describe how a ControlNet or T2I-Adapter controls a run.

    Args:
        network: the result of ``StableDiffusion.load_controlnet``.
        image: the control image [H, W, 3] in [0, 1], of the output's size.
        scale: factor on the residuals that the network adds to the UNet; at 0 it has no effect.
        start: fraction of the steps, 0 ... 1, at which the control begins.
        end: fraction of the steps at which the control ends.
        guess: guess mode: control only the conditional rows, and the UNet's deeper layers more strongly, so that the
            image matters more than the prompt. T2I-Adapters and LLLites have no guess mode.
        kind: control type of a union ControlNet, by name or number. Controls with the same union ControlNet run
            together; in steps outside of its fractions a control has a scale of 0, as in diffusers.

    Raises ValueError for numbers out of range, and for a control type that the network does not have.
    """

    network: ControlNetwork
    image: mx.array
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    kind: str | int | None = None

    def __post_init__(self) -> None:
        self.check_strength("a ControlNet")
        if self.guess and isinstance(self.network, T2IAdapter | ControlNetLLLite):
            kind = "T2I-Adapter" if isinstance(self.network, T2IAdapter) else "ControlNet-LLLite"
            raise ValueError(f"a {kind} has no guess mode, because it does not use the prompt; omit it")
        if self.type_number is None and self.kind is not None:
            raise ValueError(f"control type {self.kind!r} has no effect: this is not a union ControlNet; omit it")

    @property
    def type_number(self) -> int | None:
        """Return the number of the control type in a union ControlNet; None for other networks."""
        return self.network.config.type_number(self.kind) if hasattr(self.network, "task_embedding") else None


@dataclass
class ControlGroup:
    """Hold the controls that one network computes together, with their embedded images."""

    controls: list[Control]
    embedded: list[mx.array | list[mx.array] | dict[str, mx.array]]


def embed_controls(controls: Sequence[Control], dtype: mx.Dtype) -> list[ControlGroup]:
    """Embed the control images of all controls with a nonzero scale. Controls of one union ControlNet form a group.

    Raises ValueError if only some controls of a group are in guess mode.
    """
    groups: dict[int, ControlGroup] = {}
    for number, control in enumerate(controls):
        if control.scale == 0:
            continue
        group = groups.setdefault(number if control.type_number is None else id(control.network), ControlGroup([], []))
        group.controls.append(control)
        group.embedded.append(control.network.embed(control.image[None].astype(dtype)))
        if group.controls[0].guess != control.guess:
            raise ValueError("all controls of one union ControlNet share guess mode; give them the same guess")
    return list(groups.values())


def apply_controls(
    unet: UNet2DConditionModel,
    acting: Sequence[tuple[ControlGroup, Sequence[float]]],
    x: mx.array,
    t: float,
    text_time: tuple[mx.array, mx.array] | None,
    context: Context,
    is_cond: mx.array,
) -> tuple[UNet2DConditionModel, Residuals | None, list[mx.array]]:
    """Return the UNet with ControlNet-LLLites applied, and the sums of residuals and features to add in a step.

    ``acting`` has groups with the scales of the step. ``x`` [B, h, w, 4] is the UNet's input, without the extra
    channels of some checkpoints. The other arguments belong to the same rows, see ``UNet2DConditionModel`` and
    ``GuidanceBatch``. The returned UNet shares all weights.
    """
    residuals: Residuals | None = None
    features: list[mx.array] = []
    for group, scales in acting:
        first, embedded, scale = group.controls[0], group.embedded[0], scales[0]
        network, added = first.network, None
        if isinstance(network, ControlNetLLLite):
            unet = network.applied(unet, embedded, scale)
            continue
        if isinstance(network, T2IAdapter):
            scaled = [scale * feature for feature in embedded]
            features = _sums(features, scaled) if features else scaled
            continue
        if first.type_number is not None:  # a single scale applies to the residuals, several to the images
            numbers = [control.type_number for control in group.controls]
            embedded = network.fuse(group.embedded, numbers, scales if len(scales) > 1 else [1.0])
            scale, added = scale if len(scales) == 1 else 1.0, network.embed_types(numbers, x.dtype)
        temb = network.embed_time(t, x.dtype, text_time, added=added)
        down, middle = scaled_residuals(network(x, temb, context, embedded), scale, first.guess)
        if first.guess or network.config.global_pool_conditions:
            of_cond = is_cond.astype(x.dtype)[:, None, None, None]
            down, middle = [of_cond * residual for residual in down], of_cond * middle
        residuals = (_sums(residuals[0], down), residuals[1] + middle) if residuals else (down, middle)
    return unet, residuals, features


def _sums(first: Sequence[mx.array], second: Sequence[mx.array]) -> list[mx.array]:
    return [a + b for a, b in zip(first, second, strict=True)]
