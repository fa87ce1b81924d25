"""The denoising UNet of SD 1.x, 2.x, XL and their pruned relatives (Rombach et al. 2022; Podell et al. 2023).

Module names are those of diffusers' ``UNet2DConditionModel``. In every block, presence is the switch: a block without
attention has no ``attentions``, the last block has no ``upsamplers``.
"""

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest

import mlx.core as mx
import mlx.nn as nn

from .config import EncoderConfig, UNetConfig
from .kernels import gelu, silu
from .layers import (
    Attention,
    Context,
    Downsample2D,
    GroupNorm,
    LayerNorm,
    ResnetBlock2D,
    Time,
    Times,
    Upsample2D,
    timestep_embedding,
)
from .token_merging import attend_merged

Residuals = tuple[Sequence[mx.array], mx.array]


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on an embedding; ``cond_dim`` adds LCM's guidance embedding (Luo et al. 2023)."""

    def __init__(self, in_dim: int, dim: int, cond_dim: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        if cond_dim is not None:
            self.cond_proj = nn.Linear(cond_dim, in_dim, bias=False)

    def __call__(self, x: mx.array, cond: mx.array | None = None) -> mx.array:
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(silu(self.linear_1(x)))


class GEGLU(nn.Module):
    """Gated GELU (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def __call__(self, x: mx.array) -> mx.array:
        x, gate = mx.split(self.proj(x), 2, axis=-1)
        return x * gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and projection; slot 1 is where training has its dropout."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = [GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each pre-normed and residual.

    The positions of all maps are rows of one matrix, which is what MLX's products take without rearranging anything.
    """

    def __init__(self, dim: int, heads: int, context_dim: int, upcast: bool):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, heads, upcast=upcast)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim, upcast=upcast)
        self.norm3 = LayerNorm(dim)
        self.ff = FeedForward(dim)

    def __call__(self, x: mx.array, b: int, context: Context, merged: tuple[int, int] | None = None) -> mx.array:
        """``x`` [B * N, C], of ``b`` maps -> the same; ``merged`` is a map's size if it is to have fewer positions."""
        y = self.norm1(x)
        x = x + (self.attn1(y, b) if merged is None else self._attend_merged(y, b, merged, context.merging))
        x = x + self.attn2(self.norm2(x), b, context)
        return x + self.ff(self.norm3(x))

    def _attend_merged(self, x: mx.array, b: int, size: tuple[int, int], ratio: float) -> mx.array:
        def attend(y: mx.array) -> mx.array:
            return self.attn1(y.reshape(-1, y.shape[-1]), b).reshape(y.shape)

        return attend_merged(attend, x.reshape(b, -1, x.shape[-1]), size, ratio).reshape(x.shape)


class Transformer2DModel(nn.Module):
    """Transformer over the positions of a feature map; its 1×1 convolutions (SD 1.x) are Linears here.

    The ``outermost`` ones of a UNet have the largest maps, the only ones in which positions are merged.
    """

    outermost = False

    def __init__(self, config: EncoderConfig, dim: int, heads: int, context_dim: int, layers: int):
        super().__init__()
        self.norm = GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = [
            BasicTransformerBlock(dim, heads, context_dim, config.upcast_attention) for _ in range(layers)
        ]
        self.proj_out = nn.Linear(dim, dim)

    def __call__(self, x: mx.array, context: Context) -> mx.array:
        """``x`` [B, H, W, C] -> [B, H, W, C]."""
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x).reshape(b * h * w, c))
        merged = (h, w) if self.outermost and context.merging else None
        for block in self.transformer_blocks:
            y = block(y, b, context, merged)
        return x + self.proj_out(y).reshape(b, h, w, c)


class UNetBlock(nn.Module):
    """Resnets, each followed by a transformer if the block has ``attentions``: the part that all blocks share.

    ``channels`` lists (in, out) of each resnet; ``attention`` is None or (heads, context_dim, layers per transformer).
    """

    def __init__(self, config: EncoderConfig, channels: list[tuple[int, int]], attention: tuple | None):
        super().__init__()
        temb_dim = 4 * config.block_out_channels[0]
        groups, eps = config.norm_num_groups, config.norm_eps
        self.resnets = [ResnetBlock2D(i, o, groups=groups, eps=eps, temb_dim=temb_dim) for i, o in channels]
        if attention is not None:
            heads, context_dim, depths = attention
            dim = channels[-1][1]
            self.attentions = [Transformer2DModel(config, dim, heads, context_dim, depth) for depth in depths]


class DownBlock(UNetBlock):
    """``DownBlock2D`` and ``CrossAttnDownBlock2D``: appends each of its maps to ``skips``.

    A T2I-Adapter's ``feature`` is added where adapters are trained: to the last map before downsampling in a block with
    attention, and to the map after it in a block without.
    """

    def __init__(self, config: EncoderConfig, channels: list[tuple[int, int]], attention: tuple | None, last: bool):
        super().__init__(config, channels, attention)
        if not last:
            self.downsamplers = [Downsample2D(channels[-1][1])]

    def __call__(
        self, x: mx.array, temb: Time, context: Context, skips: list[mx.array], feature: mx.array | None = None
    ) -> mx.array:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if "attentions" in self:
                x = self.attentions[i](x, context)
            skips.append(x)
        if feature is not None and "attentions" in self:
            x = skips[-1] = x + feature
        if "downsamplers" in self:
            x = self.downsamplers[0](x)
            skips.append(x)
        if feature is not None and "attentions" not in self:
            x = skips[-1] = x + feature
        return x


class MidBlock(UNetBlock):
    """``UNetMidBlock2DCrossAttn``, or the single resnet that pruned models keep of it (``UNetMidBlock2D``)."""

    def __call__(self, x: mx.array, temb: Time, context: Context) -> mx.array:
        x = self.resnets[0](x, temb)
        if "attentions" in self:
            x = self.resnets[1](self.attentions[0](x, context), temb)
        return x


class UpBlock(UNetBlock):
    """``UpBlock2D`` and ``CrossAttnUpBlock2D``: takes one of ``skips`` for each resnet.

    What comes into its last resnet is put into ``deep`` if that is empty; otherwise its map takes that place.
    """

    def __init__(self, config: EncoderConfig, channels: list[tuple[int, int]], attention: tuple | None, last: bool):
        super().__init__(config, channels, attention)
        if not last:
            self.upsamplers = [Upsample2D(channels[-1][1])]

    def __call__(
        self, x: mx.array, temb: Time, context: Context, skips: list[mx.array], deep: list[mx.array] | None = None
    ) -> mx.array:
        for i, resnet in enumerate(self.resnets):
            if deep is not None and i == len(self.resnets) - 1:
                if not deep:
                    deep.append(x)
                x = deep[0]
            x = resnet(mx.concatenate([x, skips.pop()], axis=-1), temb)
            if "attentions" in self:
                x = self.attentions[i](x, context)
        if "upsamplers" in self:
            _, h, w, _ = skips[-1].shape
            x = self.upsamplers[0](x, (h, w))
        return x


def _depths(layers: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Transformer layers of each of a block's ``count`` attentions."""
    return layers if isinstance(layers, tuple) else (layers,) * count


class Encoder(nn.Module):
    """The first half of the UNet, which a ControlNet copies: time embedding, down blocks and the middle."""

    def __init__(self, config: EncoderConfig, time_cond_dim: int | None = None):
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        temb_dim = 4 * channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], temb_dim, time_cond_dim)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, temb_dim)
        self.down_blocks = self._build_down(config)
        if config.mid_block_type is not None:
            self.mid_block = self._build_mid(config)

    @staticmethod
    def _build_down(config: EncoderConfig) -> list[DownBlock]:
        blocks, width = [], config.block_out_channels[0]
        for i, (kind, out) in enumerate(zip(config.down_block_types, config.block_out_channels, strict=True)):
            count = config.layers_per_block[i]
            channels = [(width, out)] + [(out, out)] * (count - 1)
            depths = _depths(config.transformer_layers_per_block[i], count)
            attention = (config.num_attention_heads[i], config.cross_attention_dim[i], depths)
            last = i == len(config.block_out_channels) - 1
            blocks.append(DownBlock(config, channels, attention if kind.startswith("CrossAttn") else None, last))
            width = out
        return blocks

    @staticmethod
    def _build_mid(config: EncoderConfig) -> MidBlock:
        width = config.block_out_channels[-1]
        if config.mid_block_type == "UNetMidBlock2D":
            return MidBlock(config, [(width, width)], None)
        depths = _depths(config.transformer_layers_per_block[-1], 1)[:1]
        attention = (config.num_attention_heads[-1], config.cross_attention_dim[-1], depths)
        return MidBlock(config, [(width, width)] * 2, attention)

    def encode(
        self, x: mx.array, temb: Time, context: Context, features: Sequence[mx.array] = ()
    ) -> tuple[list[mx.array], mx.array]:
        """``x`` [B, h, w, C], after ``conv_in`` -> all maps that the second half takes back, and the middle's.

        ``temb`` is what ``embed_time`` gives.
        ``features`` are a T2I-Adapter's, one for each down block and, in XL, one for the middle.
        """
        count = len(self.down_blocks)
        if len(features) > count + ("mid_block" in self):
            raise ValueError(f"{len(features)} features for a UNet of {count} down blocks: the adapter does not fit it")
        skips = [x]
        for block, feature in zip_longest(self.down_blocks, features[:count]):
            x = block(x, temb, context, skips, feature)
        if "mid_block" in self:
            x = self.mid_block(x, temb, context)
            for feature in features[count:]:
                x = x + feature
        return skips, x

    def embed_time(
        self,
        t: float | mx.array,
        dtype: mx.Dtype,
        context: Context,
        text_time: tuple | None = None,
        cond: mx.array | None = None,
    ) -> Time:
        """What each resnet is told of a timestep; those that ``context`` knows are embedded all together, once."""
        if isinstance(t, mx.array):
            return partial(Times(self._embed(t[None], dtype, text_time, cond)).added, 0)
        if t not in context.timesteps:
            return self.embed_time(mx.array([t]), dtype, context, text_time, cond)
        every = mx.array(context.timesteps)[:, None]
        times = context.once(self, lambda: Times(self._embed(every, dtype, text_time, cond)))
        return partial(times.added, context.timesteps.index(t))

    def _embed(self, t: mx.array, dtype: mx.Dtype, text_time: tuple | None, cond: mx.array | None) -> mx.array:
        """Timesteps [S, B or 1], guidance (LCM) and XL's pooled prompt and sizes -> [S, B, 4 * block_out_channels[0]].

        With the SiLU that all resnets would compute.
        """
        config = self.config
        waves = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        temb = timestep_embedding(t.reshape(-1), config.block_out_channels[0], **waves).astype(dtype)
        temb = self.time_embedding(temb.reshape(*t.shape, -1), cond)
        if "add_embedding" in self:
            if text_time is None:
                raise ValueError("this network needs text_time = (pooled prompt, time ids)")
            pooled, ids = text_time
            sizes = timestep_embedding(ids.reshape(-1), config.addition_time_embed_dim, **waves)
            sizes = sizes.reshape(ids.shape[0], -1).astype(dtype)
            temb = temb + self.add_embedding(mx.concatenate([pooled, sizes], axis=-1))
        return silu(temb)


class UNet2DConditionModel(Encoder):
    """Predicts the noise (or the velocity, or the image) in a noisy latent.

    Args of the call:
        x: the latent and its extra channels [B, h, w, in_channels], any h and w.
        t: timesteps [B], or one for all.
        context: encoded prompt [B, M, cross_attention_dim], or a ``Context`` of it, which is kept between calls.
        text_time: XL's (pooled prompt [B, P], time ids [B, 6 or 5]).
        timestep_cond: LCM's guidance embedding [B, time_cond_proj_dim].
        residuals: what ControlNets add to each map that the second half takes back, and to the middle's.
        features: what T2I-Adapters add to each down block and, in XL, to the middle.
        deep: an empty list keeps the map that comes into the last resnet with its transformer. That list, given to
            another call, saves it all that comes before: nothing is computed that no result depends on.

    Returns:
        [B, h, w, out_channels] in the type of ``x``.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config, config.time_cond_proj_dim)
        channels = config.block_out_channels
        self.up_blocks = self._build_up(config)
        outermost = next(i for i, block in enumerate(self.down_blocks) if "attentions" in block)
        for block in (self.down_blocks[outermost], self.up_blocks[-1 - outermost]):
            for transformer in block.get("attentions", ()):
                transformer.outermost = True
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    @staticmethod
    def _build_up(config: UNetConfig) -> list[UpBlock]:
        """Skips come back in reverse: those of a block's own level first, the last from the next finer level."""
        blocks, width = [], config.block_out_channels[-1]
        reverse = config.block_out_channels[::-1]
        for i, (kind, out) in enumerate(zip(config.up_block_types, reverse, strict=True)):
            count = config.layers_per_block[-1 - i] + 1
            finer = reverse[min(i + 1, len(reverse) - 1)]
            skips = [out] * (count - 1) + [finer]
            channels = [(before + skip, out) for before, skip in zip([width] + [out] * (count - 1), skips, strict=True)]
            depths = _depths(config.reverse_transformer_layers_per_block[i], count)
            attention = (config.num_attention_heads[-1 - i], config.cross_attention_dim[-1 - i], depths)
            last = i == len(reverse) - 1
            blocks.append(UpBlock(config, channels, attention if kind.startswith("CrossAttn") else None, last))
            width = out
        return blocks

    def __call__(
        self,
        x: mx.array,
        t: float | mx.array,
        context: mx.array | Context,
        *,
        text_time: tuple[mx.array, mx.array] | None = None,
        timestep_cond: mx.array | None = None,
        residuals: Residuals | None = None,
        features: Sequence[mx.array] = (),
        deep: list[mx.array] | None = None,
    ) -> mx.array:
        context = context if isinstance(context, Context) else Context(context)
        temb = self.embed_time(t, x.dtype, context, text_time, timestep_cond)
        skips, x = self.encode(self.conv_in(x), temb, context, features)
        if residuals is not None:
            down, middle = residuals
            if len(down) != len(skips):
                raise ValueError(
                    f"{len(down)} residuals for a UNet of {len(skips)} maps: the ControlNet does not fit it"
                )
            skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
            x = x + middle
        for block in self.up_blocks[:-1]:
            x = block(x, temb, context, skips)
        x = self.up_blocks[-1](x, temb, context, skips, deep)
        return self.conv_out(self.conv_norm_out.activated(x))
