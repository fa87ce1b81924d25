"""IP-Adapter (Ye et al. 2023): image prompts, with the module names of the published files.

An image encoder's features become a few tokens with the width of the encoded prompt. Every cross-attention of the UNet
reads them in addition to the prompt, with separate keys and values.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from .clip_vision import CLIPVisionModelWithProjection
from .config import Config, Supported, UNetConfig
from .controlnet import misfit
from .layers import Group, LayerNorm, gelu, multi_head_attention, split_heads
from .resample import resample

_HEAD_WIDTH = 64  # channels per head of the resampler, in all published files


@dataclass(frozen=True)
class IPAdapterConfig(Config):
    """Hold the config of an IP-Adapter, derived from the tensors of its file."""

    kind: ClassVar[str] = "IP-Adapter"
    supported: ClassVar[Supported] = {"image_proj": ("linear", "mlp", "resampler")}

    image_proj: str  # "linear" (plain, light), "mlp" (full face) or "resampler" (Plus)
    image_width: int  # width of the image encoder's features
    context_width: int  # width of the tokens and of the encoded prompt
    attention_widths: tuple[int, ...]  # channels of the UNet's cross-attentions: down blocks, up blocks, middle
    num_tokens: int = 1  # from an embedding, or from the resampler
    hidden_size: int = 768  # this and the following: of the resampler
    attention_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 4

    def __post_init__(self) -> None:
        if self.attention_size % _HEAD_WIDTH:
            text = f"attention_size={self.attention_size} (supported: multiples of {_HEAD_WIDTH})"
            raise ValueError(f"{self.kind} config: {text}")

    @property
    def reads_hidden_states(self) -> bool:
        """Return whether the features are the states before the last layer, [B, N, C], and not embeddings [B, E]."""
        return self.image_proj != "linear"

    def check_fits(self, unet: UNetConfig) -> None:
        """Raise ValueError unless the cross-attentions of ``unet`` can read the tokens."""
        if self.context_width != (needed := max(unet.cross_attention_dim)):
            raise misfit("IP-Adapter", f"its tokens have {self.context_width} channels, the model's prompts {needed}")
        if self.attention_widths != (widths := tuple(attention_widths(unet))):
            mine, needed = (f"{len(x)} cross-attentions of {sorted(set(x))}" for x in (self.attention_widths, widths))
            raise misfit("IP-Adapter", f"it is for {mine} channels, the model has {needed}")


def attention_widths(unet: UNetConfig) -> Iterator[int]:
    """Yield the channels of each cross-attention, in the order of the published files."""
    widths, layers = unet.block_out_channels, unet.layers_per_block
    down = (unet.down_block_types, widths, unet.transformer_layers_per_block, layers)
    up = (unet.up_block_types, widths[::-1], unet.reverse_transformer_layers_per_block, [n + 1 for n in layers[::-1]])
    for blocks in (down, up):
        for kind, width, depth, count in zip(*blocks, strict=True):
            if kind.startswith("CrossAttn"):
                yield from [width] * (sum(depth) if isinstance(depth, tuple) else depth * count)
    if unet.mid_block_type == "UNetMidBlock2DCrossAttn":
        depth = unet.transformer_layers_per_block[-1]
        yield from widths[-1:] * (depth[0] if isinstance(depth, tuple) else depth)


class ImageProjection(nn.Module):
    """Turn an embedding [B, E] into tokens [B, M, D]."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.proj = nn.Linear(config.image_width, config.num_tokens * config.context_width)
        self.norm = LayerNorm(config.context_width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.norm(self.proj(x).reshape(len(x), -1, self.norm.weight.size))


class MLPProjection(nn.Module):
    """Turn each state [B, N, C] into a token [B, N, D] by a two-layer perceptron."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        width, out = config.image_width, config.context_width
        self.proj = [nn.Linear(width, width), nn.Identity(), nn.Linear(width, out), LayerNorm(out)]  # 1: the activation

    def __call__(self, x: mx.array) -> mx.array:
        first, _, last, norm = self.proj
        return norm(last(gelu(first(x))))


class PerceiverAttention(nn.Module):
    """Attend from latents [B, M, C] to states [B, N, C] and the latents (Jaegle et al. 2021; Alayrac et al. 2022)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array, latents: mx.array) -> mx.array:
        latents = self.norm2(latents)
        q = self.to_q(latents)
        k, v = mx.split(self.to_kv(mx.concatenate([self.norm1(x), latents], axis=1)), 2, axis=-1)
        return self.to_out(multi_head_attention(q, k, v, q.shape[-1] // _HEAD_WIDTH))


class Resampler(nn.Module):
    """Turn any number of states [B, N, C] into tokens [B, M, D] (Plus)."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        width, inner, linear = config.hidden_size, config.intermediate_size, partial(nn.Linear, bias=False)
        self.latents = mx.zeros((1, config.num_tokens, width))
        self.proj_in = nn.Linear(config.image_width, width)
        self.layers = [
            [
                PerceiverAttention(width, config.attention_size),
                [LayerNorm(width), linear(width, inner), nn.Identity(), linear(inner, width)],
            ]
            for _ in range(config.num_hidden_layers)
        ]
        self.proj_out = nn.Linear(width, config.context_width)
        self.norm_out = LayerNorm(config.context_width)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.proj_in(x)
        latents = mx.broadcast_to(self.latents, (len(x), *self.latents.shape[1:]))
        for attend, (norm, first, _, last) in self.layers:
            latents = latents + attend(x, latents)
            latents = latents + last(gelu(first(norm(latents))))
        return self.norm_out(self.proj_out(latents))


_PROJECTIONS = {"linear": ImageProjection, "mlp": MLPProjection, "resampler": Resampler}


class IPAdapter(nn.Module):
    """Hold the projection of image features to tokens, and the projections of tokens in each cross-attention.

    ``encoder`` computes the features. The loader sets it; it is not a part of this network.
    """

    encoder: Any = None

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.config = config
        self.image_proj = _PROJECTIONS[config.image_proj](config)
        self.ip_adapter = []  # files number all attentions; every other one is a cross-attention
        for width in config.attention_widths:
            to_k_ip, to_v_ip = (nn.Linear(config.context_width, width, bias=False) for _ in "kv")
            self.ip_adapter += [nn.Identity(), Group(to_k_ip=to_k_ip, to_v_ip=to_v_ip)]

    @property
    def keys_and_values(self) -> Sequence[tuple[nn.Linear, nn.Linear]]:
        """Return the projections to keys and values, for the cross-attentions of down blocks, up blocks, middle."""
        return [(layer.to_k_ip, layer.to_v_ip) for layer in self.ip_adapter[1::2]]

    def embed(self, features: mx.array) -> mx.array:
        """Turn image features into image tokens [B, M, D]."""
        return self.image_proj(features.astype(self.ip_adapter[1].to_k_ip.weight.dtype))

    def encode(self, encoder: CLIPVisionModelWithProjection, pixels: mx.array) -> tuple[mx.array, mx.array]:
        """Return the tokens of images [B, M, D], and the negative tokens [1, M, D].

        As in training, the negative tokens come from an embedding of zeros, or, with states, from pixels of zeros.
        """
        embeddings, states = encoder(pixels)
        if not self.config.reads_hidden_states:
            return self.embed(embeddings), self.embed(mx.zeros_like(embeddings[:1]))
        _, negative = encoder(mx.zeros_like(pixels[:1]))
        return self.embed(states[-2]), self.embed(negative[-2])


@dataclass
class ImageTokens:
    """Cache the keys and values of image tokens in each cross-attention, the same in all steps of a run."""

    tokens: mx.array  # [B, M, D]
    layers: Mapping[int, tuple[nn.Linear, nn.Linear, float]]  # by number: to keys, to values, scale
    mask: mx.array | None = None  # [H, W], of the output or its latents: 1 where the tokens act, else 0
    _cache: dict[tuple[int, int], tuple[mx.array, mx.array, float | mx.array]] = field(default_factory=dict)

    def keys_and_values(self, number: int, q: mx.array) -> tuple[mx.array, mx.array, float | mx.array]:
        """Return a layer's keys and values for ``q`` [B, heads, N, D], and their weight: a number, or [N, 1].

        D may be padded with zeros, see ``gpu.attention``.
        """
        _, heads, positions, width = q.shape
        if (number, width) not in self._cache:
            *projections, scale = self.layers[number]
            weight = scale if self.mask is None else scale * self._mask(positions).astype(q.dtype)
            pair = [split_heads(project(self.tokens), len(self.tokens), heads) for project in projections]
            pair = [mx.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])]).astype(q.dtype) for x in pair]
            self._cache[number, width] = *pair, weight
        return self._cache[number, width]

    def _mask(self, positions: int) -> mx.array:
        """Resize the mask to a map with this number of positions; the UNet halves sides and rounds up."""
        h, w = self.mask.shape
        while h * w > positions:
            h, w = (h + 1) // 2, (w + 1) // 2
        return resample(self.mask[None, ..., None], (h, w), cubic=True).reshape(-1, 1)
