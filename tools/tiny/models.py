"""The components of the tiny model as diffusers and transformers classes, with the sizes chosen here.

Sizes follow from two limits: all files in float16 fit 12 MB, and an image of 20 guided steps takes two seconds at the
2 GFLOP/s that MLX's CPU backend has without OpenBLAS. Widths are multiples of 32, so that every linear layer can be
quantized in groups of 32.
"""

from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

LATENT_SIZE = 16
CONTEXT = 128  # width of the text encoder

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def make_scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(**SCHEDULER, prediction_type=prediction)


def make_vae() -> AutoencoderKL:
    """64x64x3 -> 16x16x4. The latents are brought to deviation 1 / scaling_factor after the training."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.18215,
    )


def make_text_encoder(vocab_size: int) -> CLIPTextModel:
    """CLIP's text transformer, small; the last two ids of the vocabulary are <|startoftext|> and <|endoftext|>."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=CONTEXT,
            intermediate_size=4 * CONTEXT,
            projection_dim=CONTEXT,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def make_unet(in_channels: int = 4) -> UNet2DConditionModel:
    """16x16 -> 8x8 -> 4x4, with attention at the two small sizes. `attention_head_dim` is the number of heads."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        block_out_channels=[32, 32, 96],
        layers_per_block=1,
        attention_head_dim=[2, 2, 4],
        cross_attention_dim=CONTEXT,
        norm_num_groups=16,
    )
