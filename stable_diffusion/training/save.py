"""Write the result of a training: the LoRA, for all programs, and checkpoints to resume a run."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..files.text import parse_json
from ..files.whole import new_file
from ..lora.save import write_lora
from ..weights.embeddings import write_embedding
from ..weights.files import read_file
from .trainer import LoRATrainer

FORMATS = ("kohya", "diffusers")
_MAY_CHANGE = ("steps", "checkpointing")  # when a run is resumed


def save_lora(trainer: LoRATrainer, path: Path, texts: Mapping[str, str] | None = None, naming: str = "kohya") -> None:
    """Write the factors, or their moving average, as a LoRA file in float16. It appears only when complete.

    The vectors of a new word become an embedding file, see :func:`stable_diffusion.weights.embeddings.write_embedding`.
    """
    if trainer.lora is None:
        vectors = trainer.average or trainer.factors()
        write_embedding(path, trainer.settings.new_word[0], list(vectors.values()), texts)
        return
    peft = "peft" if naming == "diffusers" else naming
    with averaged(trainer):
        write_lora(path, trainer.networks(), trainer.lora, naming=peft, dtype=mx.float16, metadata=texts)


@contextmanager
def averaged(trainer: LoRATrainer) -> Iterator[None]:
    """Replace the factors by their moving average, if there is one, inside the block."""
    factors = trainer.model.trainable_parameters()
    trainer.model.update(trainer.average)
    try:
        yield
    finally:
        trainer.model.update(factors)


def save_state(trainer: LoRATrainer, path: Path) -> None:
    """Write a checkpoint, the state of a run in one file, which appears only when complete."""
    with new_file(path) as partial, partial.open("wb") as file:
        mx.save_safetensors(file, trainer.state(), {"training": json.dumps(_identity(trainer))})


def load_state(trainer: LoRATrainer, path: Path) -> None:
    """Resume from a checkpoint. Raises ValueError, one line, for a damaged one or one of another run."""
    arrays, texts = read_file(path)
    if "training" not in texts:
        raise ValueError(f"{path} is not a training checkpoint; give one, such as NAME-000500.state.safetensors")
    found, expected = parse_json(texts["training"], path), _identity(trainer)
    for name, value in expected.items():
        if name not in _MAY_CHANGE and found.get(name) != value:
            change = f"with {name} {found.get(name)!r}, and this run has {value!r}"
            if name == "pictures":
                change = "with other pictures, captions, prior pictures, repeats or sizes, or another flip"
            raise ValueError(f"{path} was written by a run {change}; resume with the values of that run")
    try:
        mx.eval(arrays)
        trainer.load_state(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _identity(trainer: LoRATrainer) -> dict[str, Any]:
    """Return the values that a resumed run must share: settings, pictures, and sums of the weights."""
    digest, trained = hashlib.sha256(), trainer.factors().keys()
    for name, array in tree_flatten(trainer.model.parameters()):
        if name not in trained:
            total = array.reshape(-1).view(mx.uint16).astype(mx.uint32).sum()
            digest.update(f"{name} {array.dtype} {total.item()} ".encode())
    return asdict(trainer.settings) | {"model": digest.hexdigest()[:16], "pictures": trainer.data.digest}
