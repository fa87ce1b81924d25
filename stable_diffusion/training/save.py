"""Write what is trained: the LoRA, for all programs, and checkpoints from which a run goes on."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..lora.save import write_lora
from ..models.config import parse_json
from ..weights.files import read_file
from .dataset import Dataset, resolution_of
from .trainer import LoRATrainer

FORMATS = ("kohya", "diffusers")
_FAMILIES = {  # width of the encoded prompt: names in kohya's scripts and in the model specification of Stability AI
    768: ("sd_v1", "stable-diffusion-v1"),
    1024: ("sd_v2", "stable-diffusion-v2"),
    2048: ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
}
_PREDICTIONS = {"v_prediction": "v"}


def metadata(trainer: LoRATrainer, data: Dataset, trigger: str | None = None, title: str = "") -> dict[str, str]:
    """Return the texts in the header of a LoRA file: those of kohya's scripts, and of the model specification 1.0.0."""
    settings, sd = trainer.settings, trainer.sd
    side = resolution_of(sd)
    version, architecture = _FAMILIES.get(max(sd.unet_config.cross_attention_dim), ("unknown", "unknown"))
    words = Counter(
        word.strip() for p in data.sets[0].pictures for word in (p.caption or "").split(",") if word.strip()
    )
    rank = settings.rank
    texts = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank if settings.alpha is None else settings.alpha,
        "ss_base_model_version": version,
        "ss_resolution": f"({side}, {side})",
        "ss_num_train_images": len(data.sets[0].pictures),
        "ss_steps": trainer.step,
        "ss_learning_rate": settings.learning_rate,
        "ss_optimizer": settings.optimizer,
        "ss_seed": settings.seed,
        "ss_min_snr_gamma": settings.min_snr or None,
        "ss_noise_offset": settings.noise_offset or None,
        "ss_tag_frequency": json.dumps({"pictures": dict(words.most_common())}, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": _PREDICTIONS.get(sd.schedule.config.prediction_type, "epsilon"),
        "modelspec.trigger_phrase": trigger,
    }
    return {name: str(value) for name, value in texts.items() if value not in (None, "")}


def save_lora(trainer: LoRATrainer, path: Path, texts: Mapping[str, str], naming: str = "kohya") -> None:
    """Write the factors, or their moving average, as a LoRA file in float16 that appears complete or not at all."""
    peft = "peft" if naming == "diffusers" else naming
    with averaged(trainer):
        write_lora(path, trainer.networks(), trainer.lora, naming=peft, dtype=mx.float16, metadata=texts)


@contextmanager
def averaged(trainer: LoRATrainer) -> Iterator[None]:
    """Give the model the moving average of the factors, where there is one, for a while."""
    factors = trainer.factors()
    trainer.model.update(tree_unflatten(list(trainer.average.items())))
    try:
        yield
    finally:
        trainer.model.update(tree_unflatten(list(factors.items())))


def save_state(trainer: LoRATrainer, path: Path) -> None:
    """Write a checkpoint, all of a run's state in one file that appears complete or not at all."""
    partial = path.with_name(f".{path.stem}.partial.safetensors")
    mx.save_safetensors(str(partial), trainer.state(), {"training": json.dumps(_identity(trainer))})
    partial.replace(path)


def load_state(trainer: LoRATrainer, path: Path) -> None:
    """Go on from a checkpoint. Raises ValueError, one line, for a damaged one, and one of another run."""
    arrays, texts = read_file(path)
    if "training" not in texts:
        raise ValueError(f"{path} is no checkpoint of a training; give one, such as NAME-000500.state.safetensors")
    found, expected = parse_json(texts["training"], path), _identity(trainer)
    for name, value in expected.items():
        if name not in ("step", "steps") and found.get(name) != value:
            change = f"with {name} {found.get(name)!r}, and this run has {value!r}"
            raise ValueError(f"{path} was written by a run {change}; resume with the settings of that run")
    try:
        mx.eval(arrays)
        trainer.load_state(arrays, found["step"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _identity(trainer: LoRATrainer) -> dict:
    """Return what a run that goes on must have in common with the one before, and the step."""
    digest = hashlib.sha256()
    for layer in (trainer.sd.unet.conv_in, trainer.sd.unet.conv_out, trainer.sd.unet.time_embedding):
        for name, array in tree_flatten(layer.parameters()):
            digest.update(name.encode() + bytes(memoryview(array.astype(mx.float32).reshape(-1).view(mx.uint8))))
    return trainer.settings.as_dict() | {"model": digest.hexdigest()[:16], "step": trainer.step}
