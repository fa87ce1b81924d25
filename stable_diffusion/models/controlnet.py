"""Networks that read a control image, such as edges or a pose, and add residuals to the UNet's first half.

A ControlNet (Zhang et al. 2023) is a copy of that half and runs at every step; its outputs pass through convolutions
that are initialized with zeros. A union ControlNet is one network for several control types, which may be combined
(xinsir, controlnet-union-sdxl-1.0). A T2I-Adapter (Mou et al. 2023) is small and runs once. Module names are those of
diffusers' ``ControlNetModel``, ``ControlNetUnionModel`` and ``T2IAdapter``; 1×1 convolutions are Linears here.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from .config import Config, EncoderConfig, Supported, UNetConfig
from .layers import Context, Conv2d, Group, LayerNorm
from .resample import pixel_unshuffle
from .unet import Encoder, Residuals, TimestepEmbedding

UNION_TYPES = ("openpose", "depth", "softedge", "canny", "normal", "segment", "tile", "repaint")  # in their order


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EncoderConfig):
    """Hold the config of a ``ControlNetModel`` (Zhang et al. 2023): a UNet's first half, and the image embedding."""

    kind: ClassVar[str] = "controlnet"
    supported: ClassVar[Supported] = EncoderConfig.supported | {
        "_class_name": ("ControlNetModel", "ControlNetUnionModel"),
        "controlnet_conditioning_channel_order": ("rgb", "bgr", None),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    }
    # Widths equal to the first block's, and heads of a trivial attention, see UnionBlock.
    ignored: ClassVar[Collection[str]] = EncoderConfig.ignored | {"num_trans_channel", "num_proj_channel"}
    ignored |= {"num_trans_head"}

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)  # all but the first halve the image
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False  # use only the mean of each residual ("shuffle")
    num_control_type: int | None = None  # control types of a union ControlNet; None for other networks
    num_trans_layer: int = 1

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a ControlNet's JSON; a union ControlNet may have either class name."""
        union = {"num_control_type": 6, "conditioning_embedding_out_channels": (48, 96, 192, 384)}
        return super().from_dict((union if raw.get("_class_name") == "ControlNetUnionModel" else {}) | dict(raw))

    def type_number(self, kind: str | int | None) -> int:
        """Return the number of a control type in a union ControlNet; ValueError for an unknown type."""
        names = [*UNION_TYPES, *map(str, range(len(UNION_TYPES), self.num_control_type))][: self.num_control_type]
        if str(kind) in names:
            return names.index(str(kind))
        if str(kind).isdecimal() and int(kind) < len(names):
            return int(kind)
        hint = "; that one needs the promax variant" if kind in UNION_TYPES else ""
        raise ValueError(f"a union ControlNet needs a control type: {', '.join(names)} or a number, not {kind}{hint}")

    @property
    def scale(self) -> int:
        """Return the pixels of the control image per latent, in each direction: 8 for every published checkpoint."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    def check_fits(self, unet: UNetConfig) -> None:
        """Raise ValueError unless this ControlNet's residuals fit ``unet``."""
        sizes, unet_sizes = (config.projection_class_embeddings_input_dim for config in (self, unet))
        for what, mine, needed in (
            ("latent channels", self.in_channels, unet.out_channels),
            ("maps with channels", self.skip_channels, unet.skip_channels),
            ("prompts of width", max(self.cross_attention_dim), max(unet.cross_attention_dim)),
            ("sizes and pooled prompts of width", sizes, unet_sizes),
        ):
            if mine != needed:
                raise misfit("ControlNet", f"it is for {what} {mine}, the model has {needed}")


def misfit(network: str, reason: str) -> ValueError:
    """Return the error for a ControlNet or T2I-Adapter of another family than the model's."""
    remedy = "use one trained for this family (SD 1, SD 2 or XL)"
    return ValueError(f"the {network} does not fit the model: {reason}; {remedy}")


class UnionBlock(nn.Module):
    """Refine the means of control images [n, C], the tokens of a union ControlNet's transformer.

    The published code attends along the batch, whose rows have equal images: each token attends to itself.
    """

    def __init__(self, width: int):
        super().__init__()
        weight, bias = mx.zeros((3 * width, width)), mx.zeros(3 * width)
        self.attn = Group(in_proj_weight=weight, in_proj_bias=bias, out_proj=nn.Linear(width, width))
        self.ln_1, self.ln_2 = LayerNorm(width), LayerNorm(width)
        self.mlp = Group(c_fc=nn.Linear(width, 4 * width), c_proj=nn.Linear(4 * width, width))

    def __call__(self, x: mx.array) -> mx.array:
        weight, bias = self.attn.in_proj_weight[-x.shape[-1] :], self.attn.in_proj_bias[-x.shape[-1] :]
        x = x + self.attn.out_proj(self.ln_1(x) @ weight.T + bias)
        return x + self.mlp.c_proj(nn.gelu_fast_approx(self.mlp.c_fc(self.ln_2(x))))


class ControlNetModel(Encoder):
    """Compute residuals for the UNet, so that its image follows a control image.

    Args of the call:
        x: the latents [B, h, w, in_channels], without the extra channels of some UNets.
        temb: the embedded timestep, from this network's ``embed_time``.
        context: the encoded prompt, as for the UNet.
        image_embedding: from ``embed``, [B, h, w, C], or [1, h, w, C] for all; in a union ControlNet from ``fuse``.

    Returns:
        (one residual for each skip connection of the UNet, the middle's residual), at scale 1. They have the size of
        the maps, or [B, 1, 1, C] if ``config.global_pool_conditions`` is set.
    """

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        widths, blocks = config.conditioning_embedding_out_channels, []
        for width, out in pairwise(widths):
            blocks += [Conv2d(width, width, 3, padding=1), Conv2d(width, out, 3, stride=2, padding=1)]
        self.controlnet_cond_embedding = Group(
            conv_in=Conv2d(config.conditioning_channels, widths[0], 3, padding=1),
            blocks=blocks,
            conv_out=Conv2d(widths[-1], config.block_out_channels[0], 3, padding=1),
        )
        self.controlnet_down_blocks = [nn.Linear(width, width) for width in config.skip_channels]
        self.controlnet_mid_block = nn.Linear(config.block_out_channels[-1], config.block_out_channels[-1])
        if config.num_control_type is not None:
            width, count = config.block_out_channels[0], config.num_control_type
            self.task_embedding = mx.zeros((count, width))
            self.transformer_layes = [UnionBlock(width) for _ in range(config.num_trans_layer)]  # spelled so in files
            self.spatial_ch_projs = nn.Linear(width, width)
            self.control_add_embedding = TimestepEmbedding(count * config.addition_time_embed_dim, 4 * width)
        self.eval()

    def embed(self, image: mx.array) -> mx.array:
        """Embed a control image [B, H, W, 3] in [0, 1], RGB: -> [B, h, w, C], the same for all steps.

        H and W are ``config.scale`` (8) times the latents'. Raises ValueError for another number of channels.
        """
        channels = self.config.conditioning_channels
        if image.ndim != 4 or image.shape[-1] != channels:
            raise ValueError(f"this ControlNet takes control images [B, H, W, {channels}], not {image.shape}")
        if self.config.controlnet_conditioning_channel_order == "bgr":
            image = image[..., ::-1]
        x, embedding = image.astype(self.conv_in.weight.dtype), self.controlnet_cond_embedding
        for conv in (embedding.conv_in, *embedding.blocks):
            x = nn.silu(conv(x))
        return embedding.conv_out(x)

    def embed_types(self, numbers: Collection[int], dtype: mx.Dtype) -> mx.array:
        """Embed the control types of a union ControlNet: -> [1, T], for ``embed_time`` to add."""
        flags = mx.array([[float(i in numbers) for i in range(self.config.num_control_type)]])
        return self.control_add_embedding(self._waves(flags, self.config.addition_time_embed_dim, dtype))

    def fuse(self, embedded: Sequence[mx.array], numbers: Sequence[int], scales: Sequence[float]) -> mx.array:
        """Combine the embedded images [1, h, w, C] of several control types, each at its scale: -> [1, h, w, C]."""
        fused = []
        for image, number, scale in zip(embedded, numbers, scales, strict=True):
            x = scale * (image.mean(axis=(1, 2)) + self.task_embedding[number])
            for block in self.transformer_layes:
                x = block(x)
            fused.append(scale * (image + self.spatial_ch_projs(x)[:, None, None]))
        return sum(fused[1:], fused[0])

    def __call__(
        self, x: mx.array, temb: mx.array, context: mx.array | Context, image_embedding: mx.array
    ) -> tuple[list[mx.array], mx.array]:
        if image_embedding.shape[1:3] != x.shape[1:3]:
            scale = self.config.scale
            actual, needed = ((scale * h, scale * w) for _, h, w, _ in (image_embedding.shape, x.shape))
            sizes = f"the control image's size is {actual}, the output's {needed} (height, width)"
            raise ValueError(f"{sizes}: resize the control image")
        context = context if isinstance(context, Context) else Context(context)
        skips, middle = self.encode(self.conv_in(x) + image_embedding, temb, context)
        down = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        middle = self.controlnet_mid_block(middle)
        if self.config.global_pool_conditions:
            down, middle = [r.mean(axis=(1, 2), keepdims=True) for r in down], middle.mean(axis=(1, 2), keepdims=True)
        return down, middle


def scaled_residuals(residuals: Residuals, scale: float, guess: bool = False) -> tuple[list[mx.array], mx.array]:
    """Multiply residuals by ``scale``, and in guess mode the finest by 0.1 and each coarser one by more, up to 1.

    In guess mode a control image acts without a prompt (Zhang et al. 2023). Coarse maps hold the content, fine maps the
    positions; residuals of one pixel have no positions. The factors are evenly spaced in their logarithm.
    """
    down, middle = residuals
    count = len(down)
    weighted = guess and down[0].shape[1:3] != (1, 1)
    factors = [10 ** (i / count - 1) if weighted else 1.0 for i in range(count)]
    return [scale * factor * r for factor, r in zip(factors, down, strict=True)], scale * middle


@dataclass(frozen=True)
class T2IAdapterConfig(Config):
    """Hold the config of diffusers' ``T2IAdapter``; ``channels`` are the widths of its stages, the finest first."""

    kind: ClassVar[str] = "adapter"
    supported: ClassVar[Supported] = {"adapter_type": ("full_adapter", "full_adapter_xl", "light_adapter", None)}
    ignored: ClassVar[Collection[str]] = ()

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    in_channels: int = 3
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"

    def check_fits(self, unet: UNetConfig) -> None:
        """Raise ValueError unless each feature fits a down block of ``unet``, and XL's last one the middle."""
        widths = self.channels + self.channels[-1:] * (self.adapter_type == "light_adapter")
        xl = unet.down_block_types[0] == "DownBlock2D"
        needed = unet.block_out_channels + unet.block_out_channels[-1:] * xl
        if widths != needed or (self.adapter_type == "full_adapter_xl") != xl:
            reason = f"its features ({self.adapter_type}) have widths {widths}, the model's {needed}"
            raise misfit("T2I-Adapter", reason)


class AdapterBlock(nn.Module):
    """Halve a map if ``down``, change its width and refine it; light adapters refine a quarter of the width."""

    def __init__(self, in_channels: int, out_channels: int, count: int, *, down: bool, light: bool):
        super().__init__()
        width = out_channels // 4 if light else out_channels
        if light or in_channels != width:
            self.in_conv = nn.Linear(in_channels, width)
        self.resnets = [
            Group(
                block1=Conv2d(width, width, 3, padding=1),
                block2=Conv2d(width, width, 3, padding=1) if light else nn.Linear(width, width),
            )
            for _ in range(count)
        ]
        if light:
            self.out_conv = nn.Linear(width, out_channels)
        self._down = down

    def __call__(self, x: mx.array) -> mx.array:
        if self._down:
            b, h, w, c = x.shape
            x = mx.pad(x, [(0, 0), (0, h % 2), (0, w % 2), (0, 0)], mode="edge")  # for odd sides
            x = x.reshape(b, (h + 1) // 2, 2, (w + 1) // 2, 2, c).mean(axis=(2, 4))
        if "in_conv" in self:
            x = self.in_conv(x)
        for resnet in self.resnets:
            x = x + resnet.block2(nn.relu(resnet.block1(x)))
        return self.out_conv(x) if "out_conv" in self else x


class T2IAdapter(nn.Module):
    """Compute features for the UNet's down blocks, and for XL's middle block, the same at every step."""

    def __init__(self, config: T2IAdapterConfig):
        super().__init__()
        self.config = config
        light, xl = (config.adapter_type == kind for kind in ("light_adapter", "full_adapter_xl"))
        channels, unshuffled = config.channels, config.in_channels * config.downscale_factor**2
        widths = [unshuffled, *channels, channels[-1]] if light else [channels[0], *channels]
        body = [
            AdapterBlock(width, out, config.num_res_blocks, down=i == 2 if xl else i > 0, light=light)
            for i, (width, out) in enumerate(pairwise(widths))
        ]
        self.adapter = Group(body=body)
        if not light:
            self.adapter.conv_in = Conv2d(unshuffled, channels[0], 3, padding=1)

    def embed(self, image: mx.array) -> list[mx.array]:
        """Compute the UNet's ``features`` for a control image [B, H, W, 3] in [0, 1], at scale 1.

        An adapter with ``config.in_channels`` 1 reads the image in grey, which may also be given as [B, H, W, 1].
        Raises ValueError for other shapes, and for sides that are not multiples of ``config.downscale_factor`` (8; XL:
        16).
        """
        factor, channels = self.config.downscale_factor, self.config.in_channels
        if channels == 1 and image.shape[-1] == 3:
            image = (image * mx.array([0.299, 0.587, 0.114], image.dtype)).sum(axis=-1, keepdims=True)  # as PIL does
        if image.ndim != 4 or image.shape[-1] != channels or image.shape[1] % factor or image.shape[2] % factor:
            sides = f"with sides that are multiples of {factor}"
            raise ValueError(f"this adapter takes control images [B, H, W, {channels}] {sides}, not {image.shape}")
        x = pixel_unshuffle(image.astype(self.adapter.body[0].resnets[0].block1.weight.dtype), factor)
        if "conv_in" in self.adapter:
            x = self.adapter.conv_in(x)
        features = []
        for block in self.adapter.body:
            x = block(x)
            features.append(x)
        return features
