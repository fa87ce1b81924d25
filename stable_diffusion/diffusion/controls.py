"""ControlNets (Zhang et al. 2023) and T2I-Adapters (Mou et al. 2023) in a run: their images, strengths and steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..models.controlnet import T2IAdapter, scaled_residuals
from ..models.layers import Context
from ..models.lllite import ControlNetLLLite, ControlNetwork
from ..models.unet import Residuals, UNet2DConditionModel


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
        check_strength("a ControlNet", self.scale, self.start, self.end)
        if self.guess and isinstance(self.network, T2IAdapter | ControlNetLLLite):
            kind = "T2I-Adapter" if isinstance(self.network, T2IAdapter) else "ControlNet-LLLite"
            raise ValueError(f"a {kind} has no guess mode, since it does not read the prompt; leave it out")
        if self.type_number is None and self.kind is not None:
            raise ValueError(f"control type {self.kind!r} has no effect: this is no union ControlNet; leave it out")

    @property
    def type_number(self) -> int | None:
        """Return the number of the image's kind in a union ControlNet; other networks have none."""
        return self.network.config.type_number(self.kind) if "task_embedding" in self.network else None

    def strength(self, step: int, steps: int) -> float:
        """Return the scale in a step: 0 where not all of it lies between start and end."""
        return self.scale if step / steps >= self.start and (step + 1) / steps <= self.end else 0.0


def check_strength(network: str, scale: float, start: float, end: float) -> None:
    """Raise ValueError unless the scale is finite and the shares of the steps are in order."""
    if not math.isfinite(scale):
        raise ValueError(f"the scale {scale} of {network} is not a finite number")
    if not 0 <= start < end <= 1:
        raise ValueError(f"{network} cannot act from {start} to {end}; give shares, 0 <= start < end <= 1")


@dataclass
class ControlGroup:
    """Hold controls that one network computes together, and their images as it embeds them, the same in all steps."""

    controls: list[Control]
    embedded: list[mx.array | list[mx.array] | dict[str, mx.array]]

    def strengths(self, step: int, steps: int) -> list[float]:
        """Return the scale of each control in a step."""
        return [control.strength(step, steps) for control in self.controls]


def embed_controls(controls: Sequence[Control], dtype: mx.Dtype) -> list[ControlGroup]:
    """Embed the images of controls whose scale is not 0; those of one union ControlNet form a group.

    Raises ValueError where some of a group are in guess mode and others are not.
    """
    groups: list[ControlGroup] = []
    for control in (control for control in controls if control.scale != 0):
        number, embedded = control.type_number, control.network.embed(control.image[None].astype(dtype))
        same = [group for group in groups if number is not None and group.controls[0].network is control.network]
        if not same:
            groups.append(ControlGroup([control], [embedded]))
            continue
        if same[0].controls[0].guess != control.guess:
            raise ValueError("the controls of one union ControlNet are all in guess mode, or none; set guess alike")
        same[0].controls.append(control)
        same[0].embedded.append(embedded)
    return groups


def changed_unet(
    unet: UNet2DConditionModel, acting: Sequence[tuple[ControlGroup, Sequence[float]]]
) -> UNet2DConditionModel:
    """Return the UNet with the inputs that the acting ControlNet-LLLites change; it shares all weights."""
    for group, scales in acting:
        if isinstance(network := group.controls[0].network, ControlNetLLLite):
            unet = network.applied(unet, group.embedded[0], scales[0])
    return unet


def control_outputs(
    acting: Sequence[tuple[ControlGroup, Sequence[float]]],
    x: mx.array,
    t: float,
    text_time: tuple[mx.array, mx.array] | None,
    context: Context,
    is_cond: mx.array,
) -> tuple[Residuals | None, list[mx.array]]:
    """Return the sums of the ControlNets' residuals and of the adapters' features that a step adds to the UNet.

    ``acting`` has groups with the scales of the step. ``x`` [B, h, w, 4] is the UNet's input, without the extra
    channels of some checkpoints. The other arguments are of the same rows, see ``UNet2DConditionModel`` and
    ``GuidanceBatch``.
    """
    residuals: Residuals | None = None
    features: list[mx.array] = []
    for group, scales in acting:
        first, embedded, scale = group.controls[0], group.embedded[0], scales[0]
        network, added = first.network, None
        if isinstance(network, T2IAdapter):
            scaled = [scale * feature for feature in embedded]
            features = _sums(features, scaled) if features else scaled
        if isinstance(network, T2IAdapter | ControlNetLLLite):
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
    return residuals, features


def _sums(first: Sequence[mx.array], second: Sequence[mx.array]) -> list[mx.array]:
    return [a + b for a, b in zip(first, second, strict=True)]
