"""The settings of a training run, their checks, and the settings file, before anything is computed."""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..options import SettingError
from ..training.settings import TrainingSettings
from .training_output import RunFiles, to_toml


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """Describe a run. ``settings`` are those of the trainer; the other fields are flags of the same name."""

    pictures: Path
    settings: TrainingSettings
    output: Path = Path("lora.safetensors")
    overwrite: bool = False
    config: str | None = None  # the file with these settings
    model: str = "sd15"
    revision: str | None = None
    quantize: bool = False
    dtype: str | None = None
    low_memory: bool = False
    trigger: str | None = None
    caption: str | None = None
    resolution: int | None = None
    flip: bool = False
    cache: Path | None = None
    prior: str | None = None
    prior_prompt: str | None = None
    preview: str | None = None
    preview_every: int = 250
    save_every: int = 250
    keep: int = 3
    measure_every: int = 100
    resume: str | None = None
    format: str = "kohya"

    def __post_init__(self) -> None:
        for name in ("trigger", "format", "prior") if self.settings.embedding else ():
            if getattr(self, name) != getattr(TrainingRequest, name):
                raise SettingError(f"{name} has no effect on an embedding; omit {name}", name)

    @property
    def word(self) -> str | None:
        """Return the word that stands in each caption: the trigger, or the new word of an embedding."""
        return self.settings.new_word[0] or self.trigger

    @property
    def drawn_prior(self) -> int | None:
        """Return the number of prior pictures to generate; None without them, or if a folder has them."""
        return int(self.prior) if self.prior is not None and self.prior.isdigit() else None


def check_output(request: TrainingRequest, files: RunFiles) -> None:
    """Raise ValueError or OSError if the LoRA cannot be written or would overwrite another run."""
    path = request.output
    if request.cache is not None and request.cache.exists() and not request.cache.is_dir():
        raise SettingError(f"the cache {request.cache} is a file; give a folder", "cache")
    if path.is_dir():
        raise SettingError(f"the output {path} is a folder; give the path of a file in it", "output")
    if path.suffix != ".safetensors":
        raise SettingError(f"the output {path} has the wrong suffix; give a name that ends in .safetensors", "output")
    if not path.parent.is_dir():
        raise SettingError(f"the output folder {path.parent} does not exist; create it first", "output")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"the output folder {path.parent} is not writable; choose another one")
    config = None if request.config is None else Path(request.config).expanduser().resolve()
    existing = [file for file in files.existing(request.preview is not None) if file.resolve() != config]
    if existing and not request.overwrite and request.resume is None:
        remedy = "choose another output, replace it with overwrite, or continue its run with resume latest"
        raise SettingError(f"{existing[0]} exists; {remedy}", "output", "overwrite", "resume")


def find_state(request: TrainingRequest, files: RunFiles) -> Path:
    """Return the checkpoint to resume. Raises ValueError, one line, if it does not exist."""
    if request.resume != "latest":
        path = Path(request.resume).expanduser()
        if not path.is_file():
            raise SettingError(f"the checkpoint {path} does not exist; check the path, or give latest", "resume")
        return path
    if not (states := files.states()):
        raise SettingError(f"no checkpoint found beside {request.output}; omit resume", "resume")
    return states[-1]


def write_settings(request: TrainingRequest, path: Path, **resolved: Any) -> None:
    """Write all settings as a .toml file for --config; never overwrite the config file itself.

    ``resolved`` are the values of settings that the request does not decide.
    """
    if request.config is not None and Path(request.config).expanduser().resolve() == path.resolve():
        return
    left_out = {"settings", "config", "overwrite", "resume"}
    values = {field.name: getattr(request, field.name) for field in fields(request) if field.name not in left_out}
    values |= asdict(request.settings) | resolved
    values["device"] = "gpu" if mx.default_device() == mx.gpu else "cpu"
    if request.prior is not None and request.drawn_prior is None:
        values["prior"] = Path(request.prior).expanduser()
    values = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}
    path.write_text(to_toml(values), encoding="utf-8")
