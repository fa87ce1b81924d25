"""Networks that enlarge images, with the names of Real-ESRGAN's files: RRDB and SRVGG.

They map pixels [B, H, W, 3] in [0, 1] to pixels, without other inputs, so an image may be enlarged in tiles.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from .config import Config
from .layers import Conv2d
from .resample import pixel_unshuffle
from .tiling import blend_tiles, default_budget
from .upsampling import UpsampledConv2d

# Bytes for each value of the largest map. CPU: measured, which unfolds the inputs of convolutions. GPU: computed, not
# measured on a Mac: a Winograd convolution takes 4.6 maps.
_WORK = {mx.cpu: 120, mx.gpu: 40}
_SRVGG_MAPS = 4  # further maps of an image's size in an ``SRVGGNetCompact`` (measured)
_SMALLEST_TILE, _LARGEST_TILE = 128, 512  # pixels: they overlap by a quarter


@dataclass(frozen=True)
class RRDBNetConfig(Config):
    """Hold the config of an ``RRDBNet``, derived from the tensors of its file."""

    kind: ClassVar[str] = "upscaler"

    num_feat: int = 64
    num_block: int = 23
    num_grow_ch: int = 32
    num_upsampling: int = 2
    unshuffle: int = 1  # side of the squares of pixels that form one position

    def __post_init__(self) -> None:
        if self.unshuffle not in (1, 2, 4) or self.num_upsampling > 4 or 2**self.num_upsampling % self.unshuffle:
            text = f"num_upsampling={self.num_upsampling} with unshuffle={self.unshuffle} is not supported"
            raise ValueError(f"upscaler config: {text}; use a published model, with 1 to 3 doublings")

    @property
    def scale(self) -> int:
        """Return the factor on the sides of an image."""
        return 2**self.num_upsampling // self.unshuffle


@dataclass(frozen=True)
class SRVGGConfig(Config):
    """Hold the config of an ``SRVGGNetCompact``, derived from the tensors of its file."""

    kind: ClassVar[str] = "upscaler"

    num_feat: int = 64
    num_conv: int = 32
    scale: int = 4
    unshuffle: ClassVar[int] = 1


def _activated(x: mx.array) -> mx.array:
    return nn.leaky_relu(x, 0.2)


class ResidualDenseBlock(nn.Module):
    """Run five convolutions, each on all previous maps, and add a fifth of the last (Wang et al. 2018, sec. 3.1)."""

    def __init__(self, width: int, growth: int):
        super().__init__()
        for i in range(1, 6):
            self[f"conv{i}"] = Conv2d(width + (i - 1) * growth, width if i == 5 else growth, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        maps = x
        for i in range(1, 5):
            maps = mx.concatenate([maps, _activated(self[f"conv{i}"](maps))], axis=-1)
        return x + 0.2 * self.conv5(maps)


class RRDB(nn.Module):
    """Run three dense blocks and add a fifth of the result."""

    def __init__(self, width: int, growth: int):
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (ResidualDenseBlock(width, growth) for _ in range(3))

    def __call__(self, x: mx.array) -> mx.array:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """Enlarge by residual blocks in residual blocks: ESRGAN (Wang et al. 2018), Real-ESRGAN (Wang et al. 2021)."""

    def __init__(self, config: RRDBNetConfig):
        super().__init__()
        self.config = config
        width = config.num_feat
        self.conv_first = Conv2d(3 * config.unshuffle**2, width, 3, padding=1)
        self.body = [RRDB(width, config.num_grow_ch) for _ in range(config.num_block)]
        self.conv_body = Conv2d(width, width, 3, padding=1)
        for i in range(1, config.num_upsampling + 1):
            self[f"conv_up{i}"] = UpsampledConv2d(width, width)
        self.conv_hr = Conv2d(width, width, 3, padding=1)
        self.conv_last = Conv2d(width, 3, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, 3] -> [B, H * scale, W * scale, 3]; sides must be multiples of ``unshuffle``."""
        x = y = self.conv_first(pixel_unshuffle(x, self.config.unshuffle))
        for block in self.body:
            y = block(y)
        x = x + self.conv_body(y)
        for i in range(1, self.config.num_upsampling + 1):
            x = _activated(self[f"conv_up{i}"](x))
        return self.conv_last(_activated(self.conv_hr(x)))


class SRVGGNetCompact(nn.Module):
    """Enlarge by a chain of convolutions and add the repeated image (Wang et al. 2021, realesr-general-x4v3)."""

    def __init__(self, config: SRVGGConfig):
        super().__init__()
        self.config = config
        width, layers = config.num_feat, [Conv2d(3, config.num_feat, 3, padding=1)]
        for _ in range(config.num_conv):
            layers += [nn.PReLU(width), Conv2d(width, width, 3, padding=1)]
        self.body = [*layers, nn.PReLU(width), Conv2d(width, 3 * config.scale**2, 3, padding=1)]

    def __call__(self, x: mx.array) -> mx.array:
        """[B, H, W, 3] -> [B, H * scale, W * scale, 3]."""
        (b, h, w, _), r, y = x.shape, self.config.scale, x
        for layer in self.body:
            y = layer(y)
        y = y.reshape(b, h, w, 3, r, r).transpose(0, 1, 4, 2, 5, 3) + x[:, :, None, :, None, :]
        return y.reshape(b, h * r, w * r, 3)


Upscaler = RRDBNet | SRVGGNetCompact


def upscale(network: Upscaler, x: mx.array, budget: float | None = None) -> mx.array:
    """Enlarge an image [H, W, 3] in [0, 1], in tiles if it does not fit at once, and evaluate the result.

    ``budget`` is in bytes beside the weights, by default a quarter of the machine's memory.
    """
    (h, w, _), config = x.shape, network.config
    down, up = config.unshuffle, config.unshuffle * config.scale
    x = mx.pad(x, [(0, -h % down), (0, -w % down), (0, 0)], mode="edge")[None]
    side = tile_side(network, budget) // down
    y = network(x) if max(x.shape) <= side * down else blend_tiles(network, x, side, down, up, margin=side // 12)
    y = y[0, : h * config.scale, : w * config.scale]
    mx.eval(y)
    return y


def tile_side(network: Upscaler, budget: float | None = None) -> int:
    """Return the side in pixels of the largest tiles that fit into ``budget`` bytes."""
    budget, config = default_budget() if budget is None else budget, network.config
    maps = config.scale**2 if isinstance(network, RRDBNet) else _SRVGG_MAPS
    each = _WORK[mx.default_device().type] * config.num_feat * maps
    return min(max(int(math.sqrt(budget / each)), _SMALLEST_TILE), _LARGEST_TILE) // 8 * 8
