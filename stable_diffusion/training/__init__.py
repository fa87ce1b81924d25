"""Train a LoRA: a small file that adds a new subject or style to a model, from a few pictures.

A training is an iteration over steps; each step is computed on iteration. docs/training.md has an example.
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
