"""ControlNet (Zhang et al. 2023): a copy of the UNet's first half that is shown a picture, the hint.

What it computes is added to what the UNet's first half computes, through convolutions that training starts at zero.
Module names are those of diffusers' ``ControlNetModel``; 1×1 convolutions are Linears here.
"""

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from ..config import ControlNetConfig
from .unet import Context, Encoder, Residuals


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
        t: mx.array,
        context: Context,
        hint_embedding: mx.array,
        *,
        text_time: tuple[mx.array, mx.array] | None = None,
    ) -> tuple[list[mx.array], mx.array]:
        if hint_embedding.shape[1:3] != x.shape[1:3]:
            scale = self.config.scale
            given, needed = ((scale * h, scale * w) for _, h, w, _ in (hint_embedding.shape, x.shape))
            raise ValueError(f"the hint's size is {given}, the picture's {needed} (height, width): resize the hint")
        x = self.conv_in(x) + hint_embedding
        skips, middle = self.encode(x, self.embed_time(t, x.dtype, text_time), context)
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
