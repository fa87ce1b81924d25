"""Argument types: each reads a value from text, or says in one line what is wrong with it."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..diffusion.samplers import find_sampler
from ..options import Number

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class NumberType:
    """Read a number within limits."""

    number: Number

    def __call__(self, text: str) -> float:
        """Return the number; ArgumentTypeError names the text and the limits."""
        try:
            value = self.number.kind(text)
        except ValueError:
            value = None
        if value is None or not self.number.accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {self.number}")
        return value


@dataclass(frozen=True)
class Several:
    """Read several values between commas, each once; with ``ranges`` 2-5 are 2, 3, 4 and 5."""

    one: Callable[[str], Any]
    ranges: bool = False
    most: int = 9999

    def __call__(self, text: str) -> tuple[Any, ...]:
        """Return a tuple; ArgumentTypeError for a value that is wrong, or a range that is too long."""
        items: dict[Any, None] = {}
        for part in text.split(","):
            ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part) if self.ranges else None
            if ends is None:
                items[self.one(part.strip())] = None
                continue
            first, last = map(self.one, ends.groups())
            if first > last:
                raise argparse.ArgumentTypeError(f"{part!r} goes down; write the smaller number first: {last}-{first}")
            if last - first >= self.most:
                raise argparse.ArgumentTypeError(f"{part!r} is more than {self.most} values; give fewer")
            items |= dict.fromkeys(range(first, last + 1))
        return tuple(items)


def text(value: str) -> str:
    """Return text that is valid Unicode."""
    try:
        return value.encode().decode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not valid Unicode; type it in UTF-8") from None


def sampler(name: str) -> str:
    """Return the name of a sampler, also as other programs write it."""
    try:
        find_sampler(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def gigabytes(value: str) -> float:
    """Return bytes, from a number of GB such as 6."""
    try:
        size = float(value) * 1e9
    except ValueError:
        size = 0.0
    if not 1e6 <= size < 1e15:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of GB above 0, such as 6")
    return size


def borders(value: str) -> tuple[int, ...]:
    """Return the pixels at left, top, right and bottom, from "64,0,64,0"; not all of them are zero."""
    numbers = re.fullmatch(r"\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*", value)
    if not numbers or not any(pixels := tuple(map(int, numbers.groups()))):
        raise argparse.ArgumentTypeError(f"{value!r} is not left,top,right,bottom in pixels, such as 64,0,64,0")
    return pixels


def interval(value: str) -> tuple[float, float]:
    """Return two fractions, from "0.2,0.8", the second not below the first."""
    numbers = re.fullmatch(r"\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*", value)
    if not numbers or not 0 <= float(numbers[1]) <= float(numbers[2]) <= 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not start,end in shares of the steps, such as 0.2,0.8")
    return float(numbers[1]), float(numbers[2])


def weighted(value: str) -> tuple[str, float]:
    """Return a path and its weight: the number behind the last colon, or 1."""
    path, colon, number = value.rpartition(":")
    if colon and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
        return path, float(number)
    return value, 1.0


def file_size(value: str) -> int:
    """Return bytes, from "5GB", "500 MB" or "1000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", value.strip(), re.IGNORECASE)
    if not match or (size := float(match[1]) * _BYTES[match[2].upper()]) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a size such as 5GB or 500MB")
    return int(size)
