"""The dense prediction transformer (Ranftl et al. 2021), which estimates the inverse depth of an image.

Inverse depth is larger for nearer objects. This is the hybrid that MiDaS 3 calls DPT-Hybrid and that Stable
Diffusion 2 was trained with, named as transformers' ``DPTForDepthEstimation``. A ResNet gives maps of three sizes; a
vision transformer reads the smallest; the two larger ones and two of its states are fused, the coarsest first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import mlx.core as mx
import mlx.nn as nn

from .bit import BitBackbone, BitConfig
from .config import Config, Supported
from .layers import Group, multi_head_attention
from .resample import resample

_PATCH = 16  # pixels per token: the reduction of the backbone


@dataclass(frozen=True)
class DPTConfig(Config):
    """Hold the config of a hybrid depth estimator; names and defaults of transformers' ``DPTConfig``."""

    kind: ClassVar[str] = "depth estimator"
    supported: ClassVar[Supported] = {
        "is_hybrid": (True,),
        "patch_size": (_PATCH,),
        "num_channels": (3,),
        "hidden_act": ("gelu",),
        "readout_type": ("project",),
        "neck_ignore_stages": ((0, 1),),
        "head_in_index": (-1,),
        "add_projection": (False, None),
        "use_batch_norm_in_fusion_residual": (False, None),
        "use_bias_in_fusion_residual": (True, None),
    }

    backbone_config: BitConfig
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    image_size: int = 384
    backbone_out_indices: tuple[int, ...] = (8, 11)  # layers whose states are used: the last two of a file's four
    neck_hidden_sizes: tuple[int, ...] = (96, 192, 384, 768)
    fusion_hidden_size: int = 256

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read ``depth_estimator/config.json``; ValueError names every key with an unsupported value."""
        factors = tuple(raw.get("reassemble_factors") or (4, 2, 1, 0.5))[2:]
        if factors != (1, 0.5):  # the first two are not used
            raise ValueError(f"depth estimator config: reassemble_factors end in {factors!r} (supported: (1, 0.5))")
        backbone = raw.get("backbone_config")
        fields = {
            "is_hybrid": raw.get("is_hybrid", False),
            "backbone_out_indices": (raw.get("backbone_out_indices") or (2, 5, 8, 11))[2:],
            "backbone_config": BitConfig() if backbone is None else BitConfig.from_dict(backbone),
        }
        return super().from_dict({**raw, **fields})

    def __post_init__(self) -> None:
        kind, sizes, layers = "depth estimator config", self.neck_hidden_sizes, self.backbone_out_indices
        if self.image_size % (2 * _PATCH):
            raise ValueError(f"{kind}: image_size={self.image_size!r} (supported: multiples of {2 * _PATCH})")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{kind}: width {self.hidden_size} does not divide into {self.num_attention_heads} heads")
        if len(layers) != 2 or not 0 <= layers[0] < layers[1] < self.num_hidden_layers:
            raise ValueError(f"{kind}: of {self.num_hidden_layers} layers, backbone_out_indices end in {layers!r}")
        if len(sizes) != 4 or sizes[:2] != self.backbone_config.hidden_sizes[:2]:
            widths = self.backbone_config.hidden_sizes[:2]
            raise ValueError(f"{kind}: neck_hidden_sizes={sizes!r} (supported: four, of which the first are {widths})")


class ViTLayer(nn.Module):
    """Run a pre-norm transformer layer (Dosovitskiy et al. 2021) on tokens [B, N, C]."""

    def __init__(self, config: DPTConfig):
        super().__init__()
        c, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        projections = {name: nn.Linear(c, c, bias=config.qkv_bias) for name in ("query", "key", "value")}
        self.layernorm_before = nn.LayerNorm(c, eps=eps)
        self.attention = Group(attention=Group(**projections), output=Group(dense=nn.Linear(c, c)))
        self.layernorm_after = nn.LayerNorm(c, eps=eps)
        self.intermediate = Group(dense=nn.Linear(c, inner))
        self.output = Group(dense=nn.Linear(inner, c))
        self._heads = config.num_attention_heads

    def __call__(self, x: mx.array) -> mx.array:
        project, y = self.attention.attention, self.layernorm_before(x)
        y = multi_head_attention(project.query(y), project.key(y), project.value(y), self._heads)
        x = x + self.attention.output.dense(y)
        return x + self.output.dense(nn.gelu(self.intermediate.dense(self.layernorm_after(x))))


class HybridTransformer(nn.Module):
    """Compute the backbone's first two maps and two layers' states [B, N + 1, C] from pixels [B, S, S, 3]."""

    def __init__(self, config: DPTConfig):
        super().__init__()
        c, positions = config.hidden_size, (config.image_size // _PATCH) ** 2 + 1
        self.embeddings = Group(
            backbone=BitBackbone(config.backbone_config),
            projection=nn.Linear(config.backbone_config.hidden_sizes[-1], c),
            cls_token=mx.zeros((1, 1, c)),
            position_embeddings=mx.zeros((1, positions, c)),
        )
        self.encoder = Group(layer=[ViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(c, eps=config.layer_norm_eps)  # stored, not used for depth
        self._layers = config.backbone_out_indices

    def __call__(self, x: mx.array) -> tuple[list[mx.array], list[mx.array]]:
        embeddings = self.embeddings
        *maps, last = embeddings.backbone(x)
        tokens = embeddings.projection(last.flatten(1, 2))
        first = mx.broadcast_to(embeddings.cls_token, (len(tokens), 1, tokens.shape[-1]))
        x = mx.concatenate([first, tokens], axis=1) + embeddings.position_embeddings
        states = []
        for i, layer in enumerate(self.encoder.layer[: self._layers[-1] + 1]):
            x = layer(x)
            if i in self._layers:
                states.append(x)
        return maps, states


class ResidualUnit(nn.Module):
    """Run two convolutions, each after its activation, and add the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.convolution2 = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.convolution2(nn.relu(self.convolution1(nn.relu(x))))


class FusionLayer(nn.Module):
    """Add a finer map to the ones fused so far, and double height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.projection = nn.Linear(channels, channels)
        self.residual_layer1 = ResidualUnit(channels)  # unused in the coarsest layer
        self.residual_layer2 = ResidualUnit(channels)

    def __call__(self, x: mx.array, finer: mx.array | None = None) -> mx.array:
        if finer is not None:
            x = x + self.residual_layer1(finer)
        # Interpolation weights sum to one, so the projection may come first, on a quarter of the pixels.
        return double(self.projection(self.residual_layer2(x)))


class Neck(nn.Module):
    """Fuse maps of four sizes, finest first, into one map [B, 2H, 2W, C], twice as large as the finest.

    The first two are the backbone's. Transformer states [B, N + 1, C] become the others; the last one is halved.
    """

    def __init__(self, config: DPTConfig):
        super().__init__()
        c, width, sizes = config.hidden_size, config.fusion_hidden_size, config.neck_hidden_sizes
        layers = [Group(projection=nn.Linear(c, size)) for size in sizes[2:]]
        layers[-1].resize = nn.Conv2d(sizes[-1], sizes[-1], 3, stride=2, padding=1)
        self.reassemble_stage = Group(
            readout_projects=[nn.Identity(), nn.Identity(), *([nn.Linear(2 * c, c)] for _ in layers)],
            layers=[nn.Identity(), nn.Identity(), *layers],
        )
        self.convs = [nn.Conv2d(size, width, 3, padding=1, bias=False) for size in sizes]
        self.fusion_stage = Group(layers=[FusionLayer(width) for _ in sizes])

    def __call__(self, maps: list[mx.array], states: list[mx.array]) -> mx.array:
        stage = self.reassemble_stage
        for x, readout, layer in zip(states, stage.readout_projects[2:], stage.layers[2:], strict=True):
            tokens = x[:, 1:]
            picture = mx.broadcast_to(x[:, :1], tokens.shape)
            tokens = layer.projection(nn.gelu(readout[0](mx.concatenate([tokens, picture], axis=-1))))
            side = round(tokens.shape[1] ** 0.5)
            y = tokens.reshape(len(x), side, side, -1)
            maps = [*maps, layer.resize(y) if "resize" in layer else y]
        maps = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        coarsest, *others = self.fusion_stage.layers
        x = coarsest(maps.pop())
        for layer in others:
            x = layer(x, maps.pop())
        return x


class DPTForDepthEstimation(nn.Module):
    """Estimate inverse depth [B, S, S], from 0 up, of pixels [B, S, S, 3] in [-1, 1]; S is ``config.image_size``."""

    def __init__(self, config: DPTConfig):
        super().__init__()
        self.config = config
        self.dpt = HybridTransformer(config)
        self.neck = Neck(config)
        width, none = config.fusion_hidden_size, nn.Identity()
        convolutions = nn.Conv2d(width, width // 2, 3, padding=1), nn.Conv2d(width // 2, 32, 3, padding=1)
        self.head = Group(head=[convolutions[0], none, convolutions[1], none, nn.Linear(32, 1)])

    def __call__(self, x: mx.array) -> mx.array:
        size = self.config.image_size
        if x.shape[1:] != (size, size, 3):
            raise ValueError(f"the depth estimator takes pixels [B, {size}, {size}, 3], not {x.shape}; resize them")
        first, _, second, _, last = self.head.head
        x = double(first(self.neck(*self.dpt(x))))
        return nn.relu(last(nn.relu(second(x))))[..., 0]


def double(x: mx.array) -> mx.array:
    """Double height and width, with aligned corners."""
    return resample(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)
