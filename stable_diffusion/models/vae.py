"""The autoencoder between pixels and latents (Rombach et al. 2022), named as diffusers' ``AutoencoderKL``.

Encoder and decoder are a list of layers each, run one after the other. ``tiling`` runs the same lists on parts of maps.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from .config import AutoencoderConfig
from .layers import Attention, Conv2d, Downsample2D, GroupNorm, ResnetBlock2D, silu
from .upsampling import Upsample2D

Network = Callable[[mx.array], mx.array]

LARGEST_SCORES = 2**25  # bytes of attention scores computed at once
_EPS = 1e-6  # of every GroupNorm in the autoencoder


class SpatialAttention(Attention):
    """Compute self-attention over the positions of a map, normed and residual, with one head in autoencoders."""

    def __init__(self, channels: int, groups: int, *, heads: int = 1, eps: float = _EPS):
        super().__init__(channels, heads, bias=True, largest_scores=LARGEST_SCORES)
        self.group_norm = GroupNorm(groups, channels, eps)

    def __call__(self, x: mx.array) -> mx.array:
        return x + super().__call__(self.group_norm(x).flatten(0, 2), len(x)).reshape(x.shape)


class AutoencoderBlock(nn.Module):
    """Hold resnets, an attention after the first if ``attends``, and optional down- or upsampling at the end.

    ``widths`` are the channels of the input and of each resnet's output.
    """

    def __init__(self, widths: list[int], groups: int, resample: str | None = None, attends: bool = False):
        super().__init__()
        self.resnets = [ResnetBlock2D(i, o, groups=groups, eps=_EPS) for i, o in pairwise(widths)]
        if attends:
            self.attentions = [SpatialAttention(widths[-1], groups)]
        if resample == "down":
            self.downsamplers = [Downsample2D(widths[-1], pad_end=True)]
        elif resample == "up":
            self.upsamplers = [Upsample2D(widths[-1])]

    @property
    def layers(self) -> list[Network]:
        """Return the layers in order."""
        samplers = self.get("downsamplers", []) + self.get("upsamplers", [])
        return [self.resnets[0], *self.get("attentions", []), *self.resnets[1:], *samplers]


class Half(nn.Module):
    """Run the encoder: pixels [B, H, W, 3] -> mean and log variance of latents, [B, h, w, 2 C].

    Or the decoder: latents -> pixels, with the widths in reverse and one more resnet in each block.
    """

    def __init__(self, config: AutoencoderConfig, half: str):
        super().__init__()
        groups, widths, count = config.norm_num_groups, config.block_out_channels, config.layers_per_block
        into, out, resample = config.in_channels, config.moments * config.latent_channels, "down"
        self.mid_block = AutoencoderBlock([widths[-1]] * 3, groups, attends=config.mid_block_add_attention)
        if half == "decoder":
            into, out, resample = config.latent_channels, config.out_channels, "up"
            widths, count = widths[::-1], count + 1
        self.conv_in = Conv2d(into, widths[0], 3, padding=1)
        self[f"{resample}_blocks"] = [
            AutoencoderBlock([before] + [width] * count, groups, resample if i < len(widths) else None)
            for i, (before, width) in enumerate(pairwise([widths[0], *widths]), start=1)
        ]
        self.conv_norm_out = GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = Conv2d(widths[-1], out, 3, padding=1)

    @property
    def layers(self) -> list[Network]:
        """Return the layers in order."""
        blocks = [*self.get("down_blocks", []), self.mid_block, *self.get("up_blocks", [])]
        return [self.conv_in, *(layer for b in blocks for layer in b.layers), self.conv_norm_out, silu, self.conv_out]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.layers:
            x = layer(x)
        return x


def with_no_variance(z: mx.array) -> tuple[mx.array, mx.array]:
    """Return latents without a posterior, and a log variance of minus infinity."""
    return z, mx.full(z.shape, -math.inf, dtype=z.dtype)


class AutoencoderKL(nn.Module):
    """Encode pixels in [-1, 1] to latents in the UNet's scale (times ``scaling_factor``), and decode them."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        self.encoder = Half(config, "encoder")
        self.decoder = Half(config, "decoder")
        if config.use_quant_conv:
            self.quant_conv = nn.Linear(2 * config.latent_channels, 2 * config.latent_channels)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Linear(config.latent_channels, config.latent_channels)

    def encode(self, x: mx.array, encoder: Network | None = None) -> tuple[mx.array, mx.array]:
        """Encode pixels [B, H, W, 3] to (mean, log variance) of the latents, each [B, H / 8, W / 8, 4].

        ``mean + exp(logvar / 2) * noise`` is a sample of the posterior, in the UNet's scale. ``encoder`` replaces this
        network's encoder, for example by a version in slices.
        """
        moments = (encoder or self.encoder)(x)
        if "quant_conv" in self:
            moments = self.quant_conv(moments)
        mean, logvar = mx.split(moments, 2, axis=-1)
        center, scale = self._normalization(mean.dtype)
        # The variance is bounded as in training: e^-30 ... e^20.
        return (mean - center) * scale, mx.clip(logvar, -30, 20) + 2 * mx.log(scale)

    def decode(self, z: mx.array, decoder: Network | None = None) -> mx.array:
        """Decode latents [B, h, w, 4] to pixels [B, 8h, 8w, 3], about [-1, 1] and not clipped."""
        center, scale = self._normalization(z.dtype)
        z = z / scale + center
        if "post_quant_conv" in self:
            z = self.post_quant_conv(z)
        return (decoder or self.decoder)(z)

    def _normalization(self, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Return the mean of the network's latents and their factor, as numbers or per channel."""
        config = self.config
        center, scale = mx.array(0.0), mx.array(config.scaling_factor)
        if config.latents_mean is not None and config.latents_std is not None:  # both, as in diffusers
            center, scale = mx.array(config.latents_mean), scale / mx.array(config.latents_std)
        return center.astype(dtype), scale.astype(dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """Encode pixels and decode the mean of their latents."""
        return self.decode(self.encode(x)[0])
