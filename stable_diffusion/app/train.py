"""Train a LoRA from a folder of pictures: the checks before a run, its loop and its files."""

import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
from ..training.trainer import LoRATrainer, TrainingStep
from ..weights.load import size_in_bytes
from . import processes
from .engine import open_model
from .memory import available, set_limits, training_bytes
from .request import Request
from .training_output import Event, LossTable, RunFiles, add_row, header_texts
from .training_plan import predicted_seconds, step_operations
from .training_request import TrainingRequest, check_output, find_state, write_settings

_log = logging.getLogger("stable_diffusion")

_MEASURED, _DRAWS = 4, 4  # pictures of a measurement, and noise levels for each
_PREVIEWS = 4  # pictures of a row
_TRIED = 3  # steps of a dry run


class TrainingRun:
    """Prepare and execute a run: ``prepare``, ``steps``, ``finish``; iterate over each of them.

    The constructor raises ValueError or OSError, one line, for all mistakes; it computes and writes nothing.
    ``remarks`` are lines about omitted or changed pictures.

    All processes of a ``group`` make the same calls, ``agree`` first. Each trains on a separate batch in each step.
    Only the first one writes files, previews and measurements, and yields events.
    """

    def __init__(self, request: TrainingRequest, group: processes.Group | None = None):
        self.request, self.files, self.group = request, RunFiles(request.output), group
        self.is_first, count = processes.is_first(group), 1 if group is None else group.size()
        self.settings = replace(request.settings, batch_size=request.settings.batch_size * count)
        self._state: Path | None = None  # the checkpoint to resume
        if self.is_first:
            check_output(request, self.files)
            self._state = None if request.resume is None else find_state(request, self.files)
        else:
            self._temporary = tempfile.TemporaryDirectory()
            self.files = RunFiles(Path(self._temporary.name, request.output.name))
        if not request.pictures.is_dir():  # before a model is downloaded
            raise ValueError(f"the folder of pictures {request.pictures} does not exist; check the path")
        dtype = request.dtype or ("bfloat16" if mx.default_device() == mx.gpu else None)
        model = Request(model=request.model, revision=request.revision, quantize=request.quantize, dtype=dtype)
        set_limits(None, request.low_memory)
        self.sd = open_model(model, request.low_memory)
        self.sd.low_memory = False  # trained networks stay loaded; ``_free`` frees the others
        self._side = resolution_of(self.sd) if request.resolution is None else request.resolution
        texts = {"caption": request.caption, "trigger": request.word}
        self._pictures, self.remarks = read_pictures(request.pictures, self._side, **texts)
        if not LossTable.can_draw():
            self.remarks.append(f'losses are written to {self.files.table}; for a curve too: pip install ".[train]"')
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
        if self._state is not None:
            load_state(self.trainer, self._state)
        lora = sum(factor.nbytes for factor in self.trainer.factors().values())
        state = sum(array.nbytes for array in self.trainer.state().values())
        check_space(request.output, lora + state * (request.keep + 1 if request.save_every else 1))

    def agree(self) -> None:
        """Send the checkpoint of the first process to all. Raises ValueError if their settings differ."""
        if self.group is None:
            return
        # Generated prior pictures come from the first process.
        drawn = self.request.drawn_prior
        shown = self.data.digest if drawn is None else self.data.sets[0].digest
        digest = seed_of(shown, self.request.flip, drawn, self.request.prior_prompt, self.settings, self.sd.dtype)
        if len(set(processes.texts(str(digest), self.group))) > 1:
            raise ValueError(
                "the processes have different pictures, captions or settings; give each the same folder and flags"
            )
        if self.request.resume is not None:
            self.trainer.load_state(processes.of_first(self.trainer.state(), self.group))

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check_prior(self) -> None:
        """Read the prior pictures, unless they are generated later. A resumed run needs those that it generated."""
        request = self.request
        self._prior: list[Picture] = []
        if request.prior is None:
            return
        if not request.prior_prompt:
            raise SettingError("prior needs prior_prompt, a description of its pictures", "prior", "prior_prompt")
        if request.drawn_prior is None:
            folder = Path(request.prior).expanduser()
            self._prior, lines = read_pictures(folder, self._side, caption=request.prior_prompt)
            self.remarks += lines
        elif self._state is not None:
            if missing := [path for path in self._drawn() if not path.is_file()]:
                raise ValueError(f"{missing[0]}, a prior picture of the run to resume, is missing; put it back")
            self._prior = self._read_drawn()

    # --- what is trained ---------------------------------------------------------------------------------------------

    def _dataset(self) -> Dataset:
        request = self.request
        options = {"prior": self._prior, "resolution": self._side, "flip": request.flip}
        return Dataset(self.sd, self._pictures, self.settings, **options)

    def _latent_sizes(self) -> list[tuple[int, int]]:
        """Return the sizes (height, width) of the latents in the training."""
        scale = self.sd.pixels_per_latent
        return [(height // scale, width // scale) for s in self.data.sets for width, height in s.sizes]

    def step_memory(self, recomputes: bool) -> int:
        """Return the predicted bytes of a step with the largest pictures, including weights."""
        unet, rows = self.sd.unet, self.request.settings.batch_size
        step = max(training_bytes(unet, rows, size, recomputes) for size in self._latent_sizes())
        factors = sum(factor.nbytes for factor in self.trainer.factors().values())
        # The weights include the factors; each has a gradient and two moments of the optimizer.
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
            "prior": len(self._prior) if self.request.drawn_prior is None else self.request.drawn_prior,
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
        """Return seconds and memory of a step, from three steps that are undone. Writes and generates nothing."""
        trainer, settings = self.trainer, self.request.settings
        before, first = trainer.state(), trainer.step
        if self.request.prior and not self._prior:  # they are not generated yet: use others, which take the same time
            self._prior = self._pictures
            self.data = trainer.data = self._dataset()
        count = min(_TRIED, settings.steps - first)
        for number in range(first * settings.accumulate, (first + count) * settings.accumulate):
            self.data.batches(number)  # encode before measuring the time
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
        """Write the settings, generate prior pictures, encode prompts and pictures; yields (work, done, total)."""
        if self.is_first:
            write_settings(self.request, self.files.settings, resolution=self._side, dtype=self.sd.dtype_name)
        if self.request.drawn_prior is not None:
            yield from self._draw_prior()
            self._prior = self._read_drawn()
            self.data = self.trainer.data = self._dataset()
        if self.request.preview and not self.request.settings.trains_text:
            self._preview_prompt = self.sd.encode_prompts(self.request.preview, "")
        with processes.together(self.group):
            for done, total in self.data.prepare(self.request.cache, self.group):
                yield "encoding", done, total
        if self.group is not None:
            self.data.exchange(self.group)
        self._free()

    def _drawn(self) -> list[Path]:
        return [self.files.prior / f"{seed:04d}.png" for seed in range(self.request.drawn_prior or 0)]

    def _read_drawn(self) -> list[Picture]:
        pictures, _ = read_pictures(self.files.prior, self._side, caption=self.request.prior_prompt)
        return [picture for picture in pictures if picture.path in self._drawn()]

    def _draw_prior(self) -> Iterator[tuple[str, int, int]]:
        """Generate pictures with the base model beside the output; reuse those of an earlier run.

        The first process sends them to the others, which keep them in a temporary folder.
        """
        request, paths, prompts = self.request, self._drawn(), None
        self.files.prior.mkdir(exist_ok=True)
        self.trainer.lora.scale = 0.0
        for seed, path in enumerate(paths):
            text = {"parameters": f"{request.prior_prompt}\nSeed: {seed}, Model: {request.model}"}
            if self.is_first and (not path.is_file() or read_text(path) != text):
                prompts = prompts or self.sd.encode_prompts(request.prior_prompt, "")
                (image,) = self.sd.generate(prompts[0], negative_text=prompts[1], seed=seed)
                save(image, path, text)
            if self.group is not None:
                self._send(path)
            yield "prior pictures", seed + 1, len(paths)
        self.trainer.lora.scale = 1.0

    def _send(self, path: Path) -> None:
        """Send a picture of the model's size to the other processes."""
        height, width = (side * self.sd.pixels_per_latent for side in self.sd.default_latent_size)
        image = open_image(path) if self.is_first else Image.new("RGB", (width, height))
        pixels = processes.of_first({"": mx.array(np.asarray(image))}, self.group)[""]
        if not self.is_first:
            save(Image.fromarray(np.asarray(pixels)), path)

    # --- the loop ----------------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        """Return whether all steps are finished."""
        return self.trainer.step >= self.request.settings.steps

    def steps(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Train and yield events; if ``stopped`` returns True in any process, all end after the step."""
        request, trainer = self.request, self.trainer
        if self.is_first and request.overwrite and request.resume is None:
            for state in self.files.states():
                state.unlink()
        self._table = LossTable(self.files.table, trainer.step)
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
        """Write the LoRA, a checkpoint if the run is unfinished, and the curve; yields an event for each file."""
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
        """Write a checkpoint, and delete the oldest beyond the number to keep."""
        path = self.files.state(self.trainer.step)
        save_state(self.trainer, path)
        for old in self.files.states()[: -self.request.keep]:
            old.unlink()
        yield {"kind": "checkpoint", "path": str(path), "step": self.trainer.step}

    def measure(self) -> float:
        """Return the mean loss of some pictures with fixed noise and timesteps."""
        pictures, losses = self.data.sets[0], []
        with averaged(self.trainer):
            for number in range(min(len(pictures.pictures), _MEASURED)):
                batch = self.data.batch(pictures, [(number, False)])
                for draw in range(_DRAWS):
                    loss = self.trainer.loss(batch, [seed_of("measured", number, draw)])
                    losses.append(loss.item() / self.trainer.scale)
        return sum(losses) / len(losses)

    def _preview(self, stopped: Callable[[], bool]) -> Iterator[Event]:
        """Generate images with fixed seeds as a new row of the preview sheet; no row if it is stopped."""
        if not self.request.preview:
            return
        images: list[Image.Image] = []
        text, negative = self._preview_prompt or (self.request.preview, "")
        try:
            with averaged(self.trainer):
                for seed in range(_PREVIEWS):
                    images += [] if stopped() else self.sd.generate(text, negative_text=negative, seed=seed)
        except FloatingPointError as error:
            _log.warning("the preview after step %d is omitted: %s", self.trainer.step, error)
        self._free()
        if len(images) == _PREVIEWS:
            add_row(self.files.sheet, self.trainer.step, images)
            yield {"kind": "preview", "path": str(self.files.sheet), "step": self.trainer.step}


def _event(step: TrainingStep, measured: float | None) -> Event:
    loss = step.loss if math.isfinite(step.loss) else None  # JSON has no NaN
    figures = {"loss": loss, "learning_rate": step.learning_rate, "seconds": step.seconds, "skipped": step.skipped}
    peak = round(mx.get_peak_memory() / 1e9, 3)
    return {"kind": "step", "step": step.number} | figures | {"measured": measured, "peak_gb": peak}


def _too_long(sd: StableDiffusion, pictures: Sequence[Picture]) -> list[str]:
    paths = [picture.path for picture in pictures if sd.count_chunks(picture.caption, emphasis="none") > 1]
    return [f"{path}: the caption has more than 75 tokens, the rest is ignored; shorten it" for path in paths]
