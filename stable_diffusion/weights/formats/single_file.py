"""Recognise single files: the networks in a weights file, and their configurations.

Such a file has no configuration. Settings that shapes do not show (heads, activation, noise schedule) are those of the
published models; the UNet's structure identifies the family. Only names, shapes and metadata are read, with one
exception: a bias that shows the prediction type of a UNet of Stable Diffusion 2.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...models.config import listed
from .. import catalog
from ..layout import Checkpoint, Component
from ..parts import FAMILIES, PARTS, Family, family_of
from .gguf import GROUP, unpack
from .original import NOT_OF_TEXT_ENCODER, to_diffusers
from .shapes import READERS, Tensors

_log = logging.getLogger("stable_diffusion")

# Other tensors in checkpoints: the noise schedule of training and its flags, running averages (usually the weights are
# used), the depth estimator of Stable Diffusion 2, training leftovers.
_NOT_WEIGHTS = re.compile(
    r"(model\.)?(alphas_cumprod|betas|sqrt_alphas_cumprod|alphas_cumprod_prev|log_one_minus_alphas_cumprod)$"
    r"|sqrt_(one_minus|recip|recipm1)_alphas_cumprod$|posterior_(variance|log_variance_clipped|mean_coef[12])$"
    r"|(lvlb_weights|logvar|scale_factor|global_step|v_pred|ztsnr|edm_(mean|std|vpred\.sigma_(min|max))|denoiser\.(log_)?sigmas)$"
    r"|(model_ema|depth_model|embedding_manager|(optimizer|lr_scheduler|swa_model)\w*)\."
    rf"|(.*\.)?{NOT_OF_TEXT_ENCODER}|(.*\.)?text_projection(\.weight)?$"  # of CLIP, at any place
)

_OTHER_UPSCALERS = {
    r"layers\.\d+\.residual_group\.overlap_attn\.": "HAT",
    r"layers\.\d+\.residual_group\.blocks\.\d+\.attn\.aligned_relative": "SRFormer",
    r"layers\.\d+\.residual_group\.blocks\.\d+\.attn\.(relative|logit)": "SwinIR",
    r"relative_position_index_SA$": "ATD",
    r"before_RG\.": "DAT or RGT",
    r"residual_layer\.\d+\.residual_layer\.": "OmniSR",
    r"block_1\.c1_r\.": "SPAN",
    r"feats\.\d+\.(lk|channel_mixer|channe_mixer)\.": "PLKSR",
    r"unet1\.conv1\.": "Real-CUGAN",
    r"(body|model\.1\.sub|RRDB_trunk)\.\d+\.(rdb|RDB)1\.conv1x1\.": "ESRGAN+",
}
# Files of other kinds, by patterns of tensor names.
_OTHER_KINDS = (
    (r"noise_augmentor\.|embedder\.model\.visual", "a Stable unCLIP, which is not supported"),
    (r"low_scale_model\.", "an upscaler, which is not supported"),
    (r"(.*\.)?joint_blocks\.", "Stable Diffusion 3, which is not supported"),
    (r"(.*\.)?(double|single)_blocks\.", "Flux, which is not supported"),
    (r".*(lora_down|lora_up|lora_A|lora_B|hada_w1_a|lokr_w1|dora_scale)\b", "a LoRA, not a model: load it as a LoRA"),
    (r"(emb_params|clip_[lg]|string_to_param.*|<.*>)$", "an embedding, not a model: load it as an embedding"),
    (r"(image_proj|ip_adapter)\.", "an IP-Adapter, not a model: load it as an IP-Adapter"),
    (r"style_embedding$|spatial_feat_mapping\.", "a style adapter or a fuser of T2I-Adapters, which is not supported"),
    (r"(.*\.)?motion_modules\.", "an AnimateDiff model, which is not supported"),
    (r"(.*\.)?clip_(txt_|txt_pooled_)?mapper\.", "Stable Cascade, which is not supported"),
    (r"(.*\.)?double_layers\.", "AuraFlow, which is not supported"),
    (r"(.*\.)?(t_block|adaln_single)\.", "PixArt, which is not supported"),
    (r"(.*\.)?mlp_t5\.", "Hunyuan-DiT, which is not supported"),
    (r"(.*\.)?head\.modulation$", "Wan, which is not supported"),
    (r"(.*\.)?transformer_blocks\.0\.img_mod\.", "Qwen-Image, which is not supported"),
    (r"(.*\.)?cap_embedder\.", "Lumina, which is not supported"),
    (r"(.*\.)?time_stack\.", "Stable Video Diffusion, which is not supported"),
    *(
        (pattern, f"an upscaler of type {name}, which is not supported: use RRDB or SRVGG, as in Real-ESRGAN")
        for pattern, name in _OTHER_UPSCALERS.items()
    ),
    (r".*\.(absmax|quant_map)$", "quantized by bitsandbytes, which is not supported: use the float16 version"),
)

# The training noise of all families.
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
# EDM models, as published.
_PLAYGROUND = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}
_PLAYGROUND |= {"sigma_min": 0.002, "sigma_max": 80.0}
_COSXL = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0}
_COSXL |= {"sigma_schedule": "exponential", "prediction_type": "v_prediction"}
_PLAYGROUND_SCALING = 0.5  # scaling_factor of its VAE
_LCM = {"_class_name": "LCMScheduler", "original_inference_steps": 50}
_FIRST_BIAS = re.compile(r"up_blocks\.(\d+)\.attentions\.(\d+)\.transformer_blocks\.0\.norm1\.bias")
_VELOCITY = ("v", "v_prediction", "v-prediction", "vpred", "v_pred")  # in metadata
_MODES = {4: "", 5: "Depth2Img", 8: "InstructPix2Pix", 9: "Inpaint"}  # in a pipeline's name, by the UNet's channels


def read_checkpoint(
    path: Path,
    where: str,
    tensors: Tensors,
    metadata: Mapping[str, str],
    replaced: Mapping[str, Component],
    prediction: str | None,
) -> Checkpoint:
    """Recognise the checkpoint in a file with these ``tensors``. The caller adds its tokenizers.

    ``where`` is the file's name, for messages; networks in ``replaced`` come from other sources. ``prediction`` is the
    user's prediction type of the UNet, or None.
    Raises ValueError for a file of another kind, a missing network, or unknown tensors.
    """
    prefixes = {kind: prefix for kind, prefix in find(tensors, where).items() if kind not in replaced}
    configs = {kind: read_config(kind, tensors, prefix, where) for kind, prefix in prefixes.items()}
    configs |= {kind: component.config for kind, component in replaced.items()}
    family, needed = _family(configs, prefixes, where)
    unet, pipeline = configs["unet"], _pipeline(family, configs["unet"], where)
    scheduler = _NOISE | (family.scheduler if unet.get("time_cond_proj_dim") is None else _LCM)
    can_measure = family is FAMILIES["sd2"] and pipeline == "StableDiffusionPipeline"
    measured = prefixes.get("unet") if can_measure else None
    scheduler = _edm_scheduler(tensors) or scheduler
    stated = prediction or scheduler.get("prediction_type")
    scheduler["prediction_type"] = stated or _prediction(tensors, metadata, where, measured)
    if "unet" in prefixes:
        unet["sample_size"] = _sample_size(family, scheduler["prediction_type"], metadata)
    steps, guidance = catalog.defaults_for(pipeline, scheduler)
    components = {kind: Component(kind, configs[kind], (path,), prefixes[kind]) for kind in needed if kind in prefixes}
    if "unet" in components:
        components["unet"] = with_run(components["unet"], tensors, metadata)
    return Checkpoint(
        name=where,
        pipeline=pipeline,
        index={"_class_name": pipeline, "scheduler": ["diffusers", scheduler["_class_name"]], **family.options},
        scheduler=scheduler,
        components=components | replaced,
        tokenizers=dict.fromkeys(family.pad_tokens, path.parent),
        steps=steps,
        guidance=guidance,
        pad_tokens=dict(family.pad_tokens),
    )


def _family(configs: Mapping[str, dict], prefixes: Mapping[str, str], where: str) -> tuple[Family, list[str]]:
    """Return the family and its networks. Raises ValueError if one of them is missing."""
    if "unet" not in configs:
        held = ", ".join(prefixes)
        raise ValueError(f"{where} holds only {held}, no UNet: give a whole checkpoint, and this as a part of it")
    family = family_of(configs["unet"])
    if family is FAMILIES["xl"] and prefixes.get("text_encoder_2", "").startswith("conditioner.embedders.0."):
        family = FAMILIES["refiner"]  # the second encoder is its only one
    needed = ["unet", "vae", *(kind for kind, part in PARTS.items() if part.tokenizer in family.pad_tokens)]
    if missing := [PARTS[kind].label for kind in needed if kind not in configs]:
        raise ValueError(f"{where} lacks {' and '.join(missing)}: add it with parts, for example from {family.repo}")
    return family, needed


def find(tensors: Collection[str], where: str, kind: str | None = None) -> dict[str, str]:
    """Find the networks of a file: {network: the prefix of its names}; a single network may have the prefix "".

    ``where`` is the file's name, for messages. With ``kind``, only this network is required and the rest is ignored.
    Raises ValueError for a file without networks, or unknown tensors.
    """
    weights = [name for name in tensors if not _NOT_WEIGHTS.match(name)]
    networks = {
        network: prefix
        for network, part in PARTS.items()
        for prefix in part.prefixes
        if any(name.startswith(prefix) for name in weights)
    }
    if not networks or (kind is not None and kind not in networks):
        names = ("controlnet", *PARTS)  # a ControlNet also has tensors of a UNet
        alone = [n for n in names if not {PARTS[n].original, *PARTS[n].signs}.isdisjoint(tensors)]
        networks = dict.fromkeys([kind] if kind in alone else alone[:1], "") or networks
    for pattern, what in _OTHER_KINDS:
        if kind != "ip_adapter" and any(re.match(pattern, name) for name in tensors):
            raise ValueError(f"{where} is {what}")
    if kind is not None:
        if kind not in networks:
            contents = ", ".join(networks) or listed(sorted(tensors))
            raise ValueError(f"{where} holds no {kind}, but {contents}: give another file")
        return {kind: networks[kind]}
    if not networks:
        raise ValueError(f"{where} is not a Stable Diffusion model: it holds {listed(sorted(tensors)) or 'no tensors'}")
    prefixes = tuple(networks.values())
    if unknown := sorted(name for name in weights if not name.startswith(prefixes)):
        raise ValueError(f"{where} holds {len(unknown)} tensors that this library does not know: {listed(unknown)}")
    return networks


def read_config(kind: str, tensors: Tensors, prefix: str, where: str) -> dict[str, Any]:
    """Return the config.json of one network of a file; ValueError if it is incomplete or of another family."""
    network = within(tensors, prefix)
    try:
        plain, bits = unpack(to_diffusers(kind, network))
        config = READERS[kind](plain)
    except KeyError as error:
        raise ValueError(f"{where}: its {kind} is incomplete: {error.args[0]} is missing") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"{where}: its {kind} cannot be read: {error}") from error
    if kind == "vae" and "edm_mean" in tensors and "edm_std" in tensors:
        config |= {f"latents_{name}": tensors[f"edm_{name}"].flatten().tolist() for name in ("mean", "std")}
        config["scaling_factor"] = _PLAYGROUND_SCALING
    if bits:
        config["quantization"] = {"bits": bits, "group_size": GROUP}
    if kind == "text_encoder":
        config["architectures"] = ["CLIPTextModel"]  # its projection is not used
    if "positional_embedding" in network:
        config["hidden_act"] = "gelu"  # of every OpenCLIP
    return config


def within(tensors: Tensors, prefix: str) -> dict[str, mx.array]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# --- settings that shapes do not show ----------------------------------------------------------------------------


def _pipeline(family: Family, unet: Mapping[str, Any], where: str) -> str:
    if (channels := unet.get("in_channels", 4)) not in _MODES:
        raise ValueError(f"{where} has a UNet with {channels} input channels; supported: 4, 5, 8 and 9")
    if family is FAMILIES["refiner"]:
        return "StableDiffusionXLImg2ImgPipeline"
    if family is FAMILIES["sd1"] and unet.get("time_cond_proj_dim") is not None:
        return "LatentConsistencyModelPipeline"
    return f"StableDiffusion{'XL' if family is FAMILIES['xl'] else ''}{_MODES[channels]}Pipeline"


def _edm_scheduler(tensors: Tensors) -> dict[str, Any]:
    """Return the scheduler of an EDM model, identified by further tensors; empty for other models."""
    if "edm_mean" in tensors and "edm_std" in tensors:
        return dict(_PLAYGROUND)
    if "edm_vpred.sigma_max" not in tensors:
        return {}
    levels = {key.partition(".")[2]: tensors[key].item() for key in tensors if key.startswith("edm_vpred.")}
    return _COSXL | levels


def with_run(unet: Component, names: Tensors, metadata: Mapping[str, str]) -> Component:
    """Add to a UNet what its file says of the schedule, and how it is run if it is one for few steps."""
    (path,), scheduler, few_steps = unet.files[:1], _edm_scheduler(names), {}
    if stated := _stated_prediction(names, metadata):
        scheduler["prediction_type"] = stated
    elif re.search(r"lightning.*x0", path.stem):  # its variant for one step
        scheduler["prediction_type"] = "sample"
    if _is_flag("ztsnr", "ss_zero_terminal_snr", names, metadata):
        scheduler |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if unet.config.get("time_cond_proj_dim") is not None:
        # The guidance is an input of the UNet here, not a second pass (Luo et al. 2023).
        is_xl = unet.config.get("addition_embed_type") == "text_time"
        few_steps = {"sampler": "lcm", "num_steps": 4, "cfg_weight": 8.0 if is_xl else 8.5}
    else:
        few_steps = catalog.few_step_settings(path.as_posix(), metadata) or {}
    return replace(unet, scheduler=scheduler, few_steps=few_steps)


def _is_flag(tensor: str, key: str, names: Collection[str], metadata: Mapping[str, str]) -> bool:
    return tensor in names or metadata.get(key, "").lower() == "true"


def _stated_prediction(names: Collection[str], metadata: Mapping[str, str]) -> str | None:
    """Return the UNet's prediction type from metadata of trainers and mergers, or from an empty tensor as flag."""
    keys = ("modelspec.prediction_type", "modelspec.predict_key", "ss_prediction_type")
    stated = {metadata.get(key, "").lower() for key in keys}
    architecture = metadata.get("modelspec.architecture", "")
    is_v = _is_flag("v_pred", "ss_v_parameterization", names, metadata) or not stated.isdisjoint(_VELOCITY)
    if is_v or architecture.startswith("stable-diffusion-v2-768-v"):
        return "v_prediction"
    return "epsilon" if "epsilon" in stated or architecture.startswith("stable-diffusion-v2-512") else None


def _prediction(tensors: Tensors, metadata: Mapping[str, str], where: str, measured: str | None) -> str:
    """Return the UNet's prediction type: as recorded in the file, else "epsilon".

    For a UNet of Stable Diffusion 2, with the prefix ``measured``, it is derived from the standard deviation of the
    last transformer's first bias: 0.06 in 2.1-base, which predicts the noise, 0.53 in 2.1, which predicts the velocity.
    Other programs use the same tensor and bound.
    """
    if (stated := _stated_prediction(tensors, metadata)) or measured is None:
        return stated or "epsilon"
    unet = to_diffusers("unet", within(tensors, measured))
    biases = {(int(m[1]), int(m[2])): value for name, value in unet.items() if (m := _FIRST_BIAS.fullmatch(name))}
    spread = mx.std(biases[max(biases)].astype(mx.float32)).item() if biases else 0.0
    prediction = "v_prediction" if spread > 0.09 else "epsilon"
    text = "%s does not record its prediction type; its weights suggest %s (override: prediction)"
    _log.warning(text, where, prediction)
    return prediction


def _sample_size(family: Family, prediction: str, metadata: Mapping[str, str]) -> int | list[int]:
    """Return the size of the latents, or [height, width] if a trainer recorded its resolution."""
    size = re.fullmatch(r"([1-9][0-9]{2,3})x([1-9][0-9]{2,3})", metadata.get("modelspec.resolution", ""))
    if size:
        return [int(size[2]) // 8, int(size[1]) // 8]
    return 96 if family is FAMILIES["sd2"] and prediction == "v_prediction" else family.sample_size
