"""The streams of a process: one that is closed, full or read by nobody loses no image and changes no exit code.

All that the commands print is made printable here: file names, prompts and what is quoted of a stranger's file may hold
characters that a terminal would obey.
"""

import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

from ..app.progress import TqdmHandler

_log = logging.getLogger("stable_diffusion")

# Control characters, marks that hide or turn the direction of text, and halves of characters.
_UNPRINTABLE = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")

LONGEST = 300  # characters of a message
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/]+/)+(?=[^\s/]+/[^\s/]+)")  # of a path, but for the last


def printable(text: str) -> str:
    """Escape what a terminal obeys or cannot show. An escape like \\u001b is that of JSON, which stays valid."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def in_one_line(message: object, longest: int = LONGEST) -> str:
    """Return a message in one line, also where it quotes a path or a prompt with several.

    Of a long one the folders of paths are left out, then its middle: what is wrong stands first, what to do last.
    """
    text = printable(" ".join(str(message).splitlines()))
    if len(text) > longest:
        text = _FOLDERS.sub(".../", text)
    return text if len(text) <= longest else f"{text[: longest - 125]} ... {text[-120:]}"


class LineFormatter(logging.Formatter):
    """Format each log record as one printable line, which has any length only where the user asks for more."""

    def format(self, record: logging.LogRecord) -> str:
        return in_one_line(super().format(record), LONGEST if record.levelno >= logging.WARNING else sys.maxsize)


def show_log(start: str, *, errors_only: bool = False) -> logging.Handler:
    """Print the log of this library on stderr, each record as a line that begins with ``start``.

    Returns the handler, whose level may be changed.
    """
    handler = TqdmHandler()
    handler.setFormatter(LineFormatter(f"{start}: %(message)s"))
    handler.setLevel(logging.ERROR if errors_only else logging.NOTSET)
    _log.handlers = [handler]
    return handler


def open_closed() -> None:
    """Give the process the streams that it was started without (``>&-``), before a file gets one of their numbers.

    As a closed one, stdout then raises OSError when it is written to. Nobody would see what stderr says of that.
    """
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8", closefd=False))


def say(text: str, end: str = "\n") -> None:
    """Print on stdout, in its encoding. Raises OSError where that cannot be written to; all that follows is dropped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError:
        with suppress(OSError):  # or Python complains at its end of what stdout still holds
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def say_if_read(text: str, what: str, warn: Callable[[str], None] = _log.warning) -> None:
    """Print on stdout. Nothing is given up because nobody reads it: a warning says that ``what`` is written."""
    try:
        say(text)
    except OSError as error:
        warn(f"stdout cannot be written to ({error.strerror}); {what} written all the same")


def remark(text: str) -> None:
    """Print a line on stderr; nothing is given up because nobody can read it."""
    with suppress(OSError):
        print(in_one_line(text), file=sys.stderr, flush=True)
