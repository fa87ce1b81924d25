"""Report the kind of a file or a folder: ``python -m stable_diffusion inspect PATH``. Nothing is downloaded."""

import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from ..app.inspect import Report, inspect
from ..weights.quantize import in_words
from .parser import Parser
from .streams import printable

_OPEN = {"", "parts", "targets", "stable_diffusion", "arguments", "made", "files"}  # entries with rows of their own
_WIDTH, _LONGEST_NAME = 80, 14


def _lines(report: Report) -> Iterator[str]:
    """Yield the report as aligned lines of text for a terminal of 80 columns."""
    rows = [(printable(name), printable(text)) for name, text in _rows("", report)]
    indent = min(max(len(name) for name, _ in rows), _LONGEST_NAME) + 2
    for name, text in rows:
        start = f"{name:{indent}}"
        if len(name) > _LONGEST_NAME:  # a file: on separate lines
            yield from _wrap(name)
            start = "    "
        for line in text.splitlines():
            yield from _wrap(line, initial_indent=start, subsequent_indent=" " * len(start)) or [start.rstrip()]
            start = " " * len(start)


def _wrap(line: str, **indents: str) -> list[str]:
    return textwrap.wrap(line, _WIDTH, break_on_hyphens=False, replace_whitespace=False, **indents)


def _rows(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of an entry, or of the entries in it, without empty ones."""
    if name in _OPEN and isinstance(value, dict):
        for key, entry in value.items():
            yield from _rows(key, entry)
    elif text := _text(name, value):
        yield name, text


def _text(name: str, value: Any) -> str:
    match name, value:
        case "bytes", int():
            return f"{value / 1e6:,.1f} MB"
        case "parameters", int():
            return f"{value:,}"
        case "types", dict():
            return "+".join(type_ for type_ in value if type_ != "uint32")  # of quantized weights
        case _, {"class": _, "parameters": _}:
            return _summary(value)
        case _, dict():
            return ", ".join(f"{key} {entry}" for key, entry in value.items())
        case _, list():
            return ", ".join(":".join(map(str, v)) if isinstance(v, list) else str(v) for v in value) or "none"
    return str(value)


def _summary(part: Report) -> str:
    """Return a line about a network; the numbers are aligned with those of others."""
    line = f"{part['parameters']:>13,}  {part['bytes'] / 1e6:>8,.1f} MB"
    line += f"  {_text('types', part['types'])}  {part['class']}"
    line += f"  {in_words(part['bits'])} in groups of {part['group_size']}" if "bits" in part else ""
    return line + (f"  {part['files']} files" if part["files"] > 1 else "")


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion inspect",
        usage="%(prog)s path [flags]",
        description="Describe a model, a network or a LoRA, or print the settings of an image.",
        examples=("out.png", "model.safetensors", "sd15 --json"),
    )
    parser.add_argument("path", help="folder, file, image, alias, or Hub id in the cache")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a Hub repository (default: main)")
    parser.add_argument("--json", action="store_true", default=False, help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the Hub's client reads it at its first use, which is later
    try:
        report = {"path": args.path} | inspect(args.path, revision=args.revision)
    except ConnectionError:
        parser.error(f"{args.path} is not on this disk and not in the Hub cache; generate with it once, or give a path")
    except (ValueError, OSError) as error:
        parser.error(error)
    text = json.dumps(report, indent=2) if args.json else "\n".join(_lines(report))
    parser.say(text)
    return 0
