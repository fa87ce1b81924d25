"""Networks that are shown a picture, the hint, and steer the UNet by what they add to the maps of its first half.

A ControlNet (Zhang et al. 2023) is a copy of that half, and is asked at every step; what it says passes through
convolutions that training starts at zero. A T2I-Adapter (Mou et al. 2023) is small, and is asked once a run.
Module names are those of diffusers' ``ControlNetModel`` and ``T2IAdapter``; 1×1 convolutions are Linears here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .config import ControlNetConfig, UNetConfig, misfit
from .layers import Context
from .unet import Encoder, Residuals


class ControlNetConditioningEmbedding(nn.Module):
    """From a hint [B, H, W, 3] to the UNet's first width at the size of the latents; every second block halves it."""

    def __init__(self, config: ControlNetConfig):
        super().__init__()
        widths = config.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(config.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = []
        for width, out in pairwise(widths):
            self.blocks += [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, out, 3, stride=2, padding=1)]
        self.conv_out = nn.Conv2d(widths[-1], config.block_out_channels[0], 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        for conv in (self.conv_in, *self.blocks):
            x = nn.silu(conv(x))
        return self.conv_out(x)


class ControlNetModel(Encoder):
    """Says what to add to the UNet's maps, so that its picture follows a hint.

    Args of the call:
        x: the latent [B, h, w, in_channels], without the extra channels that some UNets take.
        t, context, text_time: as the UNet takes them.
        hint_embedding: from ``embed``, [B, h, w, C], or [1, h, w, C] for all.

    Returns:
        (one residual for each map that the UNet's second half takes back, the middle's residual), at full strength.
        They are as large as the maps, or [B, 1, 1, C] in a network whose ``config.global_pool_conditions`` is set.
    """

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(config)
        self.controlnet_down_blocks = [nn.Linear(width, width) for width in config.skip_channels]
        self.controlnet_mid_block = nn.Linear(config.block_out_channels[-1], config.block_out_channels[-1])

    def embed(self, hint: mx.array) -> mx.array:
        """What the network sees in a hint [B, H, W, 3] in [0, 1], red first: [B, h, w, C]; it does not change in a run.

        H and W are ``config.scale`` (8) times the latent's. Raises ValueError for another number of channels.
        """
        channels = self.config.conditioning_channels
        if hint.ndim != 4 or hint.shape[-1] != channels:
            raise ValueError(
                f"a hint of shape {hint.shape} is not the [B, H, W, {channels}] that this ControlNet takes"
            )
        if self.config.controlnet_conditioning_channel_order == "bgr":
            hint = hint[..., ::-1]
        return self.controlnet_cond_embedding(hint.astype(self.conv_in.weight.dtype))

    def __call__(
        self,
        x: mx.array,
        t: float | mx.array,
        context: mx.array | Context,
        hint_embedding: mx.array,
        *,
        text_time: tuple[mx.array, mx.array] | None = None,
    ) -> tuple[list[mx.array], mx.array]:
        if hint_embedding.shape[1:3] != x.shape[1:3]:
            scale = self.config.scale
            given, needed = ((scale * h, scale * w) for _, h, w, _ in (hint_embedding.shape, x.shape))
            raise ValueError(f"the hint's size is {given}, the picture's {needed} (height, width): resize the hint")
        x = self.conv_in(x) + hint_embedding
        context = context if isinstance(context, Context) else Context(context)
        skips, middle = self.encode(x, self.embed_time(t, x.dtype, context, text_time), context)
        down = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        middle = self.controlnet_mid_block(middle)
        if self.config.global_pool_conditions:
            down, middle = [r.mean(axis=(1, 2), keepdims=True) for r in down], middle.mean(axis=(1, 2), keepdims=True)
        return down, middle


def scaled(residuals: Residuals, scale: float, guess: bool = False) -> tuple[list[mx.array], mx.array]:
    """Residuals times ``scale``; in guess mode the finest also times 0.1 and each coarser one more, up to 1.

    Guess mode lets a hint steer without a prompt (Zhang et al. 2023): the coarse maps, which say what there is, are
    heard more than the fine ones, which say where. The factors are evenly spaced in their logarithm; residuals of one
    pixel, which say nothing of places, are not weighted.
    """
    down, middle = residuals
    count = len(down)
    weighted = guess and down[0].shape[1:3] != (1, 1)
    factors = [10 ** (i / count - 1) if weighted else 1.0 for i in range(count)]
    return [scale * factor * r for factor, r in zip(factors, down, strict=True)], scale * middle


@dataclass(frozen=True)
class T2IAdapterConfig:
    """Names and defaults of diffusers' ``T2IAdapter``; ``channels`` are the widths of its stages, the finest first."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    in_channels: int = 3
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "T2IAdapterConfig":
        """Read an adapter's ``config.json``; ValueError names every key whose value this library cannot compute."""
        given = {key: value for key, value in raw.items() if value is not None and not key.startswith("_")}
        problems = [f"{key}={value!r}" for key, value in given.items() if key not in cls.__dataclass_fields__]
        if (kind := given.get("adapter_type", cls.adapter_type)) not in _ADAPTER_TYPES:
            problems.append(f"adapter_type={kind!r} (supported: {' or '.join(map(repr, _ADAPTER_TYPES))})")
        if problems:
            raise ValueError(f"adapter config: this library cannot compute {'; '.join(problems)}")
        return cls(**given | {"channels": tuple(given.get("channels", cls.channels))})

    def check_fits(self, unet: UNetConfig) -> None:
        """Raise ValueError unless each of the features has its down block in ``unet``, and XL's last one the middle."""
        widths = self.channels + self.channels[-1:] * (self.adapter_type == "light_adapter")
        xl = unet.down_block_types[0] == "DownBlock2D"
        places = unet.block_out_channels + unet.block_out_channels[-1:] * xl
        if widths != places or (self.adapter_type == "full_adapter_xl") != xl:
            raise misfit(
                "T2I-Adapter", f"its features ({self.adapter_type}) have widths {widths}, the model's {places}"
            )


_ADAPTER_TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")


class AdapterResnetBlock(nn.Module):
    """Two convolutions with a ReLU between, residual; the second is 1×1 except in light adapters."""

    def __init__(self, channels: int, light: bool):
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, 3, padding=1) if light else nn.Linear(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.block2(nn.relu(self.block1(x)))


class AdapterBlock(nn.Module):
    """Halves its map if ``down``, changes its width, refines it; light adapters refine a quarter of the width."""

    def __init__(self, in_channels: int, out_channels: int, count: int, *, down: bool, light: bool):
        super().__init__()
        width = out_channels // 4 if light else out_channels
        if light or in_channels != width:
            self.in_conv = nn.Linear(in_channels, width)
        self.resnets = [AdapterResnetBlock(width, light) for _ in range(count)]
        if light:
            self.out_conv = nn.Linear(width, out_channels)
        self._down = down

    def __call__(self, x: mx.array) -> mx.array:
        if self._down:
            b, h, w, c = x.shape
            x = mx.pad(x, [(0, 0), (0, h % 2), (0, w % 2), (0, 0)], mode="edge")  # an odd side's last mean is of one
            x = x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).mean(axis=(2, 4))
        if "in_conv" in self:
            x = self.in_conv(x)
        for resnet in self.resnets:
            x = resnet(x)
        return self.out_conv(x) if "out_conv" in self else x


class Adapter(nn.Module):
    """The three shapes of adapters: which of their blocks there are, and which of them halve the map."""

    def __init__(self, config: T2IAdapterConfig):
        super().__init__()
        light, xl = (config.adapter_type == kind for kind in ("light_adapter", "full_adapter_xl"))
        channels, unshuffled = config.channels, config.in_channels * config.downscale_factor**2
        if not light:
            self.conv_in = nn.Conv2d(unshuffled, channels[0], 3, padding=1)
        widths = [unshuffled, *channels, channels[-1]] if light else [channels[0], *channels]
        self.body = [
            AdapterBlock(width, out, config.num_res_blocks, down=i == 2 if xl else i > 0, light=light)
            for i, (width, out) in enumerate(pairwise(widths))
        ]
        self._factor = config.downscale_factor

    def __call__(self, x: mx.array) -> list[mx.array]:
        b, h, w, c = x.shape
        f = self._factor
        x = x.reshape(b, h // f, f, w // f, f, c).transpose(0, 1, 3, 5, 2, 4).reshape(b, h // f, w // f, c * f * f)
        if "conv_in" in self:
            x = self.conv_in(x)
        features = []
        for block in self.body:
            x = block(x)
            features.append(x)
        return features


class T2IAdapter(nn.Module):
    """Says what to add to the UNet's down blocks, and in XL to its middle, the same at every step."""

    def __init__(self, config: T2IAdapterConfig):
        super().__init__()
        self.config = config
        self.adapter = Adapter(config)

    def embed(self, hint: mx.array) -> list[mx.array]:
        """The UNet's ``features`` for a hint [B, H, W, 3] in [0, 1], at full strength; it does not change in a run.

        An adapter with ``config.in_channels`` 1 sees the hint in grey, which may also be given as [B, H, W, 1].
        Raises ValueError for other shapes, and sides that are no multiples of ``config.downscale_factor`` (8, XL 16).
        """
        factor, channels = self.config.downscale_factor, self.config.in_channels
        if channels == 1 and hint.shape[-1] == 3:
            hint = (hint * mx.array([0.299, 0.587, 0.114], hint.dtype)).sum(axis=-1, keepdims=True)  # as PIL does
        if hint.ndim != 4 or hint.shape[-1] != channels or hint.shape[1] % factor or hint.shape[2] % factor:
            raise ValueError(
                f"a hint of shape {hint.shape} is not the [B, H, W, {channels}] that this adapter takes, "
                f"with sides that are multiples of {factor}"
            )
        return self.adapter(hint.astype(self.adapter.body[0].resnets[0].block1.weight.dtype))
