"""Write the other files of a training, and the header of the LoRA: table, curve, preview sheet, settings, texts."""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..files.whole import new_file
from ..images.files import open_image, read_text, save
from ..lora.save import describe
from ..training.trainer import LoRATrainer, TrainingStep

Event = dict[str, Any]  # of a run, as it is printed in JSON; "kind" is step, checkpoint, preview or lora

STATE = ".state.safetensors"
_GAP, _FONT = 8, 12  # pixels
_MOST_ROWS = 40
SMOOTHING = 0.05  # weight of a new loss in the moving average
_STEPS = "steps"  # keyword of a sheet's text with the names of its rows


class RunFiles:
    """Name the files of a run after its output NAME.safetensors.

    NAME.toml holds the settings, NAME.csv the losses, NAME-loss.png their curve, NAME.png the previews, NAME-prior the
    generated prior pictures, NAME-000500.state.safetensors a checkpoint.
    """

    def __init__(self, lora: Path):
        self.lora = lora
        self.settings, self.table, self.sheet = (lora.with_suffix(suffix) for suffix in (".toml", ".csv", ".png"))
        self.curve, self.prior = (lora.with_name(f"{lora.stem}{end}") for end in ("-loss.png", "-prior"))

    def state(self, step: int) -> Path:
        """Return the path of a checkpoint."""
        return self.lora.with_name(f"{self.lora.stem}-{step:06d}{STATE}")

    def states(self) -> list[Path]:
        """Return the existing checkpoints, the oldest first."""
        pattern = re.compile(rf"{re.escape(self.lora.stem)}-(\d+){re.escape(STATE)}")
        found = ((pattern.fullmatch(path.name), path) for path in self.lora.parent.iterdir())
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    def existing(self, previews: bool) -> list[Path]:
        """Return the files of another run that one with this name would replace."""
        paths = [self.lora, self.settings, self.table, *[self.sheet] * previews, *[self.curve] * LossTable.can_draw()]
        return [path for path in paths if path.exists()] + self.states()


class LossTable:
    """Write a table of the steps as a .csv file. After ``step`` steps, continue the file of the same run."""

    COLUMNS = ("step", "loss", "learning_rate", "seconds", "measured")

    def __init__(self, path: Path, step: int):
        self._path, self.rows = path, []
        if step and path.is_file():
            with path.open(newline="", encoding="utf-8", errors="replace") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(self.COLUMNS) and row[0].isdigit()]
            self.rows = [row for row in rows if int(row[0]) <= step]
        self._write("w", [self.COLUMNS, *self.rows])

    def _write(self, mode: str, rows: Iterable[Sequence[str]]) -> None:
        with self._path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    def write(self, step: TrainingStep | None, measured: float | None) -> None:
        """Add a step; None is the measurement before the first one."""
        values = (None, None, None) if step is None else (step.loss, step.learning_rate, step.seconds)
        texts = ("" if value is None else f"{value:.6g}" for value in (*values, measured))
        row = ["0" if step is None else str(step.number), *texts]
        self.rows.append(row)
        self._write("a", [row])

    @staticmethod
    def can_draw() -> bool:
        """Return whether matplotlib is installed."""
        return find_spec("matplotlib") is not None

    def draw(self, path: Path) -> None:
        """Draw the losses over the steps: each loss, their moving average, and the measured losses."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="tight")
        axes = figure.subplots()
        losses = [(int(row[0]), float(row[1])) for row in self.rows if row[1] not in ("", "nan", "inf")]
        measured = [(int(row[0]), float(row[4])) for row in self.rows if row[4]]
        means: list[tuple[int, float]] = []
        for number, loss in losses:
            means.append((number, loss if not means else means[-1][1] + SMOOTHING * (loss - means[-1][1])))
        for points, label, style in (
            (losses, "loss of a step", {"alpha": 0.25}),
            (means, "moving average", {}),
            (measured, "same pictures and noise", {"marker": "o"}),
        ):
            axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, **style)
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
        axes.legend()
        with new_file(path) as partial:
            figure.savefig(partial, format="png")


def add_row(path: Path, step: int, pictures: Sequence[Image.Image]) -> None:
    """Add the pictures drawn after a step to the sheet at ``path``, below those of earlier steps.

    Rows of the same or a later step are replaced: they are from an interrupted run. The sheet keeps at most 40 rows:
    the first one and the latest ones.
    """
    font = ImageFont.load_default(_FONT)
    width, height = sum(p.width + _GAP for p in pictures) - _GAP, pictures[0].height + 2 * _GAP + _FONT
    row = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(row).text((0, 0), f"step {step}", fill="black", font=font)
    for i, picture in enumerate(pictures):
        row.paste(picture, (i * (picture.width + _GAP), _FONT + _GAP))
    rows = {} if step == 0 else {number: image for number, image in _rows(path, row.size).items() if number < step}
    rows[step] = row
    if len(rows) > _MOST_ROWS:
        del rows[sorted(rows)[1]]
    sheet = Image.new("RGB", (width, height * len(rows)), "white")
    for i, number in enumerate(sorted(rows)):
        sheet.paste(rows[number], (0, i * height))
    save(sheet, path, {_STEPS: " ".join(map(str, sorted(rows)))})


def _rows(path: Path, size: tuple[int, int]) -> dict[int, Image.Image]:
    """Return the rows of a sheet by step; {} if it is missing or has another size."""
    if not path.is_file():
        return {}
    steps, sheet = read_text(path).get(_STEPS, ""), open_image(path)
    numbers = [int(step) for step in steps.split() if step.isdigit()]
    if sheet.size != (size[0], size[1] * len(numbers)):
        return {}
    return {n: sheet.crop((0, i * size[1], size[0], (i + 1) * size[1])) for i, n in enumerate(numbers)}


def to_toml(values: Mapping[str, Any]) -> str:
    """Return numbers, texts and switches as TOML; None is omitted."""
    lines = [
        f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
        for name, value in values.items()
        if value is not None
    ]
    return "\n".join([*lines, ""])


def header_texts(trainer: LoRATrainer, trigger: str | None = None, title: str = "") -> dict[str, str]:
    """Return the texts in the header of a LoRA or embedding, see :func:`stable_diffusion.lora.save.describe`."""
    settings, sd, data = trainer.settings, trainer.sd, trainer.data
    pictures, group = data.sets[0].pictures, trainer.group
    texts = describe(
        trainer.lora,
        max(sd.unet_config.cross_attention_dim),
        sd.schedule.config.prediction_type,
        resolution=data.resolution,
        title=title,
        trigger=trigger,
        captions=[(p.path.parent.name, p.caption or "") for p in pictures],
    )
    source = Path(sd.source)
    training = {
        "sd_model_name": source.name if source.exists() else sd.source,
        "num_train_images": sum(p.repeats for p in pictures),
        "num_reg_images": sum(p.repeats for s in data.sets[1:] for p in s.pictures),
        "steps": trainer.step,
        "batch_size_per_device": settings.batch_size // (1 if group is None else group.size()),
        "gradient_accumulation_steps": settings.accumulate,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": settings.lr_schedule,
        "optimizer": settings.optimizer,
        "seed": settings.seed,
        "loss_type": settings.loss,
        "min_snr_gamma": settings.min_snr or None,
        "noise_offset": settings.noise_offset or None,
        "caption_dropout_rate": settings.caption_dropout,
    }
    return texts | {f"ss_{name}": str(value) for name, value in training.items()}
