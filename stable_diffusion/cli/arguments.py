"""From the arguments of a script to requests: flags, files of prompts, and pictures that are made again."""

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..app.engine import Resources
from ..app.metadata import Record, read_record, remarks
from ..app.preview import PreviewSettings
from ..app.request import KINDS, Request, Sweep
from ..app.results import OutputSettings
from ..images.files import SUFFIXES
from ..options import SettingError
from .flags import FROM_IMAGE, LINE_GROUPS, MASK
from .parser import Parser, script_parser

_ONLY_IMAGE = {"image", *(flag.name for group in (FROM_IMAGE, MASK) for flag in group.flags)}
T = TypeVar("T")
_ONLY_TEXT = {"hires", "hires_strength", "hires_steps", "hires_upscaler"}


@dataclass(frozen=True)
class Command:
    """Hold what a script is to do. ``lines`` are requests with the settings that have several values."""

    parser: Parser
    lines: Sequence[tuple[Request, Sweep]]
    resources: Resources
    output: OutputSettings
    preview: PreviewSettings
    record: Record | None = None
    remarks: Sequence[str] = field(default_factory=list)
    preload_models: bool = False
    json: bool = False
    verbose: bool = False


def read(script: str, argv: Sequence[str] | None, prog: str | None = None) -> Command:
    """Read the arguments of "txt2image" or "image2image" (None: the process's). Exits with one line for a mistake."""
    parser = script_parser(script, prog)
    arguments = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    try:
        return _command(parser, script, arguments)
    except (ValueError, OSError) as error:
        parser.error(error if isinstance(error, SettingError) else str(error))


def _command(parser: Parser, script: str, arguments: dict[str, Any]) -> Command:
    _check(arguments)
    base, record, notes = Request(), None, []
    if "from_image" in arguments:
        record = read_record(arguments["from_image"])
        base, arguments, notes = _repeated(parser, script, arguments, record)
    if script == "image2image" and base.image is None and "image" not in arguments:
        raise ValueError("give the image to start from, and a prompt")
    has_prompt = "prompt" in arguments or (record is not None and "prompt_file" not in arguments)
    if has_prompt == ("prompt_file" in arguments):
        text = "give a prompt or a file of them" if has_prompt else "give a prompt, or --prompt_file FILE"
        raise ValueError(text)
    lines = _prompt_lines(parser, script, arguments, base) if "prompt_file" in arguments else [_line(base, arguments)]
    return Command(
        parser,
        lines,
        _settings(Resources, arguments),
        _settings(OutputSettings, arguments),
        _settings(PreviewSettings, arguments),
        record,
        notes,
        **{name: True for name in ("preload_models", "json", "verbose") if name in arguments},
    )


def _settings(kind: type[T], arguments: dict[str, Any]) -> T:
    """Return settings of a kind whose fields have the names of flags."""
    return kind(**{name: arguments[name] for name in kind.__dataclass_fields__ if name in arguments})


def _check(arguments: dict[str, Any]) -> None:
    """Refuse flags that make no sense together, other than those that a request refuses."""
    output = arguments.get("output", "out.png").lower()
    if "quality" in arguments and not output.endswith((".jpg", ".jpeg", ".webp")):
        raise ValueError("--quality is for JPEG and WebP: give --output a name that ends in .jpg or .webp")
    if "low_memory" in arguments and "preload_models" in arguments:
        text = "--low_memory reads each network when it is used, --preload_models all of them at once: leave one out"
        raise ValueError(text)
    if "preview_every" in arguments and "preview" not in arguments:
        raise ValueError("--preview_every needs --preview: a file or a folder")
    if "preview_vae" in arguments and not {"preview", "stepwise"} & arguments.keys():
        raise ValueError("--preview_vae needs --preview: a file or a folder; or --stepwise FILE")
    if "without" in arguments and "from_image" not in arguments:
        raise ValueError("--without needs --from_image FILE")


def _line(base: Request, arguments: dict[str, Any]) -> tuple[Request, Sweep]:
    """Return a request with the flags of a command, and those of them that have several values, in their order."""
    settings = {name: value for name, value in arguments.items() if name in KINDS}
    swept = [name for name, value in settings.items() if name in _SWEPT and len(value) > 1]
    sweep = Sweep((name, settings[name]) for name in swept)
    settings |= {name: settings[name][0] for name in _SWEPT & settings.keys() if name not in swept}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    settings |= {name: base.value(name) for name in swept if name != "seed"}
    if "prompt" in settings:
        settings["resolved_prompt"] = None
    return base.with_values(**settings), sweep


_SWEPT = {flag.name for group in LINE_GROUPS for flag in group.flags if flag.sweeps}


def _prompt_lines(parser: Parser, script: str, arguments: dict[str, Any], base: Request) -> list[tuple[Request, Sweep]]:
    """Read a file of prompts: a prompt on each line, and flags of the groups "picture" and "prompt" if it likes."""
    path = Path(arguments["prompt_file"]).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"the prompt file {path} cannot be read ({error}); give a text file in UTF-8") from error
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        prompt, _, flags = re.sub(r"(^|\s)(?=--\w)", "\0", line, count=1).partition("\0")
        line_parser = Parser(prog=parser.prog, add_help=False)
        line_parser.where = f"{path}, line {number}: "
        line_parser.add_flags(LINE_GROUPS, script)
        common = arguments
        if requests and len(arguments.get("seed", ())) == 1:  # a single one is where counting began
            common = {name: value for name, value in arguments.items() if name != "seed"}
        try:
            line_arguments = vars(line_parser.parse_args(shlex.split(flags)))
            # Flags of the line come behind those of the command line, also if both have them.
            requests.append(_line(base, common | line_arguments | {"prompt": prompt.strip()}))
        except ValueError as error:
            line_parser.error(error if isinstance(error, SettingError) else str(error))
    if not requests:
        raise ValueError(f"the prompt file {path} holds no prompt; write one on each line")
    return requests


def _repeated(
    parser: Parser, script: str, arguments: dict[str, Any], record: Record
) -> tuple[Request, dict[str, Any], list[str]]:
    """Return the request that a picture records, the flags that replace parts of it, and remarks."""
    recorded = {name: value for name, value in record.arguments.items() if name != "n_images"}
    for name in arguments.get("without", ()):
        field_name = name.lstrip("-").replace("-", "_")
        if field_name not in KINDS or field_name in ("image", "prompt"):
            known = ", ".join(sorted((recorded.keys() & KINDS.keys()) - {"image", "prompt"}))
            raise ValueError(f"--without {name} is none of the flags that can be left out; the picture has {known}")
        recorded.pop(field_name, None)
    foreign = _ONLY_IMAGE if script == "txt2image" else _ONLY_TEXT
    recorded = {name: value for name, value in recorded.items() if name not in foreign}
    parser.where = f"{record.path}: "
    request, unknown = Request.from_dict(recorded)
    parser.where = ""
    has_prompt = bool({"prompt", "prompt_file"} & arguments.keys())
    if not isinstance(recorded.get("prompt"), str) and not has_prompt:
        raise ValueError(f"{record.path} names no prompt; give one")
    if script == "image2image" and "image" in arguments and not has_prompt:
        word = arguments["image"]
        if not os.path.isfile(word) and not word.lower().endswith(SUFFIXES):  # the one word is a prompt
            arguments = {name: value for name, value in arguments.items() if name != "image"} | {"prompt": word}
    if script == "image2image" and request.image is None and "image" not in arguments:
        raise ValueError(f"{record.path} names no image; give one")
    if not {"n_images", "prompt_file"} & arguments.keys() and len(arguments.get("seed", ())) <= 1:
        arguments = arguments | {"n_images": 1}
    lines = remarks(record, script, unknown, "model" in arguments)
    return request, arguments, list(lines)
