"""Say what a file or a folder is: ``python -m stable_diffusion inspect PATH``. Nothing is downloaded."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..app.inspect import Report, inspect
from .parser import Parser

_UNSHOWN = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # what a terminal would obey, or cannot show
_RECORD = "stable_diffusion"  # the text of an image that is JSON


def _lines(report: Report) -> Iterator[str]:
    """Yield the report as aligned lines of text."""
    rows: list[tuple[str, str]] = []
    for name, value in report.items():
        if name == _RECORD:
            rows += [(key, _text(key, entry)) for key, entry in _entries(name, value)]
        elif name == "targets":
            rows += [(network, _text(name, layers)) for network, layers in value.items()]
        elif name != "parts":
            rows.append((name, _text(name, value)))
    parts = report.get("parts", {})
    indent = max(map(len, [*parts, *(name for name, _ in rows)])) + 2
    for name, text in rows:
        yield _UNSHOWN.sub("\ufffd", f"{name:{indent}}{text}".replace("\n", "\n" + " " * indent))
    for name, part in parts.items():
        yield f"{name:{indent}}{_summary(part)}"


def _summary(part: Report) -> str:
    """Return a line about a network; the numbers are aligned with those of others."""
    types = "+".join(name for name in part["types"] if name != "uint32")  # of quantized weights
    line = f"{part['parameters']:>13,}  {part['bytes'] / 1e6:>8,.1f} MB  {types}  {part['class']}"
    line += f"  {part['bits']} bits in groups of {part['group_size']}" if "bits" in part else ""
    return line + (f"  {part['files']} files" if part["files"] > 1 else "")


def _entries(name: str, record: Any) -> Iterable[tuple[str, Any]]:
    """Yield (name, value) of a record's entries, without those that are empty or off."""
    if not isinstance(record, dict):
        yield name, record
        return
    for key, value in record.items():
        if isinstance(value, dict):
            yield from value.items() if key == "files" else _entries(key, value)
        elif value is not None and value is not False and value not in ("", []):
            yield key, value


def _text(name: str, value: Any) -> str:
    if name == "bytes" and isinstance(value, int):
        return f"{value / 1e6:,.1f} MB"
    if name == "parameters" and isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(":".join(map(str, v)) if isinstance(v, list) else str(v) for v in value) or "none"
    return str(value)


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion inspect",
        description="Say what a model, a part of one or a LoRA is, or how an image was made.",
    )
    parser.add_argument("path", help="a folder, a file, an image, an alias, or a Hub id that is in the cache")
    parser.add_argument("--revision", default=None, help="branch, tag or commit of a Hub repository (main)")
    parser.add_argument("--json", action="store_true", default=False, help="print it as JSON")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # the Hub's client reads it when it is first needed, which is after this
    try:
        report = {"path": args.path} | inspect(args.path, revision=args.revision)
    except ConnectionError:
        parser.error(f"{args.path} is neither here nor in the Hub's cache: load it once, or give a path")
    except (ValueError, OSError) as error:
        parser.error(error)
    text = json.dumps(report, indent=2, ensure_ascii=False) if args.json else "\n".join(_lines(report))
    print(text.encode("utf-8", "backslashreplace").decode())  # a path may hold what is no Unicode
    return 0
