"""Train a LoRA from a folder of pictures: what a run is asked for, its checks, its loop and its files."""

import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from ..files.whole import check_space
from ..images.files import open_image, read_text, save
from ..images.folders import Picture, read_pictures
from ..options import SettingError
from ..pipeline import StableDiffusion
from ..text.encode import Conditioning
from ..training.dataset import Dataset, resolution_of
from ..training.loss import seed_of
from ..training.save import averaged, load_state, save_lora, save_state
from ..training.settings import TrainingSettings
from ..training.trainer import LoRATrainer, TrainingStep
from ..weights.load import size_in_bytes
from . import processes
from .engine import open_model
from .memory import available, set_limits, training_bytes
from .request import Request
from .training_output import Event, LossTable, RunFiles, add_row, header_texts, to_toml
from .training_plan import predicted_seconds, step_operations

_log = logging.getLogger("stable_diffusion")

_MEASURED, _DRAWS = 4, 4  # pictures, and levels of noise for each, of a measurement
_PREVIEWS = 4  # pictures of a row
_TRIED = 3  # steps of a dry run


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """Describe a run. ``settings`` are those of the trainer; the other fields are flags of the same name."""

    pictures: Path
    settings: TrainingSettings
    output: Path = Path("lora.safetensors")
    overwrite: bool = False
    config: str | None = None  # the file that it was read from
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
                raise SettingError(f"{name} has no effect on an embedding; leave {name} out", name)

    @property
    def word(self) -> str | None:
        """Return the word that stands in each caption: the trigger, or the new word of an embedding."""
        return self.settings.new_word[0] or self.trigger


class TrainingRun:
    """Prepare a run and make it: ``prepare``, ``steps``, ``finish``, each to be iterated over.

    All that can be wrong shows when it is made, as ValueError or OSError, one line; nothing is computed or written.
    ``remarks`` are lines about pictures that are left out or changed.

    Of several processes (``group``) each makes the same calls, ``agree`` first, and has a batch of its own in each
    step. The first one alone writes files, previews and measurements, and yields what it does.
    """

    def __init__(self, request: TrainingRequest, group: processes.Group | None = None):
        self.request, self.files, self.group = request, RunFiles(request.output), group
        self.is_first, count = processes.is_first(group), 1 if group is None else group.size()
        self.settings = replace(request.settings, batch_size=request.settings.batch_size * count)
        if self.is_first:
            self._check_output()
        else:
            self._temporary = tempfile.TemporaryDirectory()
            self.files = RunFiles(Path(self._temporary.name, request.output.name))
        if not request.pictures.is_dir():  # before a model is downloaded
            raise ValueError(f"there is no folder {request.pictures} with pictures; check the path")
        dtype = request.dtype or ("bfloat16" if mx.default_device() == mx.gpu else None)
        model = Request(model=request.model, revision=request.revision, quantize=request.quantize, dtype=dtype)
        set_limits(None, request.low_memory)
        self.sd = open_model(model, request.low_memory)
        self.sd.low_memory = False  # networks that are trained stay; the others are freed by ``_free``
        self._side = resolution_of(self.sd) if request.resolution is None else request.resolution
        texts = {"caption": request.caption, "trigger": request.word}
        self._pictures, self.remarks = read_pictures(request.pictures, self._side, **texts)
        if not LossTable.can_draw():
            self.remarks.append(f'losses are in {self.files.table} without a curve; pip install ".[train]" draws one')
        self._check_prior()
        self.data = self._dataset()
        self.trainer = LoRATrainer(self.sd, self.data, self.settings, group)
        self.remarks += _too_long(self.sd, self._pictures)
        self.recomputes = request.settings.checkpointing == "on"
        if request.settings.checkpointing == "auto":
            self.recomputes = self.step_memory(recomputes=False) > available()
        self.trainer.recompute(self.recomputes)
        self._table: LossTable | None = None
        self._preview_prompt: tuple[Conditioning, Conditioning] | None = None
        if not self.is_first:
            return
        if request.resume is not None:
            load_state(self.trainer, self._state_file())
        lora = sum(factor.nbytes for factor in self.trainer.factors().values())
        state = sum(array.nbytes for array in self.trainer.state().values())
        check_space(request.output, lora + state * (request.keep + 1 if request.save_every else 1))

    def agree(self) -> None:
        """Give all processes the checkpoint of the first. Raises ValueError where they do not do the same."""
        if self.group is None:
            return
        shown = [pictures.digest for pictures in self.data.sets]
        if len(set(processes.texts(str(seed_of(*shown, self.settings, self.sd.dtype)), self.group))) > 1:
            raise ValueError(
                "pictures, captions or settings of the processes differ; give each the same folder and flags"
            )
        if self.request.resume is not None:
            self.trainer.load_state(processes.of_first(self.trainer.state(), self.group))

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_output(self) -> None:
        """Raise ValueError or OSError unless a LoRA can be written and no file of another run is replaced."""
        request, path = self.request, self.request.output
        if request.cache is not None and request.cache.exists() and not request.cache.is_dir():
            raise SettingError(f"the cache {request.cache} is a file; give a folder", "cache")
        if path.is_dir():
            raise SettingError(f"the output {path} is a folder; give the path of a file in it", "output")
        if path.suffix != ".safetensors":
            raise SettingError(f"the output {path} is no .safetensors file; name it so", "output")
        if not path.parent.is_dir():
            raise SettingError(f"the output folder {path.parent} does not exist; create it first", "output")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"the output folder {path.parent} is not writable; choose another one")
        config = None if request.config is None else Path(request.config).expanduser().resolve()
        existing = [file for file in self.files.existing(request.preview is not None) if file.resolve() != config]
        if existing and not request.overwrite and request.resume is None:
            remedy = "choose another output; overwrite replaces it, resume latest goes on with its run"
            raise SettingError(f"{existing[0]} exists; {remedy}", "output", "overwrite", "resume")

    def _check_prior(self) -> None:
        """Read the prior pictures, unless they are drawn later."""
        request = self.request
        self._prior: list[Picture] = []
        if request.prior is None:
            return
        if not request.prior_prompt:
            raise SettingError("prior needs prior_prompt, what its pictures show", "prior", "prior_prompt")
        if not request.prior.isdigit():
            folder = Path(request.prior).expanduser()
            self._prior, lines = read_pictures(folder, self._side, caption=request.prior_prompt)
            self.remarks += lines

    def _state_file(self) -> Path:
        if self.request.resume != "latest":
            path = Path(self.request.resume).expanduser()
            if not path.is_file():
                raise SettingError(f"there is no checkpoint {path} to resume; check the path, or give latest", "resume")
            return path
        if not (states := self.files.states()):
            raise SettingError(f"there is no checkpoint beside {self.request.output}; leave resume out", "resume")
        return states[-1]

    # --- what is trained ---------------------------------------------------------------------------------------------

    def _dataset(self) -> Dataset:
        request = self.request
        options = {"prior": self._prior, "resolution": self._side, "flip": request.flip}
        return Dataset(self.sd, self._pictures, self.settings, **options)

    def _latent_sizes(self) -> list[tuple[int, int]]:
        """Return the sizes (height, width) of latents that are trained with."""
        scale = self.sd.pixels_per_latent
        return [(height // scale, width // scale) for s in self.data.sets for width, height in s.sizes]

    def step_memory(self, recomputes: bool) -> int:
        """Return the bytes that a step of the largest pictures is predicted to take, weights among them."""
        unet, rows = self.sd.unet, self.request.settings.batch_size
        step = max(training_bytes(unet, rows, size, recomputes) for size in self._latent_sizes())
        factors = sum(factor.nbytes for factor in self.trainer.factors().values())
        # A factor is among the weights; it has a gradient and the optimizer's two moments.
        return step + 3 * factors + sum(map(size_in_bytes, (self.trainer.networks() | {"unet": unet}).values()))

    def plan(self) -> dict[str, Any]:
        """Return figures of the run: pictures, their sizes, steps, epochs, trained numbers."""
        data, settings = self.data, self.settings
        gradients = self.request.settings.batch_size * settings.accumulate * len(data.sets)
        operations = max(step_operations(self.sd.unet, gradients, size) for size in self._latent_sizes())
        return {
            "tflop": float(f"{operations / 1e12:.3g}"),
            "predicted_seconds": predicted_seconds(operations),
            "processes": 1 if self.group is None else self.group.size(),
            "batch_size": self.request.settings.batch_size,
            "pictures": len(self._pictures),
            "sizes": {f"{width}x{height}": count for (width, height), count in data.sets[0].sizes.items()},
            "prior": len(self._prior) if not (self.request.prior or "").isdigit() else int(self.request.prior),
            "steps": settings.steps,
            "first_step": self.trainer.step + 1,
            "epochs": round(settings.steps * settings.accumulate / data.epoch_length(), 3),
            "embedding": settings.embedding,
            "factors": len(self.trainer.factors()),
            "parameters": sum(factor.size for factor in self.trainer.factors().values()),
            "checkpointing": self.recomputes,
            "planned_gb": round(self.step_memory(self.recomputes) / 1e9, 3),
        }

    def time_steps(self) -> dict[str, Any]:
        """Return seconds and memory of a step, from three that are undone. Nothing is written or drawn."""
        trainer, settings = self.trainer, self.request.settings
        before, first = trainer.state(), trainer.step
        if self.request.prior and not self._prior:  # they are not drawn yet: others take as long
            self._prior = self._pictures
            self.data = trainer.data = self._dataset()
        count = min(_TRIED, settings.steps - first)
        for number in range(first * settings.accumulate, (first + count) * settings.accumulate):
            self.data.batches(number)  # encoded before the time is taken
        self._free()
        mx.reset_peak_memory()
        seconds = [next(trainer).seconds for _ in range(count)]
        trainer.load_state(before)
        return {"seconds": round(min(seconds, default=0.0), 4), "peak_gb": round(mx.get_peak_memory() / 1e9, 3)}

    def _free(self) -> None:
        """Free the networks that are not trained, until their next use."""
        trained = self.trainer.networks()
        self.sd.release(keep=[name for name, part in self.sd.sources.items() if part.component.name in trained])

    # --- before the first step ---------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[tuple[str, int, int]]:
        """Draw prior pictures, encode the preview's prompt, pictures and captions; yields (what, number done, of)."""
        if (self.request.prior or "").isdigit():
            yield from self._draw_prior(count := int(self.request.prior))
            pictures, _ = read_pictures(self.files.prior, self._side, caption=self.request.prior_prompt)
            self._prior = [picture for picture in pictures if int(picture.path.stem) < count]
            self.data = self.trainer.data = self._dataset()
        if self.request.preview and not self.request.settings.trains_text:
            self._preview_prompt = self.sd.encode_prompts(self.request.preview, "")
        for done, total in self.data.prepare(self.request.cache):
            yield "encoding", done, total
        self._free()

    def _draw_prior(self, count: int) -> Iterator[tuple[str, int, int]]:
        """Draw pictures with the base model beside the output; those that an earlier run has drawn are used again.

        Other processes than the first get them from it, in a temporary folder.
        """
        request, folder = self.request, self.files.prior
        folder.mkdir(exist_ok=True)
        prompts = None
        self.trainer.lora.scale = 0.0
        for seed in range(count):
            path = folder / f"{seed:04d}.png"
            text = {"parameters": f"{request.prior_prompt}\nSeed: {seed}, Model: {request.model}"}
            if self.is_first and (not path.is_file() or read_text(path) != text):
                prompts = prompts or self.sd.encode_prompts(request.prior_prompt, "")
                (image,) = self.sd.generate(prompts[0], negative_text=prompts[1], seed=seed)
                save(image, path, text)
            if self.group is not None:
                self._send(path)
            yield "prior pictures", seed + 1, count
        self.trainer.lora.scale = 1.0

    def _send(self, path: Path) -> None:
        """Give a picture of the model's size to the other processes."""
        height, width = (side * self.sd.pixels_per_latent for side in self.sd.default_latent_size)
        image = open_image(path) if self.is_first else Image.new("RGB", (width, height))
        pixels = processes.of_first({"": mx.array(np.asarray(image))}, self.group)[""]
        if not self.is_first:
            save(Image.fromarray(np.asarray(pixels)), path)

    def write_settings(self) -> None:
        """Write all settings beside the output, as a .toml file that --config reads; not over that file itself."""
        request, path = self.request, self.files.settings
        if request.config is not None and Path(request.config).expanduser().resolve() == path.resolve():
            return
        left_out = {"settings", "config", "overwrite", "resume"}
        values = {field.name: getattr(request, field.name) for field in fields(request) if field.name not in left_out}
        values |= request.settings.as_dict() | {"resolution": self._side, "dtype": self.sd.dtype_name}
        values["device"] = "gpu" if mx.default_device() == mx.gpu else "cpu"
        if request.prior is not None and not request.prior.isdigit():
            values["prior"] = Path(request.prior).expanduser()
        values = {name: str(value.resolve()) if isinstance(value, Path) else value for name, value in values.items()}
        path.write_text(to_toml(values), encoding="utf-8")

    # --- the loop ----------------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        """Return whether all steps are made."""
        return self.trainer.step >= self.request.settings.steps

    def steps(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Train, and yield what is done; where ``stopped`` returns True in a process, all end after the step."""
        request, trainer = self.request, self.trainer
        if self.is_first and request.overwrite and request.resume is None:
            for state in self.files.states():
                state.unlink()
        with LossTable(self.files.table, trainer.step) as self._table:
            if self.is_first and trainer.step == 0:
                if request.measure_every:
                    self._table.write(None, self.measure())
                yield from self._preview(stopped)
            for step in () if processes.any_of(stopped(), self.group) else trainer:
                if self.is_first:
                    measured = self.measure() if self._is_due(request.measure_every) else None
                    self._table.write(step, measured)
                    yield _event(step, measured)
                    if self._is_due(request.save_every):
                        yield from self._save_state()
                if processes.any_of(stopped(), self.group):
                    break
                if self.is_first and self._is_due(request.preview_every):
                    yield from self._preview(stopped)

    def finish(self) -> Iterator[Event]:
        """Write the LoRA, a checkpoint where the run is not done, and the curve; yields what is written."""
        if not self.is_first:
            return
        request = self.request
        if not self.is_done and not self.files.state(self.trainer.step).exists():
            yield from self._save_state()
        texts = header_texts(self.trainer, request.word, request.output.stem)
        save_lora(self.trainer, request.output, texts, request.format)
        if self._table is not None and self._table.can_draw():
            self._table.draw(self.files.curve)
        yield {"kind": "lora", "path": str(request.output), "step": self.trainer.step}

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.trainer.step % every == 0 or self.is_done)

    def _save_state(self) -> Iterator[Event]:
        """Write a checkpoint, and delete the oldest beyond those to keep."""
        path = self.files.state(self.trainer.step)
        save_state(self.trainer, path)
        for old in self.files.states()[: -self.request.keep]:
            old.unlink()
        yield {"kind": "checkpoint", "path": str(path), "step": self.trainer.step}

    def measure(self) -> float:
        """Return the mean loss of some pictures at noise and timesteps that are always the same."""
        pictures, losses = self.data.sets[0], []
        with averaged(self.trainer):
            for number in range(min(len(pictures.pictures), _MEASURED)):
                batch = self.data.batch(pictures, [(number, False)])
                for draw in range(_DRAWS):
                    loss = self.trainer.loss(batch, [seed_of("measured", number, draw)])
                    losses.append(loss.item() / self.trainer.scale)
        return sum(losses) / len(losses)

    def _preview(self, stopped: Callable[[], bool]) -> Iterator[Event]:
        """Draw pictures of fixed seeds as a new row of the sheet of previews; none where it is stopped on the way."""
        if not self.request.preview:
            return
        images: list[Image.Image] = []
        text, negative = self._preview_prompt or (self.request.preview, "")
        try:
            with averaged(self.trainer):
                for seed in range(_PREVIEWS):
                    images += [] if stopped() else self.sd.generate(text, negative_text=negative, seed=seed)
        except FloatingPointError as error:
            _log.warning("the preview after step %d is left out: %s", self.trainer.step, error)
        self._free()
        if len(images) == _PREVIEWS:
            add_row(self.files.sheet, self.trainer.step, images)
            yield {"kind": "preview", "path": str(self.files.sheet), "step": self.trainer.step}


def _event(step: TrainingStep, measured: float | None) -> Event:
    loss = step.loss if math.isfinite(step.loss) else None  # which JSON has
    figures = {"loss": loss, "learning_rate": step.learning_rate, "seconds": step.seconds, "skipped": step.skipped}
    peak = round(mx.get_peak_memory() / 1e9, 3)
    return {"kind": "step", "step": step.number} | figures | {"measured": measured, "peak_gb": peak}


def _too_long(sd: StableDiffusion, pictures: Sequence[Picture]) -> list[str]:
    """Return a line about each caption of which the text encoder reads a part only."""
    lines = []
    for picture in pictures:
        chunks = sd.count_chunks(picture.caption, emphasis="none")
        if chunks > 1:
            lines.append(f"{picture.path}: its caption has more than 75 tokens, and the rest is not read; shorten it")
    return lines
