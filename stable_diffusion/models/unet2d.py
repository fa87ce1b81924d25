"""The UNet of models without prompts (Ho et al. 2020; Rombach et al. 2022), named as diffusers' ``UNet2DModel``.

It is the UNet of Stable Diffusion with self-attentions instead of transformers, without a prompt.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx

from .config import Supported, UNetConfig
from .layers import Context
from .unet import UNet2DConditionModel, UNetBlock
from .vae import SpatialAttention


@dataclass(frozen=True, kw_only=True)
class UNet2DConfig(UNetConfig):
    """Hold the config of a ``UNet2DModel``."""

    supported: ClassVar[Supported] = UNetConfig.supported | {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
        "add_attention": (True, None),
        "downsample_padding": (0, 1),
        "downsample_type": ("conv", None),
        "upsample_type": ("conv", None),
    }
    per_block: ClassVar[Mapping[str, Any]] = UNetConfig.per_block | {"cross_attention_dim": 1}  # not used
    ignored: ClassVar[Collection[str]] = UNetConfig.ignored | {"num_train_timesteps"}  # only for learned embeddings

    in_channels: int = 3
    out_channels: int = 3

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read ``config.json``; ``attention_head_dim`` is the width of a head: 8 if absent, null means one head."""
        widths, head = raw.get("block_out_channels") or (), raw.get("attention_head_dim", 8)
        cls._check("attention_head_dim", head, int | None)
        if wrong := [width for width in widths if head and width % head]:
            raise ValueError(f"unet config: attention_head_dim={head} does not divide the width {wrong[0]}")
        heads = [width // head if head else 1 for width in widths]
        middle = {"mid_block_type": "UNetMidBlock2DCrossAttn"} if raw.get("mid_block_type", "") is not None else {}
        return super().from_dict({**raw, **middle, "num_attention_heads": heads})


class PlainAttention(SpatialAttention):
    """Compute self-attention instead of a transformer, without a prompt."""

    def __init__(self, config: UNet2DConfig, level: int, layers: int):
        options = {"heads": config.num_attention_heads[level], "eps": config.norm_eps}
        super().__init__(config.block_out_channels[level], config.norm_num_groups, **options)

    def __call__(self, x: mx.array, context: Context, tome_ratio: float) -> mx.array:
        return super().__call__(x)


class UNet2DBlock(UNetBlock):
    """Hold resnets and, in blocks with attention, a self-attention after each."""

    attention = PlainAttention


class UNet2DModel(UNet2DConditionModel):
    """Predict the noise (or the velocity, or the image) in noisy images or latents, without a prompt.

    Each side of ``x`` must be divisible by 2 once for each downsampling. The arguments are those of
    ``UNet2DConditionModel``; ``context`` is ignored.
    """

    block_class = UNet2DBlock

    def __call__(self, x: mx.array, temb: mx.array, context: Context | None = None, **options: Any) -> mx.array:
        return super().__call__(x, temb, context, **options)
