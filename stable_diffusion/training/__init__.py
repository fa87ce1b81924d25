"""Train a LoRA: a small file that teaches a model a new thing or style, from a few pictures.

A training is an iteration over steps; each is computed when it is asked for. docs/training.md has a program.
"""

from ..images.folders import read_pictures
from .dataset import Dataset
from .save import load_state, save_lora, save_state
from .settings import TrainingSettings
from .trainer import LoRATrainer, TrainingStep

__all__ = [
    "Dataset",
    "LoRATrainer",
    "TrainingSettings",
    "TrainingStep",
    "load_state",
    "read_pictures",
    "save_lora",
    "save_state",
]
