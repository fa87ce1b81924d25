"""Train a LoRA from a folder of pictures: what a run is asked for, its checks, its loop and what it writes."""

import csv
import glob
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from PIL import Image
from tqdm import tqdm

from ..images.files import open_image, save
from ..images.image import grid
from ..models.config import listed
from ..options import SettingError
from ..pipeline import StableDiffusion
from ..training.dataset import Dataset, resolution_of
from ..training.loss import seed_of
from ..training.pictures import Picture, read_pictures
from ..training.save import averaged, load_state, metadata, save_lora, save_state
from ..training.settings import TrainingSettings
from ..training.trainer import LoRATrainer, TrainingStep
from .engine import open_model
from .request import Request

STATE = ".state.safetensors"
_MEASURED, _DRAWS = 4, 4  # pictures, and levels of noise for each, of a measurement
_PREVIEWS = 4  # pictures of a row
_TRIED = 3  # steps of a dry run


@dataclass(frozen=True)
class TrainingRequest:
    """Describe a run. ``settings`` are those of the trainer; the other fields are flags of the same name."""

    pictures: Path
    output: Path
    model: Request  # names the model and its precision
    settings: TrainingSettings
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
    measure_every: int = 50
    resume: str | None = None
    format: str = "kohya"


class TrainingRun:
    """Prepare a run and make it. All that can be wrong shows when it is made, as ValueError or OSError, one line.

    ``remarks`` are lines about pictures that are left out or changed.
    """

    def __init__(self, request: TrainingRequest):
        self.request, settings = request, request.settings
        _check_output(request.output)
        self.sd = open_model(request.model, request.low_memory)
        side = resolution_of(self.sd) if request.resolution is None else request.resolution
        texts = {"caption": request.caption, "trigger": request.trigger}
        pictures, self.remarks = read_pictures(request.pictures, side, **texts)
        self.remarks += _too_long(self.sd, pictures)
        prior = self._prior(side)
        self.data = Dataset(self.sd, pictures, settings, prior=prior, resolution=side, flip=request.flip)
        self.trainer = LoRATrainer(self.sd, self.data, settings)
        if request.resume is not None:
            load_state(self.trainer, self._state_file())

    def _prior(self, side: int) -> list[Picture]:
        """Return the pictures that keep what the model knows; a number of them is drawn where they are not there."""
        request = self.request
        if request.prior is None:
            return []
        if not request.prior_prompt:
            raise SettingError("prior needs prior_prompt, what its pictures show", "prior", "prior_prompt")
        folder = Path(request.prior).expanduser()
        if request.prior.isdigit():
            folder = request.output.with_suffix(".prior")
            folder.mkdir(exist_ok=True)
            for seed in range(int(request.prior)):
                if not (path := folder / f"{seed:04d}.png").exists():
                    (image,) = self.sd.generate(request.prior_prompt, seed=seed)
                    save(image, path)
        pictures, lines = read_pictures(folder, side, caption=request.prior_prompt)
        self.remarks += lines
        return pictures

    def describe(self) -> list[str]:
        """Return lines about what is trained: pictures of each size, updates, epochs, factors."""
        data, settings = self.data, self.request.settings
        sizes = listed([f"{n} of {w}x{h}" for (w, h), n in data.sets[0].sizes.items()], most=6)
        epochs = settings.steps * settings.accumulate / data.epoch_length()
        factors = sum(factor.size for factor in self.trainer.factors().values())
        return [
            f"{len(data.sets[0].pictures)} pictures ({sizes}), {settings.steps} steps, {epochs:.3g} times each picture",
            f"{len(self.trainer.factors())} factors with {factors / 1e6:.2f} million numbers",
        ]

    def prepare(self) -> Iterator[tuple[int, int]]:
        """Encode pictures and captions; yields (number encoded, number of all)."""
        return self.data.prepare(self.request.cache)

    def run(self, on_step: Callable[[TrainingStep], bool | None] = lambda step: None) -> Path:
        """Train, and return the file that is written. Where ``on_step`` returns True, stop after the step."""
        request, stopped = self.request, False
        with LossTable(request.output.with_suffix(".csv"), self.trainer.step) as losses:
            for step in self.trainer:
                every = request.measure_every
                losses.write(step, self.measure() if every and step.number % every == 0 else None)
                stopped = bool(on_step(step))
                if stopped or (request.save_every and step.number % request.save_every == 0):
                    self.save_state()
                if request.preview and (step.number % request.preview_every == 0 or step.number == 1):
                    self.preview()
                if stopped:
                    break
        texts = metadata(self.trainer, self.data, request.trigger, request.output.stem)
        save_lora(self.trainer, request.output, texts, request.format)
        return request.output

    # --- what a run writes -------------------------------------------------------------------------------------------

    def states(self) -> list[Path]:
        """Return the checkpoints of this output, the oldest first."""
        output = self.request.output
        return sorted(output.parent.glob(f"{glob.escape(output.stem)}-[0-9]*{STATE}"))

    def save_state(self) -> None:
        """Write a checkpoint, and delete the oldest beyond those to keep."""
        output = self.request.output
        save_state(self.trainer, output.with_name(f"{output.stem}-{self.trainer.step:06d}{STATE}"))
        for old in self.states()[: -self.request.keep]:
            old.unlink()

    def _state_file(self) -> Path:
        if self.request.resume != "latest":
            return Path(self.request.resume).expanduser()
        if not (states := self.states()):
            raise SettingError(f"there is no checkpoint beside {self.request.output}; leave resume out", "resume")
        return states[-1]

    def measure(self) -> float:
        """Return the mean loss of some pictures at noise and timesteps that are always the same."""
        pictures, losses = self.data.sets[0], []
        for number in range(min(len(pictures.pictures), _MEASURED)):
            batch = self.data.batch(pictures, [(number, False)] * _DRAWS)
            loss = self.trainer.loss(batch, [seed_of("measured", number, draw) for draw in range(_DRAWS)])
            losses.append(loss.item() / self.trainer.scale)
        return sum(losses) / len(losses)

    def preview(self) -> None:
        """Add a row of pictures of fixed seeds to the sheet of previews."""
        path = self.request.output.with_suffix(".png")
        with averaged(self.trainer):
            row = grid(self.sd.generate(self.request.preview, n_images=_PREVIEWS, seed=0), 1)
        if self.trainer.step > 1 and path.is_file():
            above = open_image(path)
            sheet = Image.new("RGB", (row.width, above.height + row.height + 8), (255, 255, 255))
            sheet.paste(above, (0, 0))
            sheet.paste(row, (0, above.height + 8))
            row = sheet
        save(row, path)

    def time_steps(self) -> str:
        """Make a few steps, and return a line about the time and the memory that all of them take."""
        mx.reset_peak_memory()
        steps = [step for step, _ in zip(self.trainer, range(_TRIED), strict=False)]
        seconds, left = min(step.seconds for step in steps), self.request.settings.steps
        total = tqdm.format_interval(seconds * left)
        return f"{seconds:.2f} s/step, {total} for {left} steps, {mx.get_peak_memory() / 1e9:.2f} GB"


def _too_long(sd: StableDiffusion, pictures: list) -> list[str]:
    """Return a line about each caption of which the text encoder reads a part only."""
    lines = []
    for picture in pictures:
        chunks = sd.count_chunks(picture.caption, emphasis="none")
        if chunks > 1:
            lines.append(f"{picture.path}: its caption has more than 75 tokens, and the rest is not read; shorten it")
    return lines


def _check_output(path: Path) -> None:
    """Raise ValueError unless a LoRA can be written to ``path``."""
    if path.suffix != ".safetensors":
        raise SettingError(f"the output {path} is no .safetensors file; name it so", "output")
    if not path.parent.is_dir():
        raise SettingError(f"the folder of the output {path} does not exist; create it first", "output")
    if path.is_dir():
        raise SettingError(f"the output {path} is a folder; give the path of a file in it", "output")


class LossTable:
    """Write a table of the steps as a .csv file, which goes on where a run does."""

    COLUMNS = ("step", "loss", "learning_rate", "seconds", "measured")

    def __init__(self, path: Path, step: int):
        rows = []
        if step and path.is_file():
            with path.open(newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
        self._file = path.open("w", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerows([self.COLUMNS, *rows])

    def __enter__(self) -> "LossTable":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, step: TrainingStep, measured: float | None) -> None:
        """Add a step."""
        values = (step.loss, step.learning_rate, step.seconds, measured)
        self._writer.writerow([step.number, *("" if value is None else f"{value:.6g}" for value in values)])
        self._file.flush()


class TrainingProgress:
    """Show a run in a terminal: a bar for what is encoded, and one for the steps."""

    def __init__(self, run: TrainingRun, as_json: bool, say: Callable[[str], None]):
        self._run, self._say, self._json = run, say, as_json
        self._bar = None

    def __enter__(self) -> "TrainingProgress":
        bar = tqdm(disable=None, desc="encoding", leave=False)
        for done, total in self._run.prepare():
            bar.total = total
            bar.update(done - bar.n)
        bar.close()
        total, step = self._run.request.settings.steps, self._run.trainer.step
        self._bar = tqdm(total=total, initial=step, disable=None, desc="training", dynamic_ncols=True)
        self._mean: float | None = None
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, step: TrainingStep) -> None:
        """Show a step."""
        if step.skipped:
            tqdm.write(f"step {step.number} is skipped: its loss is not finite")
        else:
            self._mean = step.loss if self._mean is None else self._mean + 0.05 * (step.loss - self._mean)
        peak = mx.get_peak_memory() / 1e9
        if self._mean is not None:
            self._bar.set_postfix_str(f"loss {self._mean:.4f}, {step.seconds:.2f} s, {peak:.2f} GB", refresh=False)
        self._bar.update()
        if self._json:
            self._say(json.dumps(vars(step) | {"peak_gb": round(peak, 3)}))


def write_settings(request: TrainingRequest, values: Mapping[str, Any]) -> None:
    """Write all flags of a run beside its output, as a .toml file that --config reads."""
    values = request.settings.as_dict() | dict(values)
    lines = [f"{name} = {json.dumps(value)}" for name, value in sorted(values.items()) if value is not None]
    request.output.with_suffix(".toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
