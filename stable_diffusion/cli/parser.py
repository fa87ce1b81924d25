"""Parsers of the command lines, made from the table of flags; errors are one line."""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from .. import __version__
from ..app.request import CHOICES, KINDS, NUMBERS
from ..diffusion.samplers import table
from ..options import SettingError
from . import types
from .flags import GROUPS, SHORT, Flag, Group

_HYPHENS = re.compile(r"\A--(\w[\w-]*)(?=\Z|=)")  # a flag, and not the value behind its "="

_EPILOG = """\
Flags may also be written with hyphens: --n-images is --n_images.

examples:
  %(prog)s {}
  %(prog)s {}
  %(prog)s {}

exit codes:
  0 done; 1 failed on the way; 2 refused, nothing was done; 130 interrupted
"""
_EXAMPLES = {
    "txt2image": (
        '"a lighthouse in a storm, oil painting" --model sd15',
        '"a red circle on a blue background" --model tiny --seed 7',
        '"a harbour at dawn" -q --low_memory --output harbour.png',
    ),
    "image2image": (
        'photo.jpg "a lit fireplace" --strength 0.5',
        'photo.jpg "a green door" --mask door.png --mask_padding 32',
        'photo.jpg "a wide beach" --expand 128,0,128,0 --seed 7',
    ),
}


class Parser(argparse.ArgumentParser):
    """Parse flags that are named with underscores and may be given with hyphens.

    Only flags that are given are in the result. An error begins with ``where`` the arguments come from.
    """

    where = ""

    def __init__(self, **options: Any) -> None:
        form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "argument_default": argparse.SUPPRESS}
        super().__init__(**form | options)

    def add_version(self) -> None:
        """Add ``--version``, which prints it and exits."""
        version = f"stable-diffusion-mlx {__version__}"
        self.add_argument("--version", action="version", version=version, help="print the version and leave")

    def add_flags(self, groups: Iterable[Group], script: str | None = None) -> None:
        """Add the flags of groups; those with one title make one group of the help."""
        added: dict[str, Any] = {}
        for group in groups:
            if group.script in (None, script):
                if group.title not in added:
                    added[group.title] = self.add_argument_group(group.title, group.about)
                for flag in group.flags:
                    short = [SHORT[flag.name]] if flag.name in SHORT else []
                    added[group.title].add_argument(f"--{flag.name}", *short, help=flag.help, **_options(flag))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse arguments after hyphens in flags have become underscores."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words[:end] = [_HYPHENS.sub(lambda flag: f"--{flag[1].replace('-', '_')}", word) for word in words[:end]]
        return super().parse_known_args(words, namespace)

    def error(self, message: str | Exception) -> NoReturn:
        """Exit with code 2 and one line; settings that it names become flags."""
        text = str(message).replace("partial=True", "--lora_partial")
        if isinstance(message, SettingError):
            text = re.sub(rf"\b({'|'.join(message.names)})\b", r"--\1", text)
        self.fail(2, f"{self.where}{text}")

    def fail(self, code: int, message: str) -> NoReturn:
        """Exit with one line, also where the message quotes a path with line breaks."""
        self.exit(code, f"{self.prog}: error: {' '.join(message.splitlines())}\n")


def _options(flag: Flag) -> dict[str, Any]:
    """Return what argparse needs to know of a flag; a field of its name gives the type."""
    if flag.action is not None:
        return {"action": flag.action} | ({"dest": flag.dest} if flag.dest else {})
    if flag.kind is None and KINDS.get(flag.name) is bool:
        return {"action": "store_true"}
    kind, choices = flag.kind, flag.choices or CHOICES.get(flag.name)
    if kind is None and flag.name in NUMBERS:
        kind = types.NumberType(NUMBERS[flag.name])
    if flag.sweeps:
        kind = types.Several(kind, ranges=flag.name == "seed")
    options = {"type": kind, "choices": choices, "metavar": flag.metavar}
    options |= {"action": "append"} if flag.repeats else {}
    return {name: value for name, value in options.items() if value is not None}


class _ListSamplers(argparse.Action):
    """Print the table of samplers and exit, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(table())
        parser.exit()


def script_parser(script: str, prog: str | None = None) -> Parser:
    """Return the parser of "txt2image" or "image2image", under the name ``prog`` (None: the process's)."""
    from_image = script == "image2image"
    parser = Parser(
        prog=prog,
        usage='%(prog)s image "prompt" [flags]' if from_image else '%(prog)s "prompt" [flags]',
        description="Change an image towards a prompt." if from_image else "Make images from a prompt.",
        epilog=_EPILOG.format(*_EXAMPLES[script]),
    )
    if from_image:
        parser.add_argument("image", nargs="?", default=None, help="the image to start from (PNG, JPEG, WebP, ...)")
    parser.add_argument("prompt", type=types.text, nargs="?", default=None, help="what to show")
    parser.add_version()
    parser.add_argument("--list_samplers", action=_ListSamplers, nargs=0, help="print the samplers and leave")
    parser.add_flags(GROUPS, script)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser
