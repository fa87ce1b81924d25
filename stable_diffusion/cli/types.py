"""The values that flags take: each type reads one from text, or says what is wrong with it and what is wanted.

They are types as argparse understands them: functions from text that raise ``ArgumentTypeError``.
"""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

from ..diffusion.samplers import find_sampler

_SIZE_UNIT, _LARGEST_SIDE = 8, 16384
MANY = 9999  # more of anything is a slip of the keyboard
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def bounded(convert: Callable[[str], Any], holds: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """A type of value for which ``holds``; the error names the text and what was ``wanted``."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


count = bounded(int, lambda n: 1 <= n <= MANY, f"a whole number from 1 to {MANY}")
whole = bounded(int, lambda n: 0 <= n <= MANY, f"a whole number from 0 to {MANY}")
seed = bounded(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
side = bounded(
    int, lambda n: 64 <= n <= _LARGEST_SIDE and n % _SIZE_UNIT == 0, f"a multiple of 8 from 64 to {_LARGEST_SIDE}"
)
number = bounded(float, math.isfinite, "a number")
share = bounded(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
strength = bounded(float, lambda x: 0 < x <= 1, "above 0 and at most 1")
merging = bounded(float, lambda x: 0 <= x <= 0.75, "a number from 0 to 0.75")
factor = bounded(float, lambda x: 1 <= x <= 8, "a number from 1 to 8")
gigabytes = bounded(lambda text: float(text) * 1e9, lambda x: 1e6 <= x < 1e15, "a number of GB above 0, such as 6")
quality = bounded(int, lambda n: 1 <= n <= 100, "a whole number from 1 to 100")
radius = bounded(float, lambda x: 0 <= x <= MANY, f"a number from 0 to {MANY}")
text = bounded(lambda text: text.encode().decode(), lambda _: True, "valid Unicode; type it in UTF-8")


def sampler(name: str) -> str:
    """The name of a sampler, also as others write it."""
    try:
        find_sampler(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def borders(text: str) -> tuple[int, ...]:
    """Pixels at the left, the top, the right and the bottom, "64,0,64,0"; not all of them zero."""
    numbers = re.fullmatch(r"\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*", text)
    if not numbers or not any(found := tuple(map(int, numbers.groups()))):
        raise argparse.ArgumentTypeError(f"{text!r} is not left,top,right,bottom in pixels, such as 64,0,64,0")
    return found


def interval(text: str) -> tuple[float, float]:
    """Two shares, "0.2,0.8", the second not below the first."""
    numbers = re.fullmatch(r"\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*", text)
    if not numbers or not 0 <= float(numbers[1]) <= float(numbers[2]) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not start,end in shares of the steps, such as 0.2,0.8")
    return float(numbers[1]), float(numbers[2])


def weighted(text: str) -> tuple[str, float]:
    """A path and its weight: what is behind the last colon, if it is a number; 1 without one."""
    path, colon, number = text.rpartition(":")
    if colon and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
        return path, float(number)
    return text, 1.0


def file_size(text: str) -> int:
    """Bytes, from "5GB", "500 MB" or "1000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match or (size := float(match[1]) * _BYTES[match[2].upper()]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return int(size)
