"""Derive the config.json of a network from the names and shapes of its tensors.

Settings that shapes do not show (heads, activation) are those of the published models with that shape.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

Tensors = Mapping[str, mx.array]  # lazy, under diffusers' names, weights laid out as in files

_FACE_WIDTH = 512  # of face embeddings in all published files


def count(tensors: Tensors, pattern: str) -> int:
    """Count the items of a list, whose numbers ``pattern`` finds in the names."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _one_for_all(numbers: list) -> Any:
    return numbers[0] if len(set(numbers)) == 1 else numbers


def _depths(tensors: Tensors, block: str) -> list[int]:
    transformers = range(count(tensors, rf"{block}\.attentions\.(\d+)\."))
    return [count(tensors, rf"{block}\.attentions\.{i}\.transformer_blocks\.(\d+)\.") for i in transformers]


def _levels(tensors: Tensors, side: str) -> list[list[int]]:
    """List the layers of each transformer, block by block, on one side of a UNet."""
    return [_depths(tensors, f"{side}_blocks.{i}") for i in range(count(tensors, rf"{side}_blocks\.(\d+)\."))]


def _half_unet(tensors: Tensors) -> dict[str, Any]:
    down, middle = _levels(tensors, "down"), _depths(tensors, "mid_block")
    widths = [tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(len(down) or 1)]
    contexts = [value.shape[1] for name, value in tensors.items() if name.endswith(".attn2.to_k.weight")]
    linear = any(v.ndim == 2 for name, v in tensors.items() if name.endswith(".proj_in.weight"))
    resnets = [count(tensors, rf"down_blocks\.{i}\.resnets\.(\d+)\.") for i in range(len(down))]
    layers = [_one_for_all(block) if block else 1 for block in down]
    if middle and not down[-1]:
        layers[-1] = middle[0]  # its place in configs
    has_middle = "mid_block.resnets.0.conv1.weight" in tensors
    mid_block = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
    config: dict[str, Any] = {
        "in_channels": tensors["conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": _one_for_all(resnets),
        "down_block_types": ["CrossAttnDownBlock2D" if block else "DownBlock2D" for block in down],
        "mid_block_type": mid_block if has_middle else None,
        "transformer_layers_per_block": layers,
        "cross_attention_dim": contexts[0] if contexts else 2048,  # a small ControlNet of XL reads no prompt
        # Stable Diffusion 1 has 8 heads everywhere, all later ones have heads of 64 channels.
        "attention_head_dim": [max(width // 64, 1) for width in widths] if linear else 8,
        "use_linear_projection": linear,
    }
    if "add_embedding.linear_1.weight" in tensors:
        config["addition_embed_type"] = "text_time"
        config["addition_time_embed_dim"] = 256
        config["projection_class_embeddings_input_dim"] = tensors["add_embedding.linear_1.weight"].shape[1]
    elif linear:
        config["upcast_attention"] = True  # Stable Diffusion 2.1 overflows in half precision
    return config


def _unet(tensors: Tensors) -> dict[str, Any]:
    up = _levels(tensors, "up")
    config = _half_unet(tensors) | {
        "_class_name": "UNet2DConditionModel",
        "out_channels": tensors["conv_out.weight"].shape[0],
        "up_block_types": ["CrossAttnUpBlock2D" if block else "UpBlock2D" for block in up],
        "reverse_transformer_layers_per_block": [_one_for_all(block) if block else 1 for block in up],
    }
    if "time_embedding.cond_proj.weight" in tensors:
        config["time_cond_proj_dim"] = tensors["time_embedding.cond_proj.weight"].shape[1]
    return config


def _lllite(tensors: Tensors) -> dict[str, Any]:
    """Read a ControlNet-LLLite. ValueError if it changes convolutions."""
    layers = sorted({name.partition(".")[0] for name in tensors})
    down, second = ([tensors[f"{layer}.{part}.weight"] for layer in layers] for part in ("down.0", "conditioning1.2"))
    if convolutions := [layer for layer, weight in zip(layers, down, strict=True) if weight.ndim == 4]:
        raise ValueError(f"it changes convolutions, such as {convolutions[0]}, which is not supported: use one for XL")
    thirds = [f"{layer}.conditioning1.4.weight" in tensors for layer in layers]
    return {
        "_class_name": "ControlNetLLLite",
        "layers": layers,
        "widths": [weight.shape[1] for weight in down],
        "depths": [3 if third else weight.shape[-1] // 2 for third, weight in zip(thirds, second, strict=True)],
        "cond_emb_dim": 2 * tensors[f"{layers[0]}.conditioning1.0.weight"].shape[0],
        "mlp_dim": down[0].shape[0],
    }


def _adapter(tensors: Tensors) -> dict[str, Any]:
    """Read a T2I-Adapter, whose input is squares of pixels in grey or RGB."""
    is_light = "adapter.conv_in.weight" not in tensors
    first, last = ("body.0.in_conv", "out_conv") if is_light else ("conv_in", "resnets.0.block1")
    read = tensors[f"adapter.{first}.weight"].shape[1]
    stages = count(tensors, r"adapter\.body\.(\d+)\.")
    widths = [tensors[f"adapter.body.{i}.{last}.weight"].shape[0] for i in range(stages)]
    side = math.isqrt(read) if (is_grey := math.isqrt(read) ** 2 == read) else math.isqrt(read // 3)
    return {
        "_class_name": "T2IAdapter",
        "in_channels": 1 if is_grey else 3,
        "channels": widths[:-1] if is_light else widths,
        "num_res_blocks": count(tensors, r"adapter\.body\.0\.resnets\.(\d+)\."),
        "downscale_factor": side,
        "adapter_type": "light_adapter" if is_light else "full_adapter_xl" if side == 16 else "full_adapter",
    }


def _controlnet(tensors: Tensors) -> dict[str, Any]:
    if "adapter.body.0.resnets.0.block1.weight" in tensors:
        return _adapter(tensors)
    if any(".conditioning1.0." in name for name in tensors):
        return _lllite(tensors)
    embedding = "controlnet_cond_embedding"
    names = ["conv_in", *(f"blocks.{i}" for i in range(1, count(tensors, rf"{embedding}\.blocks\.(\d+)\."), 2))]
    widths = [tensors[f"{embedding}.{name}.weight"].shape[0] for name in names]
    task = tensors.get("task_embedding")  # of a union ControlNet
    own = {
        "_class_name": "ControlNetModel",
        "conditioning_channels": tensors[f"{embedding}.conv_in.weight"].shape[1],
        "conditioning_embedding_out_channels": widths,
        "num_control_type": None if task is None else task.shape[0],
        "num_trans_layer": count(tensors, r"transformer_layes\.(\d+)\.") or None,
    }
    # A Control-LoRA does not describe its UNet.
    return own | {"_class_name": "ControlLoRA"} if "lora_controlnet" in tensors else _half_unet(tensors) | own


def _vae(tensors: Tensors) -> dict[str, Any]:
    is_tiny = "decoder.layers.0.weight" in tensors
    latent = tensors[f"decoder.{'layers.0' if is_tiny else 'conv_in'}.weight"].shape[1]
    if latent != 4:
        raise ValueError(f"the VAE has {latent} latent channels; those of Stable Diffusion 1, 2 and XL have 4")
    if is_tiny:
        alone = {"encoder_block_out_channels": [], "num_encoder_blocks": []}  # the decoder
        return {"_class_name": "AutoencoderTiny"} | ({} if "encoder.layers.0.weight" in tensors else alone)
    levels = count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    widths = [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels or 1)]
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": widths,
        "layers_per_block": count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": latent,
        "scaling_factor": None,  # its family's
    }


def _text_encoder(tensors: Tensors) -> dict[str, Any]:
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    config = {
        "architectures": ["CLIPTextModel"],
        "hidden_size": width,
        "intermediate_size": tensors["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(tensors, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": tensors["text_model.embeddings.position_embedding.weight"].shape[0],
        "vocab_size": vocabulary,
        "hidden_act": "quick_gelu" if width <= 768 else "gelu",
        "eos_token_id": min(49407, vocabulary - 1),
    }
    if (projection := tensors.get("text_projection.weight")) is not None:
        config |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": projection.shape[0]}
    return config


def _ip_adapter(tensors: Tensors) -> dict[str, Any]:
    layers = count(tensors, r"ip_adapter\.(\d+)\.to_k_ip\.")
    keys = [tensors[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"] for i in range(layers or 1)]
    config = {"attention_widths": [key.shape[0] for key in keys], "context_width": keys[0].shape[1]}
    shapes = {name.removeprefix("image_proj."): value.shape for name, value in tensors.items()}
    if "latents" in shapes:
        config |= {
            "image_proj": "resampler",
            "image_width": shapes["proj_in.weight"][1],
            "num_tokens": shapes["latents"][1],
            "hidden_size": shapes["latents"][2],
            "attention_size": shapes["layers.0.0.to_q.weight"][0],
            "intermediate_size": shapes["layers.0.1.1.weight"][0],
            "num_hidden_layers": count(tensors, r"image_proj\.layers\.(\d+)\."),
        }
    elif "proj.weight" in shapes:
        tokens, width = shapes["proj.weight"]
        config |= {"image_proj": "linear", "image_width": width, "num_tokens": tokens // config["context_width"]}
    else:
        config |= {"image_proj": "mlp", "image_width": shapes["proj.0.weight"][1]}
    is_face = any("_lora." in name or name.startswith("perceiver_resampler.") for name in shapes)
    if is_face or ("norm.weight" in shapes and "proj.0.weight" in shapes) or config["image_width"] == _FACE_WIDTH:
        text = "it is a FaceID adapter, which needs a face detector and is not supported"
        raise ValueError(f"{text}: use one for images, such as ip-adapter-plus-face")
    return config


def _image_encoder(tensors: Tensors) -> dict[str, Any]:
    positions, width = tensors["vision_model.embeddings.position_embedding.weight"].shape
    patch = tensors["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    return {
        "hidden_size": width,
        "intermediate_size": tensors["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(tensors, r"vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": 16 if width >= 1024 else max(width // 64, 1),
        "image_size": patch * math.isqrt(positions - 1),
        "patch_size": patch,
        "hidden_act": "quick_gelu" if width <= 1024 else "gelu",  # OpenAI's, and OpenCLIP's
        "projection_dim": tensors["visual_projection.weight"].shape[0],
    }


def _upscaler(tensors: Tensors) -> dict[str, Any]:
    def channels(name: str, axis: int) -> int:
        if (weight := tensors[name]).ndim != 4:
            raise ValueError(f"{name} has {weight.ndim} axes; a convolution has 4")
        return weight.shape[axis]

    if "conv_first.weight" in tensors:
        config = {"_class_name": "RRDBNet", "num_feat": channels("conv_first.weight", 0)}
        config |= {
            "num_grow_ch": channels("body.0.rdb1.conv1.weight", 0),
            "num_block": count(tensors, r"body\.(\d+)\."),
        }
        config |= {"num_upsampling": count(tensors, r"conv_up(\d+)\.")}
        read, written = channels("conv_first.weight", 1), channels("conv_last.weight", 0)
        side = config["unshuffle"] = math.isqrt(read // 3)
        colours = read / side**2 if side else read
    else:
        last = max(int(match[1]) for name in tensors if (match := re.match(r"body\.(\d+)\.", name)))
        if not any(tensors[name].ndim == 1 for name in tensors if re.fullmatch(r"body\.\d*[13579]\.weight", name)):
            raise ValueError("it has consecutive convolutions without PReLU, which is not supported")
        side = math.isqrt(channels(f"body.{last}.weight", 0) // 3)
        config = {"_class_name": "SRVGGNetCompact", "num_feat": channels("body.0.weight", 0), "scale": side}
        config |= {"num_conv": last // 2 - 1}
        colours, written = channels("body.0.weight", 1), channels(f"body.{last}.weight", 0) / max(side, 1) ** 2
    if (colours, written) != (3, 3):
        raise ValueError(f"it has {colours:g} input and {written:g} output channels: only RGB upscalers are supported")
    return config


# Functions from the tensors of a network to its config. They raise KeyError with the name of a missing tensor, and
# ValueError for an unsupported network.
READERS: dict[str, Callable[[Tensors], dict[str, Any]]] = {"unet": _unet, "vae": _vae, "controlnet": _controlnet}
READERS |= dict.fromkeys(("text_encoder", "text_encoder_2"), _text_encoder)
READERS |= {"ip_adapter": _ip_adapter, "image_encoder": _image_encoder, "safety_checker": _image_encoder}
READERS["upscaler"] = _upscaler
