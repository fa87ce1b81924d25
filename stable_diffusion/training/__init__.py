"""Train a LoRA: a small file that teaches a model a new thing or style, from a few pictures.

A training is an iteration over steps; each is computed when it is asked for:

    from pathlib import Path
    from stable_diffusion import StableDiffusion
    from stable_diffusion.training import Dataset, LoRATrainer, TrainingSettings, read_pictures, save_lora

    sd = StableDiffusion("sd15")
    settings = TrainingSettings(steps=1000, rank=16)
    pictures, remarks = read_pictures(Path("photos"), 512, trigger="ohwx")
    trainer = LoRATrainer(sd, Dataset(sd, pictures, settings), settings)
    for step in trainer:
        print(step.number, step.loss, step.learning_rate, step.seconds)
    save_lora(trainer, Path("me.safetensors"))
    image, = sd.generate("ohwx riding a horse", seed=1)   # with the LoRA
    trainer.lora.detach()                                 # without it
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
