"""Configurations of the published models, without the keys that say nothing about the structure, and the tiny one."""

import json
from pathlib import Path

_TINY = Path(__file__).parents[1] / "stable_diffusion" / "tiny"

_SD15_TYPES = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_SD15 = _SD15_TYPES | {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
}
_XL = _SD15 | {
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "dual_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": 2816,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_embedding_type": "positional",
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
UNETS = {
    "sd15": _SD15,
    "sd15-inpainting": _SD15 | {"in_channels": 9},
    "sd21": _SD15
    | {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 96,
        "upcast_attention": True,
        "use_linear_projection": True,
    },
    "sdxl-base": _XL,
    "sdxl-refiner": _XL
    | {
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "ssd-1b": _XL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    },
    "lcm-dreamshaper-v7": _SD15 | {"time_cond_proj_dim": 256},
}
VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_CLIP_L = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
TEXT_ENCODERS = {
    "sd15": _CLIP_L,
    "sd21": _CLIP_L
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    "sdxl-2": _CLIP_L
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
}


def _tiny(part: str) -> dict:
    raw = json.loads((_TINY / part / "config.json").read_text(encoding="utf-8"))
    raw.pop("transformer_layers_per_block", None)  # 1 as everywhere else; mlx-examples reads it only as a list
    return raw


# The parts that make an image; "tiny" are the bundled model's.
SHAPES = {
    "tiny": {part: _tiny(part) for part in ("unet", "vae", "text_encoder")},
    "sd15": {"unet": UNETS["sd15"], "vae": VAE, "text_encoder": TEXT_ENCODERS["sd15"]},
    "sd21": {"unet": UNETS["sd21"], "vae": VAE, "text_encoder": TEXT_ENCODERS["sd21"]},
    "sdxl": {
        "unet": UNETS["sdxl-base"],
        "vae": VAE | {"scaling_factor": 0.13025},
        "text_encoder": TEXT_ENCODERS["sd15"],
        "text_encoder_2": TEXT_ENCODERS["sdxl-2"],
    },
}
