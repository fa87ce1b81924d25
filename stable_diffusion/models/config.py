"""Read the configurations of a checkpoint's parts from its JSON files.

Every class keeps the names that diffusers writes. What differs between files is settled here: a number for all blocks
becomes one number per block, an absent key takes diffusers' default. A key that changes the result in a way that this
library does not compute is refused by name.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

Supported = Mapping[str, Collection[Any]]  # the values that are computed here

# Keys about files, training, storage and the moving average of the weights; they change nothing that is computed.
_WITHOUT_EFFECT = {"sample_size", "dropout", "attention_dropout", "initializer_range", "initializer_factor"}
_WITHOUT_EFFECT |= {"model_type", "decay", "min_decay", "inv_gamma", "power", "use_ema_warmup", "update_after_step"}
_WITHOUT_EFFECT |= {"optimization_step"}


@contextmanager
def readable(kind: str) -> Iterator[None]:
    """Turn Python's errors about JSON values of the wrong type (a text for a number, ...) into a ValueError."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{kind}: a value is not what it should be ({reason}); take it from its source") from error


def check(kind: str, raw: Mapping[str, Any], supported: Supported, known: Collection[str] | None = None) -> None:
    """Raise ValueError for values that are not ``supported``, and for unknown keys that are not off.

    ``known`` are the other keys that have a meaning here; None lets all other keys pass.
    """
    problems = []
    for key, value in raw.items():
        if key in supported:
            if (tuple(value) if isinstance(value, list) else value) not in supported[key]:
                problems.append(f"{key}={value!r} (supported: {' or '.join(map(repr, supported[key]))})")
        elif known is not None and key not in known and not key.startswith("_") and value not in (None, False, [], ()):
            problems.append(f"{key}={value!r} (unknown)")
    if problems:
        raise ValueError(f"{kind} config: this library cannot compute {'; '.join(problems)}")


def fields_of(cls: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says about the fields of a config class, lists as tuples; null is as good as absent."""
    present = {key: raw[key] for key in cls.__dataclass_fields__ if raw.get(key) is not None}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in present.items()}


def _per_block(kind: str, key: str, value: Any, count: int) -> tuple:
    """Repeat one value for each block; a list must have ``count`` entries, and nested ones become tuples."""
    if not isinstance(value, (list, tuple)):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{kind} config: {key}={value!r} has {len(value)} entries for {count} blocks")
    return tuple(tuple(v) if isinstance(v, (list, tuple)) else v for v in value)


def _required(kind: str, raw: Mapping[str, Any], *keys: str) -> None:
    if missing := [key for key in keys if raw.get(key) is None]:
        raise ValueError(f"{kind} config: missing {', '.join(missing)}")


@dataclass(frozen=True)
class CLIPTextConfig:
    """Hold the config of a CLIP text encoder (Radford et al. 2021); names and defaults of transformers' class."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 512
    with_projection: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "CLIPTextConfig":
        """Read a text encoder's ``config.json``; ValueError for an activation or model class not computed here."""
        architectures = tuple(raw.get("architectures") or ("CLIPTextModel",))
        for name in architectures:
            if name not in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"):
                raise ValueError(f"text encoder config: architecture {name!r} is not a CLIP text model")
        check("text encoder", raw, {"hidden_act": ("quick_gelu", "gelu")})
        return cls(**fields_of(cls, raw) | {"with_projection": "CLIPTextModelWithProjection" in architectures})


_BLOCK_TYPES: Supported = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

# diffusers options outside the family: only the value that means "off" is computed here.
_UNET_SUPPORTED: Supported = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": ("text_time", None),
    "attention_type": ("default", None),
    "center_input_sample": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "only_cross_attention": (False, None),
    "resnet_out_scale_factor": (1, 1.0, None),
    "resnet_time_scale_shift": ("default", None),
    "time_embedding_type": ("positional", None),
    "addition_embed_type_num_heads": (64, None),
    "mid_block_only_cross_attention": (None, False),
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Hold the config of a UNet's first half, which a ControlNet copies. Tuples run from the finest block on.

    ``num_attention_heads`` is the number of heads; checkpoints store it under the misleading name
    ``attention_head_dim``. ``transformer_layers_per_block`` holds an int, or a tuple with one entry per attention of
    the block.
    """

    _kind: ClassVar[str]
    _supported: ClassVar[Supported]

    in_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    down_block_types: tuple[str, ...]
    mid_block_type: str | None
    num_attention_heads: tuple[int, ...]
    cross_attention_dim: tuple[int, ...]
    transformer_layers_per_block: tuple[int | tuple[int, ...], ...]
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    upcast_attention: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def _read(cls, raw: Mapping[str, Any], *required: str) -> dict[str, Any]:
        """Read all fields of a file that has every key; ValueError names every key that cannot be computed."""
        _required(cls._kind, raw, "block_out_channels", "down_block_types", "cross_attention_dim", *required)
        known = cls.__dataclass_fields__.keys() | _WITHOUT_EFFECT | {"attention_head_dim"}
        check(cls._kind, raw, cls._supported, known)
        heads = raw.get("attention_head_dim")
        per_block = {
            "layers_per_block": 2,
            "down_block_types": None,
            "up_block_types": None,
            "num_attention_heads": 8 if heads is None else heads,
            "cross_attention_dim": None,
            "transformer_layers_per_block": 1,
            "reverse_transformer_layers_per_block": None,
        }
        fields = {"in_channels": 4, "mid_block_type": "UNetMidBlock2DCrossAttn"} | fields_of(cls, raw)
        if "mid_block_type" in raw:
            fields["mid_block_type"] = raw["mid_block_type"]  # None is a value
        for key, default in per_block.items():
            value = default if raw.get(key) is None else raw[key]
            if value is not None:
                fields[key] = _per_block(cls._kind, key, value, len(raw["block_out_channels"]))
        return fields

    def __post_init__(self) -> None:
        for key, supported in _BLOCK_TYPES.items():
            value = getattr(self, key, ())
            for name in value if isinstance(value, tuple) else (value,):
                if name not in supported:
                    names = " or ".join(map(repr, supported))
                    raise ValueError(f"{self._kind} config: {name!r} in {key} is not supported (supported: {names})")

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Return the channels of every map that the UNet's second half gets from its first, in their order."""
        channels = list(self.block_out_channels[:1])
        for i, width in enumerate(self.block_out_channels):
            downsampled = i < len(self.block_out_channels) - 1
            channels += [width] * (self.layers_per_block[i] + downsampled)
        return tuple(channels)


@dataclass(frozen=True, kw_only=True)
class UNetConfig(EncoderConfig):
    """Hold the config of a ``UNet2DConditionModel`` of the Stable Diffusion family.

    ``reverse_transformer_layers_per_block`` gives the transformers' layers for the up path, coarsest block first.
    """

    _kind: ClassVar[str] = "unet"
    _supported: ClassVar[Supported] = _UNET_SUPPORTED

    out_channels: int = 4
    sample_size: int | None = None
    up_block_types: tuple[str, ...]
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...]
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "UNetConfig":
        """Read ``unet/config.json``; ValueError names every key whose value this library cannot compute."""
        fields = cls._read(raw, "up_block_types")
        layers = fields["transformer_layers_per_block"]
        if "reverse_transformer_layers_per_block" not in fields and any(isinstance(n, tuple) for n in layers):
            raise ValueError(
                "unet config: nested transformer_layers_per_block needs reverse_transformer_layers_per_block"
            )
        return cls(**{"reverse_transformer_layers_per_block": layers[::-1]} | fields)


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EncoderConfig):
    """Hold the config of a ``ControlNetModel`` (Zhang et al. 2023): a UNet's first half, and what embeds the image.

    ``conditioning_embedding_out_channels`` are the widths of the embedding's stages, each of which after the first
    halves the control image. ``global_pool_conditions`` means that only the mean of each result counts ("shuffle").
    """

    _kind: ClassVar[str] = "controlnet"
    _supported: ClassVar[Supported] = _UNET_SUPPORTED | {
        "controlnet_conditioning_channel_order": ("rgb", "bgr", None),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    }

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    controlnet_conditioning_channel_order: str = "rgb"
    global_pool_conditions: bool = False

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ControlNetConfig":
        """Read a ControlNet's ``config.json``; ValueError names its class, or every key, that is not computed here."""
        name = raw.get("_class_name", "ControlNetModel")
        if name != "ControlNetModel" or raw.get("num_control_type") is not None:
            kind = "a ControlNet for several kinds of images (union)" if name == "ControlNetModel" else f"a {name}"
            raise ValueError(f"controlnet config: this is {kind}; this library runs a ControlNetModel for one kind")
        return cls(**cls._read(raw))

    @property
    def scale(self) -> int:
        """Return the pixels of the control image per latent, in each direction: 8 for every published checkpoint."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    def check_fits(self, unet: UNetConfig) -> None:
        """Raise ValueError unless this ControlNet's results can be added to the maps of ``unet``."""
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
    return ValueError(
        f"the {network} does not fit the model: {reason}; take one that was trained for this family (SD 1, SD 2 or XL)"
    )


@dataclass(frozen=True)
class AutoencoderConfig:
    """Hold the config of an ``AutoencoderKL`` (Rombach et al. 2022). ``scaling_factor`` multiplies latents."""

    block_out_channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "AutoencoderConfig":
        """Read ``vae/config.json``; ValueError names every key whose value this library cannot compute."""
        _required("vae", raw, "block_out_channels")
        blocks = len(raw["block_out_channels"])
        supported = {
            "act_fn": ("silu", "swish"),
            "down_block_types": (("DownEncoderBlock2D",) * blocks,),
            "up_block_types": (("UpDecoderBlock2D",) * blocks,),
        }
        check("vae", raw, supported, cls.__dataclass_fields__.keys() | _WITHOUT_EFFECT)
        return cls(**fields_of(cls, raw))

    @property
    def scale(self) -> int:
        """Return the pixels per latent, in each direction: 8 for every published checkpoint."""
        return 2 ** (len(self.block_out_channels) - 1)

    def widest(self, half: str) -> float:
        """Return the channels into and out of the widest resnet of a half ("encoder" or "decoder"), per pixel."""
        widths = self.block_out_channels
        inputs = widths[:1] + widths[:-1] if half == "encoder" else widths[1:] + widths[-1:]
        return max((into + out) / 4**i for i, (into, out) in enumerate(zip(inputs, widths, strict=True)))
