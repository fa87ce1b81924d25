"""ControlNets (Zhang et al. 2023) and T2I-Adapters (Mou et al. 2023) in a run: their images, strengths and steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..models.controlnet import T2IAdapter, scaled_residuals
from ..models.layers import Context
from ..models.lllite import ControlNetLLLite, ControlNetwork
from ..models.unet import Residuals, UNet2DConditionModel


class Acting:
    """Act with a ``scale`` in the steps between ``start`` and ``end``, shares of a run."""

    scale: float
    start: float
    end: float

    def check_strength(self, network: str) -> None:
        """Raise ValueError unless the scale is finite and the shares of the steps are in order."""
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale {self.scale} of {network} is not a finite number")
        if not 0 <= self.start < self.end <= 1:
            text = f"{network} cannot act from {self.start} to {self.end} of the steps"
            raise ValueError(f"{text}; give fractions, 0 <= start < end <= 1")

    def acts(self, step: int, steps: int) -> bool:
        """Return whether all of a step lies between start and end."""
        return step / steps >= self.start and (step + 1) / steps <= self.end


@dataclass(frozen=True)
class Control(Acting):
    """Describe how a ControlNet or T2I-Adapter steers a run.

    Args:
        network: see ``StableDiffusion.load_controlnet``.
        image: the control image [H, W, 3] in [0, 1], of the output's size.
        scale: factor on what the network adds to the UNet's maps; at 0 it has no effect.
        start: share of the steps, 0 ... 1, after which it acts.
        end: share of the steps up to which it acts.
        guess: steer the rows of the prompt only, and the UNet's deeper layers more than the others, so that the image
            matters more than the prompt ("guess mode"). T2I-Adapters and LLLites have no such mode.
        kind: what a union ControlNet is shown, one of its control types by name or number. Controls with the same union
            ControlNet run together; one that does not act in a step has a scale of 0 there, as in diffusers.

    Raises ValueError for numbers out of range, and for a kind that the network does not know.
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
        """Return the number of the image's kind in a union ControlNet; other networks have none."""
        return self.network.config.type_number(self.kind) if hasattr(self.network, "task_embedding") else None


@dataclass
class ControlGroup:
    """Hold controls that one network computes together, and their images as it embeds them, the same in all steps."""

    controls: list[Control]
    embedded: list[mx.array | list[mx.array] | dict[str, mx.array]]


def embed_controls(controls: Sequence[Control], dtype: mx.Dtype) -> list[ControlGroup]:
    """Embed the images of controls whose scale is not 0; those of one union ControlNet form a group.

    Raises ValueError where some of a group are in guess mode and others are not.
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
    """Return the UNet as ControlNet-LLLites change it, and the sums of residuals and features that a step adds to it.

    ``acting`` has groups with the scales of the step. ``x`` [B, h, w, 4] is the UNet's input, without the extra
    channels of some checkpoints. The other arguments are of the same rows, see ``UNet2DConditionModel`` and
    ``GuidanceBatch``. The changed UNet shares all weights.
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
        if first.type_number is not None:  # one scale is on the residuals, several are on the images
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
