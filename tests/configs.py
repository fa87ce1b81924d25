"""Small configurations with the structure of each published model, as its config.json spells it; and these."""

from benchmarks.shapes import TEXT_ENCODERS as REAL_TEXT_ENCODERS  # noqa: F401
from benchmarks.shapes import UNETS as REAL_UNETS  # noqa: F401
from benchmarks.shapes import VAE as REAL_VAE  # noqa: F401

_SD1 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
_SD2 = _SD1 | {"attention_head_dim": [2, 4, 8], "use_linear_projection": True}
_XL = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 64,
    "attention_head_dim": [2, 4, 8],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
    "norm_num_groups": 8,
}

UNETS = {
    "sd1": _SD1,
    "sd2": _SD2,
    "sd2-v": _SD2 | {"upcast_attention": True},
    "inpaint": _SD1 | {"in_channels": 9},
    "depth": _SD2 | {"in_channels": 5},
    "pix2pix": _SD1 | {"in_channels": 8},
    "lcm": _SD1 | {"time_cond_proj_dim": 12},
    "lists": _SD1
    | {"layers_per_block": [1, 2, 3], "cross_attention_dim": [32, 32, 32], "transformer_layers_per_block": 1},
    "no-mid": _SD1 | {"mid_block_type": None},
    "shift": _SD1 | {"flip_sin_to_cos": False, "freq_shift": 1},
    "xl": _XL,
    "xl-inpaint": _XL | {"in_channels": 9},
    "refiner": _XL
    | {
        "block_out_channels": [32, 64, 64, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [2, 4, 8, 8],
        "transformer_layers_per_block": 2,
        "projection_class_embeddings_input_dim": 5 * 8 + 32,
    },
    "ssd-1b": _XL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 1],
    },
}
