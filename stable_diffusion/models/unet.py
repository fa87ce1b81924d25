"""The denoising UNet of SD 1, SD 2, XL and their pruned relatives (Rombach et al. 2022; Podell et al. 2023).

Module names are those of diffusers' ``UNet2DConditionModel``. In every block, presence is the switch: a block without
attention has no ``attentions``, the last block has no ``upsamplers``.
"""

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, zip_longest

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.utils import checkpoint

from . import gpu
from .config import EncoderConfig, UNetConfig
from .layers import Attention, Context, Conv2d, Downsample2D, Group, GroupNorm, LayerNorm, ResnetBlock2D, gelu
from .token_merging import attend_merged
from .upsampling import Upsample2D

Residuals = tuple[Sequence[mx.array], mx.array]


def timestep_embedding(t: mx.array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> mx.array:
    """Embed timesteps ``t`` [N] in waves -> [N, dim] float32 (Ho et al. 2020; Vaswani et al. 2017, sec. 3.5).

    Frequencies are rounded to float32 as in the training code: at t = 999 the last bit makes a difference of 6e-5.
    """
    half = dim // 2
    scale = array("f", [-math.log(10000.0)])[0]
    exponents = array("f", (product / (half - freq_shift) for product in array("f", (scale * i for i in range(half)))))
    angles = t.astype(mx.float32)[:, None] * mx.array([math.exp(e) for e in exponents])
    waves = (mx.cos(angles), mx.sin(angles)) if flip_sin_to_cos else (mx.sin(angles), mx.cos(angles))
    return mx.pad(mx.concatenate(waves, axis=-1), [(0, 0), (0, dim % 2)])


class TimestepEmbedding(nn.Module):
    """Run a two-layer perceptron on an embedding; ``cond_dim`` adds LCM's guidance (Luo et al. 2023)."""

    def __init__(self, in_dim: int, dim: int, cond_dim: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        if cond_dim is not None:
            self.cond_proj = nn.Linear(cond_dim, in_dim, bias=False)

    def __call__(self, x: mx.array, cond: mx.array | None = None) -> mx.array:
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(nn.silu(self.linear_1(x)))


class BasicTransformerBlock(nn.Module):
    """Compute self-attention, cross-attention to the prompt and feed-forward, each pre-normed and residual.

    The positions of all maps are the rows of one matrix, so products need no rearrangement.
    """

    def __init__(self, dim: int, heads: int, context_dim: int, upcast: bool):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn1 = Attention(dim, heads, upcast=upcast)
        self.norm2 = LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim, upcast=upcast)
        self.norm3 = LayerNorm(dim)
        # Slot 1 is diffusers' dropout.
        self.ff = Group(net=[Group(proj=nn.Linear(dim, 8 * dim)), nn.Identity(), nn.Linear(4 * dim, dim)])

    def __call__(self, x: mx.array, size: tuple[int, int, int], context: Context, tome_ratio: float = 0.0) -> mx.array:
        """``x`` [B * H * W, C], the positions of maps of ``size`` (B, H, W) -> the same."""
        y = self.norm1(x)
        is_perturbed = context.is_perturbed if self.attn1.number in context.perturbed_layers else None
        attend = partial(self.attn1, is_perturbed=is_perturbed)
        x = x + (attend_merged(attend, y, size, tome_ratio) if tome_ratio else attend(y, size[0]))
        x = x + self.attn2(self.norm2(x), size[0], context)
        project, _, out = self.ff.net
        y, gate = mx.split(project.proj(self.norm3(x)), 2, axis=-1)
        return x + out(gpu.geglu(y, gate) if gpu.is_default() else y * gelu(gate))  # GEGLU (Shazeer 2020)


class Transformer2DModel(nn.Module):
    """Run transformer blocks over the positions of a map; its 1×1 convolutions (SD 1) are Linears here.

    With ``recomputes`` a gradient keeps only the inputs of the blocks and computes each again (Chen et al. 2016).
    """

    recomputes = False

    def __init__(self, config: EncoderConfig, level: int, layers: int):
        super().__init__()
        dim, heads = config.block_out_channels[level], config.num_attention_heads[level]
        options = dim, heads, config.cross_attention_dim[level], config.upcast_attention
        self.norm = GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.proj_in = nn.Linear(dim, dim)
        self.transformer_blocks = [BasicTransformerBlock(*options) for _ in range(layers)]
        self.proj_out = nn.Linear(dim, dim)

    def __call__(self, x: mx.array, context: Context, tome_ratio: float = 0.0) -> mx.array:
        """[B, H, W, C] -> the same."""
        *size, c = x.shape
        y = self.proj_in(self.norm(x).reshape(-1, c))
        for block in self.transformer_blocks:
            if self.recomputes:  # arrays with gradients are arguments; the cache would keep those of one pass
                y = checkpoint(block, partial(self._run, block, tuple(size), context, tome_ratio))(y, context.encoded)
            else:
                y = block(y, tuple(size), context, tome_ratio)
        return x + self.proj_out(y).reshape(x.shape)

    @staticmethod
    def _run(block: BasicTransformerBlock, size: tuple, context: Context, ratio: float, y: mx.array, encoded: mx.array):
        return block(y, size, replace(context, encoded=encoded, _cache={}), ratio)


class UNetBlock(nn.Module):
    """Hold the layers of a block: resnets and, with ``attentions``, a transformer after each.

    The middle has one attention between two resnets, or in pruned models one resnet.

    Args:
        level: the block's place in the tuples of ``config``.
        channels: (in, out) of each resnet.
        layers: number of layers of each transformer, or one number for all; None without attention.
        resample: "down" or "up" if the block changes the size at its end.
    """

    attention: type[nn.Module] = Transformer2DModel

    def __init__(
        self,
        config: EncoderConfig,
        level: int,
        channels: Iterable[tuple[int, int]],
        layers: int | tuple[int, ...] | None,
        resample: str | None = None,
    ):
        super().__init__()
        width, temb_dim = config.block_out_channels[level], 4 * config.block_out_channels[0]
        groups, eps = config.norm_num_groups, config.norm_eps
        self.resnets = [ResnetBlock2D(i, o, groups=groups, eps=eps, temb_dim=temb_dim) for i, o in channels]
        if layers is not None:
            depths = layers if isinstance(layers, tuple) else (layers,) * len(self.resnets)
            self.attentions = [self.attention(config, level, depth) for depth in depths]
        if resample == "down":
            self.downsamplers = [Downsample2D(width, pad_end=config.downsample_padding == 0)]
        elif resample == "up":
            self.upsamplers = [Upsample2D(width)]

    def layer(self, i: int, x: mx.array, temb: mx.array, context: Context, tome_ratio: float) -> mx.array:
        """Run resnet ``i``, with its transformer if there is one."""
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, context, tome_ratio) if "attentions" in self else x


class Encoder(nn.Module):
    """Hold the first half of the UNet, which a ControlNet copies: time embedding, down blocks and the middle."""

    block_class = UNetBlock

    def __init__(self, config: EncoderConfig, time_cond_dim: int | None = None):
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.transformer_layers_per_block
        temb_dim = 4 * widths[0]
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], temb_dim, time_cond_dim)
        if config.addition_embed_type == "text_time":
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, temb_dim)
        self.down_blocks = []
        for i, (before, width) in enumerate(pairwise([widths[0], *widths])):
            channels = pairwise([before] + [width] * config.layers_per_block[i])
            depths = layers[i] if "Attn" in config.down_block_types[i] else None
            resample = None if i == len(widths) - 1 else "down"
            self.down_blocks.append(self.block_class(config, i, channels, depths, resample))
        if config.mid_block_type == "UNetMidBlock2D":
            self.mid_block = self.block_class(config, -1, [(widths[-1], widths[-1])], None)
        elif config.mid_block_type is not None:
            depth = layers[-1][0] if isinstance(layers[-1], tuple) else layers[-1]
            self.mid_block = self.block_class(config, -1, [(widths[-1], widths[-1])] * 2, (depth,))
        # The first block with attention has the largest maps; only their tokens are merged.
        self._outermost = next((i for i, block in enumerate(self.down_blocks) if "attentions" in block), None)

    def embed_time(
        self,
        t: float | mx.array,
        dtype: mx.Dtype,
        text_time: tuple[mx.array, mx.array] | None = None,
        guidance: mx.array | None = None,
        added: mx.array | None = None,
    ) -> mx.array:
        """Embed a timestep for the resnets: -> [B or 1, 4 * block_out_channels[0]], with their common SiLU.

        Args:
            t: the timestep of all rows, or timesteps [B].
            text_time: (pooled prompt [B, P], time ids [B, 6 or 5]), required by XL.
            guidance: LCM's guidance embedding [B, time_cond_proj_dim].
            added: another embedding of the result's shape, to add before the SiLU.
        """
        t = t if isinstance(t, mx.array) else mx.array([t])
        temb = self.time_embedding(self._waves(t[:, None], self.config.block_out_channels[0], dtype), guidance)
        if "add_embedding" in self:
            if text_time is None:
                raise ValueError("this network needs text_time = (pooled prompt, time ids)")
            pooled, ids = text_time
            sizes = self._waves(ids, self.config.addition_time_embed_dim, dtype)
            temb = temb + self.add_embedding(mx.concatenate([pooled, sizes], axis=-1))
        return nn.silu(temb if added is None else temb + added)

    def _waves(self, numbers: mx.array, dim: int, dtype: mx.Dtype) -> mx.array:
        """[B, N] -> [B, N * dim], as this network embeds timesteps."""
        waves = {"flip_sin_to_cos": self.config.flip_sin_to_cos, "freq_shift": self.config.freq_shift}
        return timestep_embedding(numbers.reshape(-1), dim, **waves).reshape(len(numbers), -1).astype(dtype)

    def encode(
        self, x: mx.array, temb: mx.array, context: Context, features: Sequence[mx.array] = (), tome_ratio: float = 0.0
    ) -> tuple[list[mx.array], mx.array]:
        """Run the first half: ``x`` [B, h, w, C], after ``conv_in`` -> (skips for the second half, the middle's map).

        ``features`` are a T2I-Adapter's, one for each down block and, in XL, one for the middle. As in training they
        are added before downsampling in a block with attention, and after downsampling in one without.
        """
        count = len(self.down_blocks)
        if len(features) > count + ("mid_block" in self):
            raise ValueError(f"{len(features)} features for {count} down blocks: the adapter does not fit this UNet")
        skips = [x]
        for i, (block, feature) in enumerate(zip_longest(self.down_blocks, features[:count])):
            for j in range(len(block.resnets)):
                x = block.layer(j, x, temb, context, tome_ratio if i == self._outermost else 0.0)
                skips.append(x)
            if feature is not None and "attentions" in block:
                x = skips[-1] = x + feature
            if "downsamplers" in block:
                x = block.downsamplers[0](x)
                skips.append(x)
            if feature is not None and "attentions" not in block:
                x = skips[-1] = x + feature
        if "mid_block" in self:
            x = self.mid_block.layer(0, x, temb, context, 0.0)
            if "attentions" in self.mid_block:
                x = self.mid_block.resnets[1](x, temb)
            for feature in features[count:]:
                x = x + feature
        return skips, x


def freeu(x: mx.array, skip: mx.array, backbone: float, low: float) -> tuple[mx.array, mx.array]:
    """Scale the inputs of a resnet in the second half, the map and the skip (FreeU, Si et al. 2024).

    ``backbone`` scales the first half of the channels of ``x`` [B, H, W, C]. ``low`` scales the frequencies
    0 and -1 of ``skip`` along both axes, as in the authors' code with a threshold of 1.
    """
    factors = [backbone] * (x.shape[-1] // 2)
    factors += [1.0] * (x.shape[-1] - len(factors))
    rows, columns = (mx.array([i in (0, n - 1) for i in range(n)]) for n in skip.shape[1:3])
    mask = mx.where((rows[:, None] & columns)[..., None], low, 1.0)
    spectrum = mask * mx.fft.fft2(skip.astype(mx.float32), axes=(1, 2))
    filtered = mx.fft.ifft2(spectrum, axes=(1, 2)).real
    return x * mx.array(factors, dtype=x.dtype), filtered.astype(skip.dtype)


class UNet2DConditionModel(Encoder):
    """Predict the noise (or the velocity, or the image) in noisy latents: -> [B, h, w, out_channels], as ``x``.

    Args of the call:
        x: the latents and their extra channels [B, h, w, in_channels], any h and w.
        temb: the embedded timestep, from ``embed_time``.
        context: the encoded prompt [B, M, cross_attention_dim], or its ``Context``, which caches keys and values.
        residuals: ControlNet residuals, for each skip connection and for the middle's map.
        features: T2I-Adapter features, see ``encode``.
        cache: list for DeepCache. A call with an empty list stores the input map of the last resnet. A call with this
            map computes only the last resnet and its transformer.
        tome_ratio: fraction of tokens to merge in the largest self-attentions, see ``token_merging``.
        freeu_scales: (b1, b2, s1, s2), the factors of backbone and skips in the first and the second up block, see
            ``freeu``.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config, config.time_cond_proj_dim)
        widths, skips = config.block_out_channels[::-1], list(config.skip_channels)
        self.up_blocks = []
        for i, (before, width) in enumerate(pairwise([widths[0], *widths])):
            # Each resnet takes the last remaining skip.
            channels = [(x + skips.pop(), width) for x in [before] + [width] * config.layers_per_block[-1 - i]]
            attends = "Attn" in config.up_block_types[i]
            depths = config.reverse_transformer_layers_per_block[i] if attends else None
            resample = None if i == len(widths) - 1 else "up"
            self.up_blocks.append(self.block_class(config, -1 - i, channels, depths, resample))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[-1], config.norm_eps)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)
        self.eval()  # keys and values of a prompt are cached between calls, until train()

    def __call__(
        self,
        x: mx.array,
        temb: mx.array,
        context: mx.array | Context,
        *,
        residuals: Residuals | None = None,
        features: Sequence[mx.array] = (),
        cache: list[mx.array] | None = None,
        tome_ratio: float = 0.0,
        freeu_scales: Sequence[float] | None = None,
    ) -> mx.array:
        context = context if isinstance(context, Context) else Context(context)
        skips, x = self.encode(self.conv_in(x), temb, context, features, tome_ratio)
        if residuals is not None:
            down, middle = residuals
            if len(down) != len(skips):
                raise ValueError(f"{len(down)} residuals for {len(skips)} maps: the ControlNet does not fit this UNet")
            skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
            x = x + middle
        last = len(self.up_blocks) - 1
        for i, block in enumerate(self.up_blocks):
            for j in range(len(block.resnets)):
                if cache is not None and i == last and j == len(block.resnets) - 1:
                    if not cache:
                        cache.append(x)
                    x = cache[0]
                skip = skips.pop()
                if freeu_scales is not None and i < 2:
                    x, skip = freeu(x, skip, *freeu_scales[i::2])
                x = mx.concatenate([x, skip], axis=-1)
                x = block.layer(j, x, temb, context, tome_ratio if last - i == self._outermost else 0.0)
            if "upsamplers" in block:
                x = block.upsamplers[0](x, skips[-1].shape[1:3])
        return self.conv_out(self.conv_norm_out.activated(x))


def attentions(unet: UNet2DConditionModel, kind: str) -> dict[tuple[str, ...], int]:
    """Return the numbers of the "self"- or "cross"-attentions by the words of their paths: down blocks, up, middle."""
    suffix = {"self": ".attn1", "cross": ".attn2"}[kind]
    layers = {_words(path): layer.number for path, layer in unet.named_modules() if path.endswith(suffix)}

    def place(words: tuple[str, ...]) -> list[int]:
        return [("down", "up", "mid").index(words[0]), *(int(word) for word in words if word.isdigit())]

    return {words: layers[words] for words in sorted(layers, key=place)}


def find_attentions(unet: UNet2DConditionModel, names: Sequence[str], kind: str = "self") -> set[int]:
    """Return the numbers of the attentions in parts of a UNet: "mid", "down_blocks.1", "up.block_0.attentions_2".

    Parts have the names of modules; "block" and "blocks" may be omitted and numbers may follow any sign. Raises
    ValueError for a part without attention of the ``kind``, see :func:`attentions`.
    """
    layers = attentions(unet, kind)
    found: set[int] = set()
    for name in names:
        words = _words(name)
        inside = {number for path, number in layers.items() if words and path[: len(words)] == words}
        if not inside:
            blocks = sorted({".".join(path[: 1 + path[1].isdigit()]) for path in layers})
            remedy = f"choose from {', '.join(blocks)}, or parts of them"
            raise ValueError(f"the UNet has no {kind}-attention in {name!r}; {remedy}")
        found |= inside
    return found


def _words(path: str) -> tuple[str, ...]:
    return tuple(word for word in re.findall(r"[a-z]+|\d+", path) if word not in ("block", "blocks"))
