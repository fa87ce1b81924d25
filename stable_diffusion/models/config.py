"""The configurations of a checkpoint's parts, read from its JSON files.

Every class keeps the names that diffusers writes. What differs between files is settled here, once: a number that
holds for all blocks becomes one number per block, an absent key takes the value that diffusers would take. Keys that
change the result but that this library does not compute are refused by name, never dropped.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

# Keys that say something about files, training or storage, and nothing about what is computed.
_SILENT = frozenset({"sample_size", "dropout", "attention_dropout", "initializer_range", "initializer_factor"})
_SILENT |= {"model_type", "decay", "min_decay", "inv_gamma", "power", "use_ema_warmup", "update_after_step"}
_SILENT |= {"optimization_step"}  # these are of the moving average of the weights


@contextmanager
def readable(kind: str) -> Iterator[None]:
    """Turn what Python says of JSON values of the wrong kind (a text for a number, ...) into a ValueError."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{kind}: a value is not what it should be ({reason}); take it from its source") from error


def _check(kind: str, raw: Mapping[str, Any], known: frozenset[str], fixed: Mapping[str, tuple]) -> None:
    """Raise ValueError for values outside ``fixed`` and for unknown keys that carry a meaningful value."""
    problems = []
    for key, value in raw.items():
        value = tuple(value) if isinstance(value, list) else value
        if key in fixed:
            if value not in fixed[key]:
                problems.append(f"{key}={value!r} (supported: {' or '.join(map(repr, fixed[key]))})")
        elif key not in known and not key.startswith("_") and value not in (None, False, ()):
            problems.append(f"{key}={value!r} (unknown)")
    if problems:
        raise ValueError(f"{kind} config: this library cannot compute {'; '.join(problems)}")


def _per_block(kind: str, key: str, value: Any, count: int) -> tuple:
    """One entry per block: a single value is repeated, a list must have ``count`` entries (nested lists -> tuples)."""
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
    """CLIP text encoder (Radford et al. 2021); key names and defaults of transformers' ``CLIPTextConfig``."""

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
        if raw.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
            raise ValueError(
                f"text encoder config: hidden_act={raw['hidden_act']!r} (supported: 'quick_gelu' or 'gelu')"
            )
        fields = {k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None}
        fields["with_projection"] = "CLIPTextModelWithProjection" in architectures
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The first half of a UNet, which a ControlNet copies. Tuples run from the finest block to the coarsest.

    ``num_attention_heads`` is the number of heads; checkpoints store it under the misleading name
    ``attention_head_dim``. ``transformer_layers_per_block`` holds an int, or a tuple with one entry per attention of
    the block.
    """

    _kind: ClassVar[str]
    _fixed: ClassVar[Mapping[str, tuple]]

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
        """The fields that UNet and ControlNet share; ValueError names every key whose value cannot be computed."""
        _required(cls._kind, raw, "block_out_channels", "down_block_types", "cross_attention_dim", *required)
        _check(cls._kind, raw, frozenset(cls.__dataclass_fields__) | _SILENT | {"attention_head_dim"}, cls._fixed)
        blocks = len(raw["block_out_channels"])

        def per_block(key: str, default: Any) -> tuple:
            value = raw.get(key)
            return _per_block(cls._kind, key, default if value is None else value, blocks)

        scalars = (
            "norm_num_groups norm_eps use_linear_projection upcast_attention flip_sin_to_cos freq_shift "
            "addition_embed_type addition_time_embed_dim projection_class_embeddings_input_dim"
        )
        return {
            "in_channels": raw.get("in_channels", 4),
            "block_out_channels": tuple(raw["block_out_channels"]),
            "layers_per_block": per_block("layers_per_block", 2),
            "down_block_types": per_block("down_block_types", None),
            "mid_block_type": raw.get("mid_block_type", "UNetMidBlock2DCrossAttn"),
            "num_attention_heads": per_block("num_attention_heads", per_block("attention_head_dim", 8)),
            "cross_attention_dim": per_block("cross_attention_dim", None),
            "transformer_layers_per_block": per_block("transformer_layers_per_block", 1),
        } | {key: raw[key] for key in scalars.split() if raw.get(key) is not None}

    def __post_init__(self) -> None:
        for key, supported in _BLOCK_TYPES.items():
            value = getattr(self, key, ())
            for name in value if isinstance(value, tuple) else (value,):
                if name not in supported:
                    names = " or ".join(map(repr, supported))
                    raise ValueError(f"{self._kind} config: {name!r} in {key} is not supported (supported: {names})")
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(
                f"{self._kind} config: addition_embed_type={self.addition_embed_type!r} (supported: 'text_time')"
            )

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """The channels of every map that the UNet's second half gets from its first, in the order they are made."""
        channels = list(self.block_out_channels[:1])
        for i, width in enumerate(self.block_out_channels):
            downsampled = i < len(self.block_out_channels) - 1
            channels += [width] * (self.layers_per_block[i] + downsampled)
        return tuple(channels)


_BLOCK_TYPES: Mapping[str, tuple] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}

# diffusers options outside the family: only the value that means "off" is computed here.
_UNET_FIXED: Mapping[str, tuple] = {
    "act_fn": ("silu", "swish"),
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
class UNetConfig(EncoderConfig):
    """``UNet2DConditionModel`` of the Stable Diffusion family.

    ``reverse_transformer_layers_per_block`` gives the transformers' layers for the up path, coarsest block first.
    """

    _kind: ClassVar[str] = "unet"
    _fixed: ClassVar[Mapping[str, tuple]] = _UNET_FIXED

    out_channels: int
    sample_size: int | None
    up_block_types: tuple[str, ...]
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...]
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "UNetConfig":
        """Read ``unet/config.json``; ValueError names every key whose value this library cannot compute."""
        shared = cls._read(raw, "up_block_types")
        blocks = len(shared["block_out_channels"])
        layers = shared["transformer_layers_per_block"]
        reverse = raw.get("reverse_transformer_layers_per_block")
        if reverse is None and any(isinstance(n, tuple) for n in layers):
            raise ValueError(
                "unet config: nested transformer_layers_per_block needs reverse_transformer_layers_per_block"
            )
        if reverse is not None:
            reverse = _per_block(cls._kind, "reverse_transformer_layers_per_block", reverse, blocks)
        return cls(
            out_channels=4 if raw.get("out_channels") is None else raw["out_channels"],
            sample_size=raw.get("sample_size"),
            up_block_types=_per_block(cls._kind, "up_block_types", raw["up_block_types"], blocks),
            reverse_transformer_layers_per_block=reverse or layers[::-1],
            time_cond_proj_dim=raw.get("time_cond_proj_dim"),
            **shared,
        )


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EncoderConfig):
    """``ControlNetModel`` (Zhang et al. 2023): the UNet's first half, and the small network that reads the hint.

    ``conditioning_embedding_out_channels`` are the widths of that network's stages, each of which after the first
    halves the hint; ``global_pool_conditions`` means that only the mean of each of the results counts ("shuffle").
    """

    _kind: ClassVar[str] = "controlnet"
    _fixed: ClassVar[Mapping[str, tuple]] = _UNET_FIXED | {
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
            kind = "a ControlNet for several kinds of hints (union)" if name == "ControlNetModel" else f"a {name}"
            raise ValueError(f"controlnet config: this is {kind}; this library runs a ControlNetModel for one kind")
        scalars = ("conditioning_channels", "controlnet_conditioning_channel_order", "global_pool_conditions")
        given = {key: raw[key] for key in scalars if raw.get(key) is not None}
        if (widths := raw.get("conditioning_embedding_out_channels")) is not None:
            given["conditioning_embedding_out_channels"] = tuple(widths)
        return cls(**cls._read(raw), **given)

    @property
    def scale(self) -> int:
        """Pixels of the hint per latent, in each direction: 8 for every published checkpoint."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)

    def check_fits(self, unet: UNetConfig) -> None:
        """Raise ValueError unless what this ControlNet computes can be added to what ``unet`` computes."""
        for what, mine, needed in (
            ("latent channels", self.in_channels, unet.out_channels),
            ("maps with channels", self.skip_channels, unet.skip_channels),
            ("prompts of width", max(self.cross_attention_dim), max(unet.cross_attention_dim)),
            (
                "sizes and pooled prompts of width",
                self.projection_class_embeddings_input_dim,
                unet.projection_class_embeddings_input_dim,
            ),
        ):
            if mine != needed:
                raise misfit("ControlNet", f"it is for {what} {mine}, the model has {needed}")


def misfit(network: str, why: str) -> ValueError:
    """The error of a network that steers a UNet, but not the given one."""
    return ValueError(
        f"the {network} does not fit the model: {why}; take one that was trained for this family (SD 1, SD 2 or XL)"
    )


@dataclass(frozen=True)
class AutoencoderConfig:
    """``AutoencoderKL`` (Rombach et al. 2022). Latents are multiplied by ``scaling_factor`` for the UNet."""

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
        fixed = {
            "act_fn": ("silu", "swish"),
            "down_block_types": (("DownEncoderBlock2D",) * blocks,),
            "up_block_types": (("UpDecoderBlock2D",) * blocks,),
        }
        _check("vae", raw, frozenset(cls.__dataclass_fields__) | _SILENT, fixed)
        fields = {k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None}
        fields["block_out_channels"] = tuple(raw["block_out_channels"])
        return cls(**fields)

    @property
    def scale(self) -> int:
        """Pixels per latent, in each direction: 8 for every published checkpoint."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class ScheduleConfig:
    """What ``scheduler_config.json`` says about the noise the model was trained on, and its preferred sampler.

    ``timestep_spacing`` is None where the file is silent: the default then depends on the sampler. ``sigma_schedule``
    gathers the flags ``use_karras_sigmas``, ``use_exponential_sigmas`` and ``use_beta_sigmas``. ``not_followed`` names
    settings of the preferred sampler, such as "solver_order=3", that the samplers here do not have.
    """

    class_name: str = "DDIMScheduler"
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    sigma_schedule: str = "default"
    final_sigmas_type: str = "zero"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    algorithm_type: str | None = None
    lower_order_final: bool = True
    not_followed: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ScheduleConfig":
        """Read a scheduler's JSON; ValueError names what is said of the noise that is not computed here."""
        fields = {k: raw[k] for k in cls.__dataclass_fields__ if raw.get(k) is not None}
        fields["class_name"] = raw.get("_class_name", "DDIMScheduler")
        if fields.get("trained_betas") is not None:
            fields["trained_betas"] = tuple(fields["trained_betas"])
        curves = [name for name in ("karras", "exponential", "beta") if raw.get(f"use_{name}_sigmas")]
        if len(curves) > 1:
            raise ValueError(f"scheduler config: only one of use_{'_sigmas, use_'.join(curves)}_sigmas can hold")
        fields["sigma_schedule"] = curves[0] if curves else "default"
        for key, plain in _SCHEDULE_FIXED.items():
            if raw.get(key) not in (None, False, *plain):
                raise ValueError(f"scheduler config: {key}={raw[key]!r} is not supported")
        usual = _SAMPLER_FIXED | _SAMPLER_OF_CLASS.get(fields["class_name"], {})
        fields["not_followed"] = tuple(
            f"{key}={raw[key]!r}" for key, plain in usual.items() if raw.get(key) not in (None, *plain)
        )
        return cls(**fields)

    def __post_init__(self) -> None:
        for key, allowed in _SCHEDULE_CHOICES.items():
            if (value := getattr(self, key)) not in allowed:
                names = ", ".join(repr(a) for a in allowed if a)
                raise ValueError(f"scheduler config: {key}={value!r} is not supported (supported: {names})")


_SCHEDULE_CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace", None),
    "final_sigmas_type": ("zero", "sigma_min"),
}

# What would change the noise levels or the timesteps that the network is told, and the values that change nothing.
_SCHEDULE_FIXED: Mapping[str, tuple] = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (),
    "use_lu_lambdas": (),
    "sigma_min": (),
    "sigma_max": (),
}

# What a checkpoint says of its preferred sampler, and the values that the sampler here has.
_SAMPLER_FIXED: Mapping[str, tuple] = {
    "thresholding": (False,),
    "clip_sample": (False,),
    "disable_corrector": ([],),
    "solver_p": (),
    "predict_x0": (True,),
}
_MULTISTEP_FIXED: Mapping[str, tuple] = {"solver_order": (2,), "solver_type": ("midpoint",)}
_SAMPLER_OF_CLASS: Mapping[str, Mapping[str, tuple]] = {
    "DPMSolverMultistepScheduler": _MULTISTEP_FIXED | {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),
        "lower_order_final": (True,),
    },
    "DEISMultistepScheduler": {"solver_order": (2,)},
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    "DDPMScheduler": {"variance_type": ("fixed_small",)},
}
