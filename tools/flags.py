"""Write the flags of all commands into the documentation: python -m tools.flags

The tables are made from the parsers. They stand in docs/command-line.md between two comments, <!-- flags --> and
<!-- end of flags -->; the text around them is written by hand.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from stable_diffusion.cli import check, convert, inspect, serve, train, upscale
from stable_diffusion.cli.parser import script_parser

DOCUMENT = Path(__file__).parents[1] / "docs" / "command-line.md"
_PLACE = re.compile(r"(?<=<!-- flags -->\n).*?(?=<!-- end of flags -->)", re.DOTALL)

Parsers = dict[str, argparse.ArgumentParser]

COMMANDS: dict[str, Parsers] = {
    "txt2image and image2image": {
        "image2image": script_parser("image2image", "image2image"),
        "txt2image": script_parser("txt2image", "txt2image"),
    },
    "unconditional": {"unconditional": script_parser("unconditional", "unconditional")},
    "convert": {"convert": convert.make_parser()},
    "inspect": {"inspect": inspect.make_parser()},
    "upscale": {"upscale": upscale.make_parser()},
    "train": {"train": train.make_parser()},
    "serve": {"serve": serve.make_parser()},
    "check": {"check": check.make_parser()},
}
_UNTITLED = ("positional arguments", "options", "optional arguments")  # what argparse calls groups without a name


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return the long names of a parser's flags."""
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")}


def tables() -> str:
    """Return all flags in Markdown: a heading for each command, a table for each group."""
    lines = [line for title, parsers in COMMANDS.items() for line in ("", f"## {title}", *_groups(parsers))]
    return "\n".join([*lines, "", ""])


def _groups(parsers: Parsers) -> Iterator[str]:
    found: dict[str, list[argparse._ArgumentGroup]] = {"": []}
    for parser in parsers.values():
        for group in parser._action_groups:
            found.setdefault("" if group.title in _UNTITLED else group.title, []).append(group)
    for title, groups in found.items():
        rows = dict.fromkeys(row for group in groups for action in group._group_actions for row in _row(action))
        if title:
            yield from ("", f"### {title}")
            if groups[0].description:
                yield from ("", _plain(groups[0].description))
        yield from ("", "| | |", "|---|---|") if rows else ()
        for flag, text in rows:
            having = [name for name, parser in parsers.items() if any((flag, text) in _row(a) for a in parser._actions)]
            only = "" if len(having) == len(parsers) else f"*{having[0]} only:* "
            yield f"| {flag} | {only}{text} |"


def _row(action: argparse.Action) -> list[tuple[str, str]]:
    """Return [(flag with its value, its help)], or [] for --help and --help_all."""
    if action.dest in ("help", "help_all"):
        return []
    value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    value = " ".join(value) if isinstance(value, tuple) else value
    *short, last = sorted(action.option_strings, key=len) or [action.dest]
    last = last if action.nargs == 0 or not action.option_strings else f"{last} {value}"
    return [(", ".join(f"`{name}`" for name in (*short, last)).replace("|", "\\|"), _plain(action.help or ""))]


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return re.sub(r"([|<*]|__)", r"\\\1", " ".join(text.replace("%%", "%").split()))


def write(document: Path = DOCUMENT) -> None:
    """Bring the tables in the document up to date."""
    document.write_text(renewed(document.read_text(encoding="utf-8")), encoding="utf-8")


def renewed(text: str) -> str:
    """Return the text of the document with the tables of today."""
    return _PLACE.sub(lambda _: tables(), text)


if __name__ == "__main__":
    write()
