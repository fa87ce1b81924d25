"""Read the configurations of a checkpoint's parts from JSON objects.

Every class keeps diffusers' names. Differences between files are resolved here: a number for all blocks becomes one
number per block, and an absent key gets diffusers' default. A key that changes the result in an unsupported way raises
an error with its name.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

Supported = Mapping[str, Collection[Any]]  # {key: supported values}

# Keys about training and the moving average of the weights, without effect on the result.
_IGNORED = {"sample_size", "dropout", "attention_dropout", "initializer_range", "initializer_factor", "model_type"}
_IGNORED |= {"decay", "min_decay", "inv_gamma", "power", "use_ema_warmup", "update_after_step", "optimization_step"}

# Keys that transformers (4.20 ... 5) writes into every config: about saving, tokens, outputs and generation.
_OF_TRANSFORMERS = """
torch_dtype dtype transformers_version return_dict use_cache use_bfloat16 tf_legacy_loss tie_word_embeddings prefix
name_or_path tokenizer_class finetuning_task problem_type id2label label2id architectures logit_scale_init_value
bos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id vision_config
max_length min_length max_new_tokens num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
repetition_penalty length_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size num_return_sequences
vision_config_dict output_hidden_states output_attentions attn_implementation task_specific_params
"""

# Bounds of whole numbers, far beyond any published model; they are checked before any loop.
_MOST = {"layers_per_block": 8, "num_hidden_layers": 64, "vocab_size": 1 << 20, "num_train_timesteps": 100_000}
_MOST |= dict.fromkeys(("depths", "num_encoder_blocks", "num_decoder_blocks", "num_res_blocks"), 64)
_MOST |= dict.fromkeys(("num_control_type", "num_trans_layer"), 64)
_MOST |= dict.fromkeys(("transformer_layers_per_block", "reverse_transformer_layers_per_block"), 32)
_MAY_BE_ZERO = {"transformer_layers_per_block", "reverse_transformer_layers_per_block", "eos_token_id", "freq_shift"}
_MAY_BE_ZERO |= {"steps_offset", "backbone_out_indices", "disable_corrector", "downsample_padding"}
_LONGEST = {"trained_betas": 100_000, "attention_widths": 256}  # of lists, else 16
_LONGEST |= dict.fromkeys(("layers", "widths", "depths"), 4096)


@contextmanager
def readable(kind: str) -> Iterator[None]:
    """Turn Python's errors about JSON values of the wrong type, such as a text for a number, into ValueError."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{kind}: invalid value ({reason}); download it again") from error


def listed(names: Iterable[Any], most: int = 3) -> str:
    """List the first few names in one line: "a, b, c and 97 more"."""
    names, shown = list(map(str, names)), []
    for name in names[:most]:
        if sum(map(len, shown)) < 100:
            shown.append(name if len(name) <= 100 else f"{name[:60]}...{name[-37:]}")
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


class Config:
    """Read a dataclass from a JSON object, named ``kind`` in errors. Null means absent; lists become tuples.

    ``supported`` limits the values of fields and other keys. Keys in ``per_block`` have one value for each of
    ``block_out_channels``, with the given default. All other keys must be fields, off or ``ignored``; None ignores
    them all.
    """

    kind: ClassVar[str]
    supported: ClassVar[Supported] = {}
    per_block: ClassVar[Mapping[str, Any]] = {}
    ignored: ClassVar[Collection[str] | None] = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a part's JSON; ValueError names every missing key and every unsupported value."""
        known = {field.name: field for field in fields(cls)}
        required = [key for key in known if known[key].default is MISSING and cls.per_block.get(key) is None]
        if missing := [key for key in required if raw.get(key) is None]:
            raise ValueError(f"{cls.kind} config: missing {listed(missing)}")
        problems = []
        for key, value in raw.items():
            if key in cls.supported:
                entries = value if key in cls.per_block and isinstance(value, list | tuple) else [value]
                if wrong := [entry for entry in entries if _as_tuple(entry) not in cls.supported[key]]:
                    names = " or ".join(map(repr, cls.supported[key]))
                    problems.append(f"{key}={short(wrong[0])} (supported: {names})")
            elif cls.ignored is None or key in known or key in cls.ignored or key.startswith("_"):
                continue
            elif value not in (None, False, [], (), {}):
                problems.append(f"{key}={short(value)} (unknown)")
        if problems:
            raise ValueError(f"{cls.kind} config: this library cannot compute {listed(problems)}")
        # None is a value for one key: pruned models have no middle block.
        settings = {key: _as_tuple(v) for key, v in raw.items() if v is not None or key == "mid_block_type"}
        if "block_out_channels" in known:
            cls._check("block_out_channels", settings["block_out_channels"], known["block_out_channels"].type)
        for key, default in cls.per_block.items():
            value = settings.get(key, default)
            count = len(settings["block_out_channels"])
            if isinstance(value, tuple) and len(value) != count:
                text = f"{key}={short(raw[key])} has {len(value)} entries for {count} blocks"
                raise ValueError(f"{cls.kind} config: {text}")
            settings[key] = value if isinstance(value, tuple) else (value,) * count
        settings = {key: value for key, value in settings.items() if key in known}
        for key, value in settings.items():
            cls._check(key, value, known[key].type)
        return cls(**settings)

    def __post_init__(self) -> None:
        groups = getattr(self, "norm_num_groups", 1)
        if wrong := [width for width in getattr(self, "block_out_channels", ()) if width % groups]:
            raise ValueError(f"{self.kind} config: width {wrong[0]} does not divide into norm_num_groups={groups}")

    @classmethod
    def _check(cls, key: str, value: Any, kind: Any) -> None:
        """Raise ValueError for a value of the wrong type or out of bounds."""
        least, most, longest = int(key not in _MAY_BE_ZERO), _MOST.get(key, 1 << 17), _LONGEST.get(key, 16)
        if _fits(value, kind, least, most, longest):
            return
        kinds = {int: f"a whole number from {least} to {most:,}", float: "a finite number", bool: "true or false"}
        names = [text for one, text in kinds.items() if one in _leaves(kind)] or ["a text"]
        text = f"a list of at most {longest}, each " * (get_origin(kind) is tuple) + " or ".join(names)
        raise ValueError(f"{cls.kind} config: {key}={short(value)} must be {text}; download it again")


def _fits(value: Any, kind: Any, least: int, most: int, longest: int) -> bool:
    """Return whether a JSON value has a type, whole numbers in bounds, and lists of at most ``longest`` items."""
    if get_origin(kind) is UnionType:
        return any(_fits(value, one, least, most, longest) for one in get_args(kind))
    if get_origin(kind) is tuple:
        is_list = isinstance(value, tuple) and len(value) <= longest
        return is_list and all(_fits(entry, get_args(kind)[0], least, most, longest) for entry in value)
    if kind is int:
        return type(value) is int and least <= value <= most
    if kind is float:
        return type(value) in (int, float) and abs(value) <= 1e12  # which is false for NaN
    return isinstance(value, kind)


def _leaves(kind: Any) -> set[Any]:
    return {kind}.union(*map(_leaves, get_args(kind)))


def short(value: Any) -> str:
    """Format a value of a file for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """Hold the config of a CLIP text encoder (Radford et al. 2021); names and defaults of transformers' class."""

    kind: ClassVar[str] = "text encoder"
    supported: ClassVar[Supported] = {
        "hidden_act": ("quick_gelu", "gelu"),
        "architectures": (("CLIPTextModel",), ("CLIPTextModelWithProjection",), ("CLIPModel",), None),
    }
    ignored: ClassVar[Collection[str]] = _IGNORED.union(_OF_TRANSFORMERS.split(), ("quantization",))

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
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a text encoder's ``config.json``; its class decides whether there is a projection."""
        with_projection = _as_tuple(raw.get("architectures")) == ("CLIPTextModelWithProjection",)
        return super().from_dict({**raw, "with_projection": with_projection})


@dataclass(frozen=True)
class CLIPVisionConfig(Config):
    """Hold the config of a CLIP image encoder; names and defaults of transformers' class."""

    kind: ClassVar[str] = "image encoder"
    supported: ClassVar[Supported] = {"hidden_act": ("quick_gelu", "gelu"), "num_channels": (3,)}
    ignored: ClassVar[Collection[str]] = CLIPTextConfig.ignored

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read an image encoder's ``config.json``, also inside the config of a whole CLIP or a safety checker."""
        if isinstance(vision := raw.get("vision_config"), Mapping):
            raw = {**vision, "projection_dim": raw.get("projection_dim")}
        return super().from_dict(raw)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """Hold the config of a UNet's first half, which a ControlNet copies. Tuples run from the finest block on."""

    # Options of diffusers outside the family are supported only if they are off.
    supported: ClassVar[Supported] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "act_fn": ("silu", "swish"),
        "addition_embed_type": ("text_time", None),
        "addition_embed_type_num_heads": (64, None),
        "attention_type": ("default", None),
        "center_input_sample": (False,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "downsample_padding": (1, None),
        "mid_block_only_cross_attention": (None, False),
        "mid_block_scale_factor": (1, 1.0),
        "only_cross_attention": (False, None),
        "resnet_out_scale_factor": (1, 1.0, None),
        "resnet_time_scale_shift": ("default", None),
        "time_embedding_type": ("positional", None),
    }
    per_block: ClassVar[Mapping[str, Any]] = {
        "layers_per_block": 2,
        "down_block_types": None,
        "num_attention_heads": 8,
        "cross_attention_dim": None,
        "transformer_layers_per_block": 1,
    }
    ignored: ClassVar[Collection[str]] = _IGNORED | {"attention_head_dim"}

    in_channels: int = 4
    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    down_block_types: tuple[str, ...]
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    num_attention_heads: tuple[int, ...]  # stored under the misleading name attention_head_dim
    cross_attention_dim: tuple[int, ...]
    transformer_layers_per_block: tuple[int | tuple[int, ...], ...]  # of a block, or of each of its attentions
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    upcast_attention: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    downsample_padding: int = 1  # on all sides; 0 pads below and to the right
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a part's JSON, with either name for the number of heads."""
        if raw.get("num_attention_heads") is None:
            raw = {**raw, "num_attention_heads": raw.get("attention_head_dim")}
        return super().from_dict(raw)

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Return the channels of every skip connection, in order."""
        channels = list(self.block_out_channels[:1])
        for i, width in enumerate(self.block_out_channels):
            downsampled = i < len(self.block_out_channels) - 1
            channels += [width] * (self.layers_per_block[i] + downsampled)
        return tuple(channels)


@dataclass(frozen=True, kw_only=True)
class UNetConfig(EncoderConfig):
    """Hold the config of a ``UNet2DConditionModel`` of the Stable Diffusion family."""

    kind: ClassVar[str] = "unet"
    supported: ClassVar[Supported] = EncoderConfig.supported | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    per_block: ClassVar[Mapping[str, Any]] = EncoderConfig.per_block | {
        "up_block_types": None,
        "reverse_transformer_layers_per_block": 1,
    }

    out_channels: int = 4
    sample_size: int | tuple[int, ...] | None = None
    up_block_types: tuple[str, ...]
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...]  # of the up path, coarsest block first
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read ``unet/config.json``. By default the up path has the same transformers as the down path."""
        key, layers = "reverse_transformer_layers_per_block", raw.get("transformer_layers_per_block")
        if raw.get(key) is None and isinstance(layers, list | tuple):
            if any(isinstance(n, list | tuple) for n in layers):
                raise ValueError(f"unet config: nested transformer_layers_per_block needs {key}")
            layers = layers[::-1]
        return super().from_dict({**raw, key: raw.get(key) or layers})


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """Hold the config of an ``AutoencoderKL`` (Rombach et al. 2022)."""

    kind: ClassVar[str] = "vae"
    supported: ClassVar[Supported] = {
        "act_fn": ("silu", "swish"),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    }
    per_block: ClassVar[Mapping[str, Any]] = {"down_block_types": None, "up_block_types": None}
    ignored: ClassVar[Collection[str]] = _IGNORED
    moments: ClassVar[int] = 2  # values per latent channel in the encoder's output: mean and log variance

    block_out_channels: tuple[int, ...]
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # factor on the latents, applied last
    latents_mean: tuple[float, ...] | None = None  # of each channel, subtracted first
    latents_std: tuple[float, ...] | None = None  # of each channel, the divisor
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for values in (self.latents_mean, self.latents_std):
            if values is not None and (len(values) != self.latent_channels or 0 in (self.latents_std or (0,))):
                text = f"latents_mean={self.latents_mean} and latents_std={self.latents_std}"
                raise ValueError(f"vae config: {text} must have {self.latent_channels} numbers each, all nonzero")

    @property
    def scale(self) -> int:
        """Return the pixels per latent, in each direction: 8 for every published checkpoint."""
        return 2 ** (len(self.block_out_channels) - 1)

    def widest(self, half: str) -> float:
        """Return the channels into and out of the widest resnet of a half ("encoder" or "decoder"), per pixel."""
        widths = self.block_out_channels
        inputs = widths[:1] + widths[:-1] if half == "encoder" else widths[1:] + widths[-1:]
        return max((into + out) / 4**i for i, (into, out) in enumerate(zip(inputs, widths, strict=True)))
