"""How the command lines read their arguments, and how they end when something is wrong with them."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..version import __version__
from .lists import gather

_HYPHENS = re.compile(r"\A--(\w[\w-]*)(?=\Z|=)")  # a flag, and not the value behind its "="


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, which begins with ``where`` the arguments come from.

    Flags are named with underscores, and may be given with hyphens.
    """

    where = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_version(self) -> None:
        """Add ``--version``, which prints it and leaves."""
        version = f"stable-diffusion-mlx {__version__}"
        self.add_argument("--version", action="version", version=version, help="print the version and leave")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words[:end] = [_HYPHENS.sub(lambda flag: f"--{flag[1].replace('-', '_')}", word) for word in words[:end]]
        return super().parse_known_args(gather(self, words), namespace)

    def error(self, message: str) -> NoReturn:
        self.fail(2, self.where + message)

    def fail(self, code: int, message: str) -> NoReturn:
        """Leave with one line, also where the message quotes a path with line breaks."""
        self.exit(code, f"{self.prog}: error: {' '.join(message.splitlines())}\n")
