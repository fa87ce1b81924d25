"""The autoencoder between pixels and latents (Rombach et al. 2022), named as diffusers' ``AutoencoderKL``.

Encoder and decoder are a list of layers each, run one after the other. ``tiling`` runs the same lists on parts of maps.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .config import AutoencoderConfig
from .kernels import silu
from .layers import Attention, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D

Network = Callable[[mx.array], mx.array]

_EPS = 1e-6  # of every GroupNorm in the autoencoder


LARGEST_SCORES = 2**25  # bytes of attention that are computed at once


class SpatialAttention(Attention):
    """Compute single-head self-attention over the positions of a map, normed and residual."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, bias=True, largest_scores=LARGEST_SCORES)
        self.group_norm = GroupNorm(groups, channels, _EPS)

    def __call__(self, x: mx.array) -> mx.array:
        return x + super().__call__(self.group_norm(x).flatten(0, 2), len(x)).reshape(x.shape)


class AutoencoderBlock(nn.Module):
    """Hold several resnets, and a halving or doubling at their end if there is one."""

    def __init__(self, channels: list[tuple[int, int]], groups: int, resample: str | None = None):
        super().__init__()
        self.resnets = [ResnetBlock2D(i, o, groups=groups, eps=_EPS) for i, o in channels]
        width = channels[-1][1]
        if resample == "down":
            self.downsamplers = [Downsample2D(width, pad_end=True)]
        elif resample == "up":
            self.upsamplers = [Upsample2D(width)]

    @property
    def layers(self) -> list[Network]:
        return [*self.resnets, *self.get("downsamplers", []), *self.get("upsamplers", [])]


class MidBlock(nn.Module):
    """Hold two resnets around an attention, at the smallest size."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        width, groups = config.block_out_channels[-1], config.norm_num_groups
        self.resnets = [ResnetBlock2D(width, width, groups=groups, eps=_EPS) for _ in range(2)]
        if config.mid_block_add_attention:
            self.attentions = [SpatialAttention(width, groups)]

    @property
    def layers(self) -> list[Network]:
        return [self.resnets[0], *self.get("attentions", []), self.resnets[1]]


class _Layered(nn.Module):
    """Run ``layers`` one after the other."""

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


class Encoder(_Layered):
    """Encode pixels [B, H, W, 3] to mean and log variance of the latents [B, h, w, 2 * latent_channels]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = []
        for i, (before, out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            channels = [(before, out)] + [(out, out)] * (config.layers_per_block - 1)
            self.down_blocks.append(AutoencoderBlock(channels, groups, "down" if i < len(widths) - 1 else None))
        self.mid_block = MidBlock(config)
        self.conv_norm_out = GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    @property
    def layers(self) -> list[Network]:
        blocks = [layer for block in (*self.down_blocks, self.mid_block) for layer in block.layers]
        return [self.conv_in, *blocks, self.conv_norm_out, silu, self.conv_out]


class Decoder(_Layered):
    """Decode latents [B, h, w, latent_channels] to pixels [B, H, W, 3]."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = []
        for i, (before, out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
            channels = [(before, out)] + [(out, out)] * config.layers_per_block
            self.up_blocks.append(AutoencoderBlock(channels, groups, "up" if i < len(widths) - 1 else None))
        self.conv_norm_out = GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    @property
    def layers(self) -> list[Network]:
        blocks = [layer for block in (self.mid_block, *self.up_blocks) for layer in block.layers]
        return [self.conv_in, *blocks, self.conv_norm_out, silu, self.conv_out]


class AutoencoderKL(nn.Module):
    """Encode pixels in [-1, 1] to latents in the UNet's scale (times ``scaling_factor``), and decode them."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = nn.Linear(2 * config.latent_channels, 2 * config.latent_channels)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Linear(config.latent_channels, config.latent_channels)

    def encode(self, x: mx.array, encoder: Network | None = None) -> tuple[mx.array, mx.array]:
        """Encode pixels [B, H, W, 3] to (mean, log variance) of the latents, each [B, H / 8, W / 8, 4].

        Both are in the UNet's scale, so ``mean + exp(logvar / 2) * noise`` is a sample of the posterior.
        ``encoder`` runs in the place of this network's encoder, such as the same one in slices.
        """
        moments = (encoder or self.encoder)(x)
        if "quant_conv" in self:
            moments = self.quant_conv(moments)
        mean, logvar = mx.split(moments, 2, axis=-1)
        scale = self.config.scaling_factor
        # The variance is bounded as in training: e^-30 ... e^20.
        return mean * scale, mx.clip(logvar, -30, 20) + 2 * mx.log(mx.array(scale, dtype=mean.dtype))

    def decode(self, z: mx.array, decoder: Network | None = None) -> mx.array:
        """Decode latents [B, h, w, 4] to pixels [B, 8h, 8w, 3], about [-1, 1] and not clipped.

        ``decoder`` runs in the place of this network's decoder, such as the same one in slices.
        """
        z = z / self.config.scaling_factor
        if "post_quant_conv" in self:
            z = self.post_quant_conv(z)
        return (decoder or self.decoder)(z)

    def __call__(self, x: mx.array) -> mx.array:
        """Encode pixels and decode the mean of their latents."""
        return self.decode(self.encode(x)[0])
