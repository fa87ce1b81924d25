"""The streams of a process: one that is closed, full or read by nobody loses no image and changes no exit code."""

import atexit
import os
import sys
from contextlib import suppress
from typing import TextIO


def open_closed() -> None:
    """Give the process the streams that it was started without (``>&-``), before a file gets one of their numbers.

    As a closed one, stdout then raises OSError when it is written to. Nobody would see what stderr says of that.
    """
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(os.open(os.devnull, flags), mode, encoding="utf-8", closefd=False))
    atexit.unregister(flush)  # of another command of this process
    atexit.register(flush)


def flush() -> None:
    """Write what is left, or drop it: Python would end with exit code 120 where stderr cannot be written to."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop(stream)
        except ValueError:  # it was closed by the program that runs the script
            pass


def drop(stream: TextIO) -> None:
    """Send to nowhere what a stream still holds and gets, or Python complains of it at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str, end: str = "\n") -> None:
    """Print on stdout, in its encoding. Raises OSError where that cannot be written to; all that follows is dropped."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError:
        drop(sys.stdout)
        raise


def remark(text: str) -> None:
    """Print a line on stderr; nothing is given up because nobody can read it."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
