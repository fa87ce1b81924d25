"""Read text files and JSON objects safely: with limits, and with one-line errors."""

import codecs
import json
from pathlib import Path
from typing import Any

_LARGEST = 10_000_000  # bytes of a text file; a checkpoint's largest, tokenizer.json, has 4 million
_DEEPEST = 20  # nested lists and objects


def read_text(path: Path) -> str:
    """Read a text file of at most 10 MB in UTF-8 or, by its byte order mark, UTF-16; ValueError for other files.

    Line ends \\r\\n and \\r become \\n. No other character ends a line.
    """
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError(f"{path} exceeds {_LARGEST / 1e6:.0f} MB, the limit for such a file; download it again")
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
        if "\0" in text:  # for example UTF-16 without a mark
            raise UnicodeError("it has NUL characters")
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{path} is not readable as UTF-8 text ({reason}); save it in UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object; ValueError, one line with the path, for other files."""
    return parse_json(read_text(path), path)


def parse_json(text: str, source: object) -> dict[str, Any]:
    """Parse a JSON object. ValueError, one line that begins with ``source``, for anything else.

    Texts of more than 10 MB or 20 levels are refused: they could use all memory, or all of Python's stack.
    """
    try:
        if len(text) > _LARGEST:
            raise ValueError(f"more than {_LARGEST / 1e6:.0f} MB")
        value = json.loads(text, parse_int=_integer)
        if _depth(value) > _DEEPEST:
            raise RecursionError
    except (ValueError, RecursionError) as error:
        problem = f"more than {_DEEPEST} levels" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{source} is not readable as JSON ({problem}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} holds a {type(value).__name__}, not an object; download it again")
    return value


def _integer(digits: str) -> int:
    """Return an integer; ValueError with a short message for thousands of digits."""
    if len(digits) > 1000:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _depth(value: Any) -> int:
    """Count nested lists and objects, at most to the first level that is too deep."""
    depth, level = 0, [value]
    while depth <= _DEEPEST and (level := [entry for entry in level if isinstance(entry, list | dict)]):
        level = [inner for entry in level for inner in (entry.values() if isinstance(entry, dict) else entry)]
        depth += 1
    return depth
