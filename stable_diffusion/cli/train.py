"""Train a LoRA: ``python -m stable_diffusion train photos/ --model sd15 --trigger ohwx --output me.safetensors``.

Each written file gives a line on stdout (with ``--json`` an object for each step and file). Progress and remarks go to
stderr. The exit codes are those of the scripts, see ``cli/main.py``. Ctrl-C and SIGTERM save the LoRA and a checkpoint;
``--resume latest`` continues from it.
"""

import argparse
import json
import logging
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, redirect_stderr, redirect_stdout
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from ..app import processes
from ..app.request import CHOICES, COUNT
from ..app.train import TrainingRun
from ..app.training_output import Event
from ..app.training_plan import describe
from ..app.training_progress import TrainingProgress
from ..app.training_request import TrainingRequest
from ..lora.create import TARGETS
from ..models import cpu
from ..options import Number
from ..training.save import FORMATS
from ..training.settings import TrainingSettings
from .foreign_flags import TRAINING_COUNTERPARTS
from .parser import Parser
from .signals import Stop, signals
from .streams import remark, say_if_read, show_log
from .values import number, text

_log = logging.getLogger("stable_diffusion")

# A flag is a key of the file --config, and the name of a field. A flag without a value is a switch. A default ends the
# help text, as "(default: 4)". --help lists the everyday flags, --help_all all of them.
EVERYDAY = ("model", "trigger", "steps", "rank", "learning_rate", "quantize", "preview", "output", "resume", "dry_run")
FLAGS = {
    "pictures": {
        "--trigger WORD": "name the new thing by this word; it is put before each caption without it",
        "--caption TEXT": "caption of pictures without a caption",
        "--resolution PIXELS": "train at the area of a square with this side (default: the model's)",
        "--flip": "mirror each picture half of the time",
        "--cache DIR": "keep encoded pictures and captions in this folder; the next run starts at once",
        "--prior DIR|N": "prior preservation: pictures of similar things that the model must not forget, as a folder "
        "or a number to generate first",
        "--prior_prompt TEXT": "prompt and caption of the prior pictures, such as: a photo of a dog",
        "--prior_weight N": "weight of the prior loss (default: 1)",
        "--caption_dropout FRACTION": "train this fraction of pictures with an empty caption (default: 0.05)",
    },
    "model": {
        "--model MODEL": "base model: a name, a Hub id, a folder or a checkpoint file (default: sd15)",
        "--revision REVISION": "branch, tag or commit of a Hub repository (default: main)",
        "--quantize -q": "quantize the UNet to 8 bits and the text encoders to 4; the LoRA is float32 (QLoRA)",
        "--dtype": "number format of the model (default: bfloat16 on a GPU, float32 on a CPU)",
        "--low_memory": "save working memory: slower",
        "--device": "device (default: SD_DEVICE in the environment, else a GPU if present)",
    },
    "LoRA": {
        "--rank N": "rank of the update of each layer: 4 for a style, 16 for a face, 64 for complex subjects (default: "
        "16)",
        "--alpha N": "scale the update by alpha / rank (default: the rank)",
        "--targets NAME|REGEX": f"layers to train: {', '.join(TARGETS)}, or a regular expression for their paths "
        "(default: attention)",
        "--conv_rank N": "rank for the 3x3 convolutions; 0 trains none (default: 0)",
        "--text_encoder_rank N": "rank for the text encoders; 0 trains none (default: 0)",
        "--dora": "also train the magnitudes of the weights (DoRA)",
        "--embedding WORD[:N]": "train N vectors (4 without N) for a new word and no LoRA (textual inversion)",
        "--initial_word WORD": "start the vectors from this known word, such as toy (default: the mean of all words)",
    },
    "training": {
        "--steps N": "number of updates (default: 1000)",
        "--batch_size N": "pictures per batch (default: 1)",
        "--accumulate N": "batches per update (default: 1)",
        "--learning_rate RATE": "highest learning rate (default: 0.0001; 0.002 for --embedding)",
        "--lr_schedule": "learning rate after the warm-up (default: constant)",
        "--warmup FRACTION": "raise the learning rate from 0 during this fraction of the steps (default: 0.05)",
        "--optimizer": "optimizer (default: adamw)",
        "--weight_decay DECAY": "weight decay of the optimizer (default: 0.01)",
        "--clip_norm NORM": "clip the gradients to this norm; 0 is off (default: 1)",
        "--loss": "squared error (mse), or pseudo-Huber (huber), which is less sensitive to outliers (default: mse)",
        "--min_snr GAMMA": "limit the loss weights by the signal-to-noise ratio (Min-SNR); 0 is off (default: 5)",
        "--noise_offset OFFSET": "add noise common to all pixels, such as 0.05, for very dark and very bright pictures "
        "(default: 0)",
        "--ema DECAY": "save a moving average of the LoRA with this decay, such as 0.99; 0 is off (default: 0)",
        "--checkpointing": "recompute transformer blocks in the backward pass: less memory (default: auto)",
        "--seed N": "seed of all random numbers (default: 0)",
    },
    "output": {
        "--output FILE": "write the LoRA to NAME.safetensors; other files of the run begin with NAME (default: "
        "lora.safetensors)",
        "--overwrite": "overwrite the files of another run with this name",
        "--format": "names in the file: kohya for all programs, diffusers for PEFT (default: kohya)",
        "--save_every N": "steps between checkpoints; 0 is off (default: 250)",
        "--keep N": "number of checkpoints to keep (default: 3)",
        "--resume FILE": "continue from a checkpoint; latest is the last one of this output",
        "--preview TEXT": "draw this prompt with fixed seeds before the first step and regularly, in NAME.png",
        "--preview_every N": "steps between previews (default: 250)",
        "--measure_every N": "steps between measurements of the loss with fixed pictures and noise; 0 is off (default: "
        "100)",
        "--json": "print a JSON object for each step and file",
        "--dry_run": "report pictures, steps, time and memory after three steps, write nothing and exit",
        "--config FILE": "read flags from a .toml file, with flags as keys; flags of the command line override it",
    },
}
ABOUT = {
    "pictures": "Read a folder: a.jpg with a.txt, metadata.jsonl, train.jsonl, or 10_name/.",
    "model": "Choose the model to adapt.",
    "LoRA": "Choose the layers to train.",
    "training": "Set steps, optimizer and loss.",
    "output": "Set files and reports.",
}
_EXAMPLES = (
    "photos/ --model sd15 --trigger ohwx",
    'photos/ --trigger ohwx --preview "ohwx"',
    "--config lora.toml --output b.safetensors",
)
_NEEDED = {"preview_every": "preview", "prior_prompt": "prior", "prior_weight": "prior"}  # a flag without effect alone
_COMMANDS = {"dry_run", "json", "device"}  # not fields of a request
_NO_KEYS = {"help", "help_all", "version", "config"}  # flags that are not keys of the file --config


def pattern(value: str) -> str:
    """Return a name of ``TARGETS``, or a regular expression."""
    try:
        re.compile(text(value))
    except re.error as error:
        known = f"choose {', '.join(TARGETS)}, or correct it"
        raise argparse.ArgumentTypeError(f"{value!r} is not a regular expression ({error}); {known}") from None
    return value


def prior(value: str) -> str:
    """Return a folder, or a number of pictures."""
    return str(number(COUNT, value)) if value.lstrip("-").isdigit() else text(value)


_NUMBERS: dict[str, Number] = TrainingSettings.NUMBERS | {
    **dict.fromkeys(("preview_every", "keep"), COUNT),
    **dict.fromkeys(("save_every", "measure_every"), Number(int, 0)),
    "resolution": Number(int, 64, 4096, multiple=8),
}
_CHOICES = TrainingSettings.CHOICES | {"dtype": CHOICES["dtype"], "device": cpu.DEVICES, "format": FORMATS}
_TYPES = dict.fromkeys(("trigger", "caption", "prior_prompt", "model", "output", "preview", "resume", "cache"), text)
_TYPES |= dict.fromkeys(("embedding", "initial_word"), text)
_TYPES |= {name: partial(number, limits) for name, limits in _NUMBERS.items()} | {"targets": pattern, "prior": prior}


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion train",
        usage="%(prog)s pictures [flags]",
        description="Train a LoRA: a small file that teaches a model a new thing or style.",
        examples=_EXAMPLES,
    )
    parser.types, parser.choices, parser.counterparts = _TYPES, _CHOICES, TRAINING_COUNTERPARTS
    parser.add_argument("pictures", nargs="?", type=text, help="folder of pictures, best with captions")
    parser.add_groups(FLAGS, ABOUT, EVERYDAY)
    return parser


def read_config(parser: Parser, path: str) -> dict[str, Any]:
    """Read the flags in a TOML file, each checked as on the command line. Raises ValueError, one line."""
    try:
        values = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"the config {path} cannot be read as TOML ({reason}); see --help for its keys") from None
    actions = {action.dest: action for action in parser._actions if action.dest not in _NO_KEYS}
    words = []
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in actions:
            similar = get_close_matches(name, actions, 1, 0.75)
            remedy = f"did you mean {similar[0]}?" if similar else "its keys are the flags in --help"
            raise ValueError(f"{path}: unknown key {key}; {remedy}")
        is_switch = actions[name].nargs == 0
        kinds = "true or false" if is_switch else "a number" if name in _NUMBERS else "a text"
        accepted = bool if is_switch else (int, float) if name in _NUMBERS else (str, int) if name == "prior" else str
        if not isinstance(value, accepted) or (isinstance(value, bool) and not is_switch):
            raise ValueError(f"{path}: {key} is {json.dumps(value, default=str):.60}, which is not {kinds}")
        if name == "pictures":
            words.insert(0, value)
        elif not is_switch or value:
            words.append(f"--{name}" if is_switch else f"--{name}={value}")
    parser.where = f"{path}: "
    read = vars(parser.parse_args(words))
    parser.where = ""
    return read


def request_of(values: Mapping[str, Any], given: Mapping[str, Any]) -> TrainingRequest:
    """Create a request from flags by name; ``given`` are those of the command line.

    Raises ValueError for settings that are missing, without effect or out of range.
    """
    if "pictures" not in values:
        raise ValueError("give a folder of pictures")
    for name in _NEEDED.keys() & given.keys():
        if _NEEDED[name] not in values:
            raise ValueError(f"--{name} has no effect without --{_NEEDED[name]}")
    names = {field.name for field in fields(TrainingSettings)}
    settings = TrainingSettings(**{name: value for name, value in values.items() if name in names})
    rest = {name: value for name, value in values.items() if name not in names | _COMMANDS}
    paths = {name: Path(rest[name]).expanduser() for name in ("pictures", "output", "cache") if name in rest}
    return TrainingRequest(**rest | paths, settings=settings)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code.

    All processes started by ``mlx.launch`` have the same exit code; only the first one prints.
    """
    parser = make_parser(prog)
    group, fail, given = _start(parser, argv)
    cpu.tune()
    show_log(parser.prog, errors_only=not processes.is_first(group))
    code = 2
    with signals(_log.warning, "the LoRA and a checkpoint") as stop:
        try:
            with processes.together(group):
                values = (read_config(parser, given["config"]) if "config" in given else {}) | given
                cpu.choose_device(values.get("device"))
                run = TrainingRun(request_of(values, given), group)
            run.agree()
            for line in run.remarks:  # a refusal is one line
                _log.warning("%s", line)
            code = 1
            if "dry_run" in values:
                plan = run.plan() | run.time_steps()
                if run.is_first:
                    parser.say(json.dumps({"kind": "plan"} | plan) if "json" in values else describe(plan))
                return 0
            if run.is_first:
                for line in describe(run.plan()).splitlines():
                    remark(line)
            _train(fail, run, stop, "json" in values)
        except (ArithmeticError, ValueError, OSError) as error:
            fail(code, error)
        except (RuntimeError, MemoryError) as error:  # what MLX raises, above all where memory runs out
            remedy = "where memory is short, try --checkpointing on, a smaller --resolution or -q"
            where = "" if group is None else f" in process {group.rank()} of {group.size()}"
            parser.fail(1, f"the training failed{where} ({str(error) or 'out of memory'}); {remedy}")
        except KeyboardInterrupt:
            fail(stop.code or 130, "interrupted; nothing was trained")
    return 0


def _start(
    parser: Parser, argv: Sequence[str] | None
) -> tuple[processes.Group | None, Callable[[int, str | Exception], NoReturn], dict[str, Any]]:
    """Connect the processes; return them, the function that exits with a message, and the flags."""
    try:
        group = processes.join()
    except ConnectionError as error:
        parser.fail(2, error)
    is_first = processes.is_first(group)
    with ExitStack() as silence:
        for redirect in () if is_first else (redirect_stdout, redirect_stderr):
            silence.enter_context(redirect(StringIO()))
        given = vars(parser.parse_args(argv))
    return group, parser.fail if is_first else lambda code, _: sys.exit(code), given


def _train(fail: Callable[[int, str], NoReturn], run: TrainingRun, stop: Stop, as_json: bool) -> None:
    """Execute a run and print its events. Save its state if it is stopped, diverges or loses a process."""
    with closing(TrainingProgress(run)) as progress:
        progress.prepare()
        stop.is_expected, failure, lost = True, None, False
        try:
            for event in run.steps(lambda: stop.code is not None):
                progress(event)
                _print(run, event, as_json)
        except FloatingPointError as error:
            failure = f"{error}; the steps before it are saved in {run.request.output}"
        except RuntimeError as error:
            if run.group is None or not run.is_first:
                raise
            failure, lost = f"another process is lost ({error}); restart all of them with --resume latest", True
        for event in run.finish():
            _print(run, event, as_json)
    if not lost:
        processes.any_of(False, run.group)  # all wait for the files: a launcher kills the others when one fails
    if failure is not None:
        raise FloatingPointError(failure)
    if stop.code is not None or not run.is_done:
        remedy = "all files are written" if run.is_done else "continue with the same command and --resume latest"
        done = f"interrupted after step {run.trainer.step} of {run.request.settings.steps}"
        fail(stop.code or 130, f"{done}; {remedy}")


def _print(run: TrainingRun, event: Event, as_json: bool) -> None:
    if as_json:
        say_if_read(json.dumps(event if run.group is None else {"rank": run.group.rank()} | event), "the files are")
    elif event["kind"] == "lora":
        say_if_read(event["path"], "the files are")
