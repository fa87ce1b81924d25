"""Train a LoRA: ``python -m stable_diffusion train photos/ --model sd15 --trigger ohwx --output me.safetensors``."""

import json
import logging
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from ..app.request import CHOICES, COUNT, Request
from ..app.train import TrainingProgress, TrainingRequest, TrainingRun, write_settings
from ..models import cpu
from ..options import Number
from ..training.save import FORMATS
from ..training.settings import TrainingSettings
from .parser import Parser, number, text
from .signals import signals
from .streams import LineFormatter, remark, say

_log = logging.getLogger("stable_diffusion")

# A flag is a key of the file --config, and the name of a field. A flag without a value is a switch.
FLAGS = {
    "pictures": {
        "--trigger WORD": "a word for the new thing, put before each caption that lacks it",
        "--caption TEXT": "of pictures without one",
        "--resolution PIXELS": "side of a square with the area of the pictures (the model's)",
        "--flip": "show each picture mirrored half of the time",
        "--cache DIR": "keep what is encoded there, so that the next run on these pictures starts at once",
        "--prior DIR|N": "pictures of the same kind of thing, which the model is not to forget: a folder, or a number "
        "to draw first",
        "--prior_prompt TEXT": "what those show, such as: a photo of a dog",
        "--prior_weight": "of their loss (1)",
        "--caption_dropout": "share of pictures shown without their caption (0.05)",
    },
    "model": {
        "--model MODEL": "what to train for: a name, a Hub id, a folder or a file (sdxl)",
        "--revision REVISION": "branch, tag or commit of a Hub repository (main)",
        "--quantize -q": "the model to 8 bits and its text encoders to 4; the LoRA is not",
        "--dtype": "in which the model computes (bfloat16 on a GPU, float32 on a CPU)",
        "--low_memory": "keep only the networks in memory that are being used",
        "--device": "where to compute (a GPU where there is one)",
    },
    "LoRA": {
        "--rank": "width of what is trained: 4 for a style, 16 for a face, 64 for much (16)",
        "--alpha": "its scale times the rank (the rank)",
        "--targets TARGETS": "attention, attention+ff, all, or a regular expression for paths of layers (attention)",
        "--conv_rank": "the same for the 3x3 convolutions (0)",
        "--text_encoder_rank": "the same for the text encoders (0)",
        "--dora": "train the lengths of the weights too (DoRA)",
        "--embedding WORD[:N]": "train N vectors (4) for a new word, and no LoRA: a textual inversion",
    },
    "training": {
        "--steps": "updates (1000)",
        "--batch_size": "pictures at once (1)",
        "--accumulate": "batches for each update (1)",
        "--learning_rate": "length of an update (0.0001)",
        "--lr_schedule": "of the learning rate after the warm-up (constant)",
        "--warmup": "share of the steps in which it grows to all of it (0.05)",
        "--optimizer": "that makes the updates (adamw)",
        "--weight_decay": "share that each update takes away (0.01)",
        "--clip_norm": "length of the longest gradient; 0 is any (1)",
        "--loss": "mse, or huber, which is less led by single pixels (mse)",
        "--min_snr": "bound of the weight of steps with little noise; 0 is none (5)",
        "--noise_offset": "for very dark and very bright pictures, such as 0.05 (0)",
        "--ema": "decay of a moving average, which then is what is saved, such as 0.99 (0)",
        "--checkpointing": "compute transformers twice to need less memory (auto)",
        "--seed": "of all that is random (0)",
    },
    "output": {
        "--output FILE": "the LoRA to write, NAME.safetensors (lora.safetensors)",
        "--format": "of its names: kohya for all programs, diffusers for that library (kohya)",
        "--save_every N": "steps between checkpoints; 0 is none (250)",
        "--keep N": "checkpoints to keep (3)",
        "--resume FILE": "go on from a checkpoint, or from the latest one of this output",
        "--preview TEXT": "a prompt to draw now and then, a row of NAME.png each time",
        "--preview_every N": "steps between previews (250)",
        "--measure_every N": "steps between measurements of the loss at the same noise; 0 is none (50)",
        "--json": "print an object in JSON for each step",
        "--dry_run": "say what would be trained, and how long it takes, and stop",
        "--config FILE": "a .toml file with flags as keys; flags given beside it win",
    },
}
ABOUT = {
    "pictures": "A folder: a.jpg with a.txt, metadata.jsonl, train.jsonl, or folders 10_name.",
    "model": "What the LoRA is for.",
    "LoRA": "What is trained of it.",
    "training": "How it is trained.",
    "output": "What is written and said.",
}
_NUMBERS: dict[str, Number] = TrainingSettings.NUMBERS | {
    **dict.fromkeys(("preview_every", "keep"), COUNT),
    **dict.fromkeys(("save_every", "measure_every"), Number(int, 0)),
    "resolution": Number(int, 64, 4096, multiple=8),
}
_CHOICES = TrainingSettings.CHOICES | {"dtype": CHOICES["dtype"], "device": ("cpu", "gpu"), "format": FORMATS}
_COMMANDS = {"dry_run", "config", "json", "device"}


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion train",
        usage="%(prog)s pictures [flags]",
        description="Train a LoRA, a small file that teaches a model a new thing or style, from a few pictures.",
    )
    parser.add_argument("pictures", nargs="?", help="a folder of pictures, best with captions")
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(title, ABOUT[title])
        for usage, help_text in flags.items():
            words = usage.split()
            names, name = [word for word in words if word[0] == "-"], words[0].removeprefix("--")
            options: dict[str, Any] = {"type": text, "metavar": words[-1]}
            if name in _NUMBERS:
                options = {"type": partial(number, _NUMBERS[name]), "metavar": "N"}
            elif name in _CHOICES:
                options = {"choices": _CHOICES[name]}
            elif len(words) == len(names):
                options = {"action": "store_true"}
            group.add_argument(*names, help=help_text, **options)
    return parser


def read_config(parser: Parser, path: str) -> dict[str, Any]:
    """Read the flags in a TOML file, each checked as on the command line. Raises ValueError, one line."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read as TOML ({' '.join(str(error).split())}); see --help") from None
    words = []
    for key, value in values.items():
        if isinstance(value, bool):
            words += [f"--{key}"] if value else []
        elif isinstance(value, str | int | float):
            words.append(f"--{key}={value}")
        else:
            raise ValueError(f"{path}: {key} is a {type(value).__name__}; give a number, a text, or true")
    pictures = [word.partition("=")[2] for word in words if word.startswith("--pictures=")]
    parser.where = f"{path}: "
    read = vars(parser.parse_args([*pictures, *(word for word in words if not word.startswith("--pictures="))]))
    parser.where = ""
    return {key: value for key, value in read.items() if value is not None}


def request_of(values: dict[str, Any]) -> TrainingRequest:
    """Make a request of flags by name. Raises ValueError where something is missing or out of range."""
    if "pictures" not in values:
        raise ValueError("there is no folder of pictures; give one")
    names = {field.name for field in fields(TrainingSettings)}
    settings = TrainingSettings(**{name: value for name, value in values.items() if name in names})
    of_model = {name: values[name] for name in ("model", "revision", "quantize", "dtype") if name in values}
    rest = values.keys() - names - of_model.keys() - _COMMANDS - {"pictures", "output", "cache"}
    paths = {name: Path(values[name]).expanduser() for name in ("cache",) if name in values}
    return TrainingRequest(
        Path(values["pictures"]).expanduser(),
        Path(values.get("output", "lora.safetensors")).expanduser(),
        Request(**of_model),
        settings,
        **paths,
        **{name: values[name] for name in rest},
    )


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code."""
    parser = make_parser(prog)
    given = {key: value for key, value in vars(parser.parse_args(argv)).items() if value is not None}
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(f"{parser.prog}: %(message)s"))
    _log.handlers, code = [handler], 2
    cpu.tune()
    with signals(_log.warning) as stop:
        try:
            config = read_config(parser, given["config"]) if "config" in given else {}
            values = config | given
            cpu.choose_device(values.get("device"))
            run = TrainingRun(request_of(values))
            for line in run.remarks:
                remark(line)
            for line in run.describe():
                remark(line)
            code, stop.is_expected = 1, True
            if "dry_run" in values:
                say(run.time_steps())
                return 0
            write_settings(
                run.request, {key: value for key, value in values.items() if key not in ("config", "resume")}
            )
            with TrainingProgress(run, "json" in values, say) as progress:
                path = run.run(lambda step: progress(step) or stop.code is not None)
            say(json.dumps({"path": str(path)}) if "json" in values else str(path))
        except (ArithmeticError, ValueError, OSError) as error:
            parser.fail(code, error)
        except (RuntimeError, MemoryError) as error:  # what MLX raises, above all where memory runs out
            remedy = "where memory is short, try --checkpointing on, a smaller --resolution or -q"
            parser.fail(1, f"the training failed ({str(error) or 'out of memory'}); {remedy}")
        except KeyboardInterrupt:
            parser.fail(stop.code or 130, "interrupted; nothing was trained")
    return stop.code or 0
