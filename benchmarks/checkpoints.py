"""Checkpoints of random weights, in half precision as published ones are, with the vocabulary of the bundled model."""

import json
import math
import shutil
from pathlib import Path

from stable_diffusion import StableDiffusion  # noqa: F401  (before MLX: it brings OpenBLAS, where there is one)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from stable_diffusion.weights.files import open_checkpoint
from stable_diffusion.weights.load import build
from stable_diffusion.weights.save import stored_tensors, write_weights

from .shapes import SHAPES

_POOL = 2**22  # random values that all weights are cut from
_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_SCHEDULER = {"_class_name": "EulerDiscreteScheduler", "num_train_timesteps": 1000, "steps_offset": 1}
_SCHEDULER |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def write_checkpoint(folder: Path, shape: str, weights: bool = True) -> None:
    """Write a checkpoint of one of ``SHAPES`` in diffusers layout; without ``weights``, its configurations alone."""
    parts = SHAPES[shape]
    pipeline = "StableDiffusionXLPipeline" if "text_encoder_2" in parts else "StableDiffusionPipeline"
    index = {"_class_name": pipeline, "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    for name, config in parts.items():
        (folder / name).mkdir(parents=True)
        is_text = name.startswith("text_encoder")
        index[name] = ["transformers", config["architectures"][0]] if is_text else ["diffusers", _CLASSES[name]]
        _write(folder / name / "config.json", config if is_text else {"_class_name": _CLASSES[name]} | config)
        if weights:
            _write_weights(folder / name, "model" if is_text else "diffusion_pytorch_model", build(name, config))
        if is_text:
            tokenizer = name.replace("text_encoder", "tokenizer")
            shutil.copytree(open_checkpoint("tiny").tokenizers["tokenizer"], folder / tokenizer)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "scheduler").mkdir()
    _write(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write(folder / "model_index.json", index)


def write_taesd(folder: Path) -> None:
    """Write the weights of a TAESD, ``taesd.safetensors``."""
    _write_weights(folder, "taesd", build("vae", {"_class_name": "AutoencoderTiny"}))


def _write_weights(folder: Path, stem: str, network: nn.Module) -> None:
    pool = (0.02 * mx.random.normal((_POOL,), key=mx.random.key(0))).astype(mx.float16)
    tensors = {key: _cut(pool, value.shape) for key, value in stored_tensors(network).items()}
    write_weights(folder, stem, tensors, 10**12)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _cut(pool: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Values of the pool, as often as they are needed; lazy."""
    count = math.prod(shape)
    return mx.tile(pool, -(-count // _POOL))[:count].reshape(shape)
