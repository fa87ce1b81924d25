"""BiT, the ResNet below hybrid vision transformers (Kolesnikov et al. 2020), named as transformers' ``BitBackbone``.

Its convolutions standardise their weights (Qiao et al. 2019) and are padded as TensorFlow pads them ("SAME"). The last
stage has a sixteenth of the image's size, rounded up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from .config import Config, Supported
from .layers import Group, GroupNorm

_NORM_EPS = 1e-5
_WEIGHT_EPS = 1e-8
_STAGES = ("stage1", "stage2", "stage3")


@dataclass(frozen=True)
class BitConfig(Config):
    """Hold the backbone's part of a depth estimator's config; the defaults are the hybrid DPT's."""

    kind: ClassVar[str] = "depth estimator backbone"
    supported: ClassVar[Supported] = {
        "model_type": ("bit",),
        "layer_type": ("bottleneck",),
        "global_padding": ("SAME", "same"),
        "embedding_dynamic_padding": (True,),
        "hidden_act": ("relu",),
        "num_channels": (3,),
        "output_stride": (16, 32),  # below 16 the last stages are dilated
        "width_factor": (1,),
        "out_features": (_STAGES,),
    }

    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024)
    depths: tuple[int, ...] = (3, 4, 9)
    num_groups: int = 32

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read ``backbone_config``; ValueError names every key with an unsupported value."""
        absent = {  # transformers' defaults, with four sizes for any number of depths
            "layer_type": "preactivation",
            "global_padding": None,
            "embedding_dynamic_padding": False,
            "out_features": None,
            "depths": (3, 4, 6, 3),
        }
        return super().from_dict({**absent, **raw, "hidden_sizes": (raw.get("hidden_sizes") or cls.hidden_sizes)[:3]})

    def __post_init__(self) -> None:
        kind, sizes, count = "depth estimator backbone config", self.hidden_sizes, len(_STAGES)
        if len(self.depths) != count:
            raise ValueError(f"{kind}: depths={self.depths!r} (supported: {count} stages)")
        if len(sizes) != count or any(size % 32 for size in sizes):
            raise ValueError(f"{kind}: hidden_sizes={sizes!r} (supported: {count} or more multiples of 32)")


class WeightStandardizedConv2d(nn.Module):
    """Convolve with filters of mean 0 and variance 1 (Qiao et al. 2019), without bias and with "SAME" padding.

    The filters are standardised at every call, so the module holds the file's values.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.weight = mx.zeros((out_channels, kernel, kernel, in_channels))
        self._stride = stride

    def __call__(self, x: mx.array) -> mx.array:
        """``x`` [B, H, W, C_in] -> [B, ceil(H / stride), ceil(W / stride), C_out]."""
        weight = self.weight - self.weight.mean(axis=(1, 2, 3), keepdims=True)
        weight = weight * mx.rsqrt(mx.square(weight).mean(axis=(1, 2, 3), keepdims=True) + _WEIGHT_EPS)
        return mx.conv2d(pad_same(x, weight.shape[1], self._stride), weight, self._stride)


def pad_same(x: mx.array, kernel: int, stride: int) -> mx.array:
    """Pad NHWC maps with zeros so that ceil(size / stride) windows fit; an odd zero goes below and to the right."""
    needed = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[1:3]]
    return mx.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in needed), (0, 0)]) if any(needed) else x


class BitBottleneck(nn.Module):
    """Run a bottleneck block (He et al. 2016) with the stride in its 3×3 convolution; its middle is a quarter wide."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, first: bool):
        super().__init__()
        narrow = out_channels // 4
        if first:
            conv = WeightStandardizedConv2d(in_channels, out_channels, 1, stride)
            self.downsample = Group(conv=conv, norm=GroupNorm(groups, out_channels, _NORM_EPS))
        shapes = [(in_channels, narrow, 1), (narrow, narrow, 3, stride), (narrow, out_channels, 1)]
        for i, (into, out, *kernel) in enumerate(shapes, start=1):
            self[f"conv{i}"] = WeightStandardizedConv2d(into, out, *kernel)
            self[f"norm{i}"] = GroupNorm(groups, out, _NORM_EPS)

    def __call__(self, x: mx.array) -> mx.array:
        y = nn.relu(self.norm1(self.conv1(x)))
        y = nn.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if "downsample" in self:
            x = self.downsample.norm(self.downsample.conv(x))
        return nn.relu(y + x)


class BitBackbone(nn.Module):
    """Compute the maps of the three stages from pixels [B, H, W, 3], at a 4th, an 8th and a 16th of the size."""

    def __init__(self, config: BitConfig):
        super().__init__()
        width, groups, stages = config.embedding_size, config.num_groups, []
        embedder = Group(
            convolution=WeightStandardizedConv2d(3, width, 7, stride=2), norm=GroupNorm(groups, width, _NORM_EPS)
        )
        for stage, (out, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
            widths = [width] + [out] * (depth - 1)
            strides = [2 if stage else 1] + [1] * (depth - 1)
            blocks = [BitBottleneck(w, out, strides[i], groups, first=i == 0) for i, w in enumerate(widths)]
            stages.append(Group(layers=blocks))
            width = out
        self.bit = Group(embedder=embedder, encoder=Group(stages=stages))
        self._pool = nn.MaxPool2d(3, stride=2)

    def __call__(self, x: mx.array) -> list[mx.array]:
        embedder = self.bit.embedder
        # For a maximum over outputs of a ReLU, padding with zeros equals minus infinity.
        x = self._pool(pad_same(nn.relu(embedder.norm(embedder.convolution(x))), 3, 2))
        maps = []
        for stage in self.bit.encoder.stages:
            for block in stage.layers:
                x = block(x)
            maps.append(x)
        return maps
