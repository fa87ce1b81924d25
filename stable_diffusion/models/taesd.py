"""The tiny autoencoder TAESD (Ollin Boer Bohan 2023), named as diffusers' ``AutoencoderTiny``.

It was distilled from the large autoencoder for the same latents, and has only 3×3 convolutions of one width. It takes
a fraction of the time and memory, for previews and for machines with little memory.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from .config import Config, Supported
from .layers import Conv2d
from .upsampling import UpsampledConv2d
from .vae import Network, with_no_variance


@dataclass(frozen=True)
class AutoencoderTinyConfig(Config):
    """Hold the config of diffusers' ``AutoencoderTiny``; the defaults are TAESD's and TAESDXL's."""

    kind: ClassVar[str] = "tiny vae"
    supported: ClassVar[Supported] = {
        "act_fn": ("relu", None),
        "upsample_fn": ("nearest", None),
        "upsampling_scaling_factor": (2, None),
        "shift_factor": (0, None),
    }
    ignored: ClassVar[Collection[str]] = ("block_out_channels", "force_upcast", "latent_magnitude", "latent_shift")

    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)  # of stages, finest first; empty: only a decoder
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)  # of stages, finest last
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)  # residual blocks of each stage
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        for side in ("encoder", "decoder"):
            widths, blocks = getattr(self, f"{side}_block_out_channels"), getattr(self, f"num_{side}_blocks")
            if len(widths) != len(blocks) or len(set(widths)) > 1 or not (widths or side == "encoder"):
                text = f"{side}_block_out_channels={widths} must be one width for each of {blocks}"
                raise ValueError(f"tiny vae config: {text}")
        if len(self.num_encoder_blocks) not in (0, len(self.num_decoder_blocks)):
            raise ValueError("tiny vae config: its encoder and its decoder differ in their number of stages")

    @property
    def scale(self) -> int:
        """Return the pixels per latent, in each direction: 8 for published models."""
        return 2 ** (len(self.num_decoder_blocks) - 1)

    def widest(self, half: str) -> float:
        """Return the channels of a block's three maps in a half ("encoder" or "decoder"), per pixel."""
        return 3 * getattr(self, f"{half}_block_out_channels")[0]


class TinyBlock(nn.Module):
    """Run three convolutions and add the input, with a rectifier after each."""

    def __init__(self, width: int):
        super().__init__()
        # The slots between them are rectifiers without weights.
        self.conv = [nn.Identity() if i % 2 else Conv2d(width, width, 3, padding=1) for i in range(5)]

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for conv in self.conv[:-1:2]:
            y = nn.relu(conv(y))
        return nn.relu(self.conv[-1](y) + x)


class AutoencoderTiny(nn.Module):
    """Encode pixels in [-1, 1] to latents in the UNet's scale, and decode them; the inner networks use [0, 1]."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        layers = []
        for i, blocks in enumerate(config.num_encoder_blocks):
            width = config.encoder_block_out_channels[0]
            into, stride = (width, 2) if i else (config.in_channels, 1)
            layers.append(Conv2d(into, width, 3, stride=stride, padding=1, bias=not i))
            layers += [TinyBlock(width) for _ in range(blocks)]
        if layers:
            self.encoder = nn.Sequential(*layers, Conv2d(width, config.latent_channels, 3, padding=1))
        width = config.decoder_block_out_channels[0]
        layers = [Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for i, blocks in enumerate(config.num_decoder_blocks):
            if i:
                layers += [nn.Identity(), UpsampledConv2d(width, width, bias=False)]  # the first holds the doubling
            layers += [TinyBlock(width) for _ in range(blocks)]
        self.decoder = nn.Sequential(*layers, Conv2d(width, config.out_channels, 3, padding=1))

    def encode(self, x: mx.array, encoder: Network | None = None) -> tuple[mx.array, mx.array]:
        """Encode pixels [B, H, W, 3] to (latents, log variance), each [B, H / 8, W / 8, 4]."""
        return with_no_variance((encoder or self.encoder)((x + 1) / 2) * self.config.scaling_factor)

    def decode(self, z: mx.array, decoder: Network | None = None) -> mx.array:
        """Decode latents [B, h, w, 4] to pixels [B, 8h, 8w, 3], about [-1, 1] and not clipped."""
        z = mx.tanh(z / self.config.scaling_factor / 3) * 3  # limits outliers to the training range
        return (decoder or self.decoder)(z) * 2 - 1

    def __call__(self, x: mx.array) -> mx.array:
        """Encode and decode pixels."""
        return self.decode(self.encode(x)[0])
