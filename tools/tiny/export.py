"""Writes a trained model in the layout of diffusers' StableDiffusionPipeline, weights in float16."""

import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel

from tools.tiny import models

MODEL_INDEX = {
    "_diffusers_version": "0.42.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(
    out: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: Path,
    prediction: str,
) -> None:
    """Rewrites the folder `out`; `tokenizer` is the folder with the tokenizer's files."""
    for name, module in (("vae", vae), ("unet", unet)):
        copy.deepcopy(module).cpu().half().save_pretrained(out / name)
    config = copy.deepcopy(text_encoder.config)
    config.architectures, config.dtype = ["CLIPTextModel"], "float32"  # to compute in, so that it fits the others
    config.save_pretrained(out / "text_encoder")
    # Checkpoints on the Hub name these text_model.*, whatever the version of transformers that is installed.
    tensors = {"text_model." + k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items()}
    tensors = {k: v.cpu().half().contiguous() for k, v in tensors.items() if v.dtype == torch.float32}
    save_file(tensors, out / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    models.make_scheduler(prediction).save_pretrained(out / "scheduler")
    (out / "tokenizer").mkdir(exist_ok=True)
    for file in sorted(tokenizer.iterdir()):
        shutil.copy(file, out / "tokenizer" / file.name)
    pipeline = "StableDiffusionInpaintPipeline" if unet.config.in_channels == 9 else "StableDiffusionPipeline"
    (out / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **MODEL_INDEX}, indent=2) + "\n")
