"""The streams of a process: a closed, full or unread stream loses no image and changes no exit code.

All output of the commands is made printable here: file names, prompts and text from unknown files may contain control
characters for the terminal.
"""

import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

from ..app.progress import TqdmHandler

_log = logging.getLogger("stable_diffusion")

# Control characters, marks that hide text or change its direction, and surrogates.
_UNPRINTABLE = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")

LONGEST = 300  # characters of a message
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/]+/)+(?=[^\s/]+/[^\s/]+)")  # of a path, except the last


def printable(text: str) -> str:
    """Escape characters that control a terminal or cannot be shown. Escapes like \\u001b keep JSON valid."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def in_one_line(message: object, longest: int = LONGEST) -> str:
    """Return a message in one line, even if it quotes a path or a prompt with several lines.

    In a long message the folders of paths are omitted, then its middle: the mistake comes first, the remedy last.
    """
    text = printable(" ".join(str(message).splitlines()))
    if len(text) > longest:
        text = _FOLDERS.sub(".../", text)
    return text if len(text) <= longest else f"{text[: longest - 125]} ... {text[-120:]}"


class LineFormatter(logging.Formatter):
    """Format each log record as one printable line; only verbose lines have any length."""

    def format(self, record: logging.LogRecord) -> str:
        return in_one_line(super().format(record), LONGEST if record.levelno >= logging.WARNING else sys.maxsize)


def show_log(start: str, *, errors_only: bool = False) -> logging.Handler:
    """Print the log of this library on stderr, each record as a line that begins with ``start``.

    Returns the handler; its level may be changed.
    """
    handler = TqdmHandler()
    handler.setFormatter(LineFormatter(f"{start}: %(message)s"))
    handler.setLevel(logging.ERROR if errors_only else logging.NOTSET)
    _log.handlers = [handler]
    return handler


def open_closed() -> None:
    """Open the streams that the process was started without (``>&-``), before a file gets one of their numbers.

    Like a closed one, stdout then raises OSError when it is written to. Output to stderr is dropped.
    """
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8", closefd=False))


def say(text: str, end: str = "\n") -> None:
    """Print on stdout, in its encoding. Raises OSError if that fails; further output is dropped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(printable(text).encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError:
        with suppress(OSError):  # or Python reports an error at its end about unwritten output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def say_if_read(text: str, what: str, warn: Callable[[str], None] = _log.warning) -> None:
    """Print on stdout. If nobody reads it, the run continues, and a warning says that ``what`` is written."""
    try:
        say(text)
    except OSError as error:
        warn(f"stdout cannot be written to ({error.strerror}); {what} still written")


def remark(text: str) -> None:
    """Print a line on stderr; if nobody reads it, the run continues."""
    with suppress(OSError):
        print(in_one_line(text), file=sys.stderr, flush=True)
