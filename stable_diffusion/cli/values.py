"""Read the values of flags from text: each function returns a value, or refuses the text in one line."""

import argparse
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from ..app.detail import read_places
from ..app.request import CHOICES, COUNT, FRACTION, MOST_IMAGES, NUMBERS, SIZES
from ..app.sharing import SHARES
from ..diffusion.choice import read_name, read_schedule
from ..diffusion.generators import NOISE_SOURCES
from ..diffusion.image_prompts import read_scales
from ..lora.delta import Scale
from ..models.cpu import DEVICES
from ..models.seamless import SEAMLESS
from ..options import Number
from ..weights.files import PREDICTIONS
from ..weights.quantize import FORMATS
from .flags import SWEPT
from .mistakes import file_as_prompt, number_remedy

T = TypeVar("T")


def number(limits: Number, value: str) -> float:
    """Return a number within limits."""
    with suppress(ValueError):
        if limits.accepts(read := limits.kind(value)):
            return read
    raise argparse.ArgumentTypeError(f"{value!r} is not {limits}{number_remedy(limits, value)}")


def several(one: Callable[[str], T], value: str, ranges: bool = False) -> T | tuple[T, ...]:
    """Return a value, or a tuple of comma-separated ones: each once, or with ``ranges`` as given, 2-4 as 2, 3, 4."""
    result: list[T] = []
    for part in value.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part) if ranges else None
        if ends is None:
            try:
                result.append(one(part.strip()))
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentTypeError(f"{error}; a list is 1,2,3 or 1-20" if ranges else error) from None
            continue
        first, last = map(one, ends.groups())
        if first > last:
            raise argparse.ArgumentTypeError(f"{part!r} counts down; write the smaller number first: {last}-{first}")
        if last - first >= MOST_IMAGES:
            raise argparse.ArgumentTypeError(f"{part!r} has too many values, the limit is {MOST_IMAGES}")
        result += range(first, last + 1)
    values = tuple(result if ranges else dict.fromkeys(result))
    return values if len(values) > 1 else values[0]


def name(read: Callable[[str], Any], value: str) -> Any:
    """Return the result of ``read`` for a name, also in the spelling of other programs."""
    try:
        return read(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def known(read: Callable[[str], Any], value: str) -> str:
    """Return a value unchanged, if ``read`` can read it."""
    name(read, value)
    return value


def text(value: str) -> str:
    """Return text that is valid Unicode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not valid Unicode; type it in UTF-8") from None
    return value


def prompt(value: str) -> str:
    """Return a prompt, which is not the path of an image or of a file of prompts."""
    if problem := file_as_prompt(text(value)):
        raise argparse.ArgumentTypeError(problem)
    return value


def gigabytes(value: str) -> float:
    """Return bytes, from a number of GB such as 6."""
    return 1e9 * number(_GIGABYTES, value)


def numbers(limits: Number, form: str, value: str) -> tuple[float, ...]:
    """Return numbers within limits, as many as ``form`` has, such as "start,end in ...", which messages quote."""
    with suppress(argparse.ArgumentTypeError):
        parts = re.split("[x,]", value)
        if len(parts) == len(re.split("[x,]", form.split()[0])):
            return tuple(number(limits, part) for part in parts)
    raise argparse.ArgumentTypeError(f"{value!r} is not {form}")


def vertical_first(limits: Number, form: str, value: str) -> tuple[float, ...]:
    """Return a size as (height, width), or a corner as (top, left), from "width x height" or "left,top"."""
    return numbers(limits, form, value)[::-1]


def weighted(value: str) -> tuple[str, float]:
    """Return a path and its weight: the number after the last colon, or 1."""
    path, weight = _WEIGHTED.fullmatch(value).groups()
    return path, float(weight or 1)


def lora(value: str) -> tuple[str, Scale]:
    """Return a path and its scale: one number after a colon, or two, for the text encoders and the UNet."""
    path, last = _WEIGHTED.fullmatch(value).groups()
    path, first = _WEIGHTED.fullmatch(path).groups() if last else (path, None)
    return path, float(last or 1) if first in (None, last) else (float(first), float(last))


def bits(value: str) -> int | str:
    """Return a number of bits, or the name of a quantization."""
    return int(value) if value.isdecimal() else value


def pictures(value: str) -> tuple[str, ...]:
    """Return the comma-separated paths; an existing file whose name has commas is one path."""
    return (value,) if os.path.isfile(value) else tuple(value.split(","))


_WEIGHTED = re.compile(r"(.*?)(?::([+-]?(?:\d+\.?\d*|\.\d+)))?", re.DOTALL)
_RUN_NUMBERS = dict.fromkeys(("batch_size", "decoding_batch_size", "n_rows", "preview_every"), COUNT)
_RUN_NUMBERS |= {"quality": Number(int, 1, 100)}
_GIGABYTES = Number(float, 0, 9999, excludes_lowest=True)
CHOICES_OF_FLAGS = CHOICES | {
    "device": DEVICES,
    "noise_source": NOISE_SOURCES,
    "prediction": PREDICTIONS,
    "seamless": SEAMLESS,
    "share": SHARES,
    "unet_bits": FORMATS,
    "text_bits": FORMATS,
}
TYPES = {name: partial(number, limits) for name, limits in (NUMBERS | _RUN_NUMBERS).items()}
TYPES |= {
    "prompt": text,
    "negative_prompt": text,
    "prompt_2": text,
    "negative_prompt_2": text,
    "sampler": partial(known, read_name),
    "schedule": partial(name, read_schedule),
    "guidance_interval": partial(numbers, FRACTION, "start,end as fractions of the steps, such as 0.2,0.8"),
    "freeu": partial(numbers, NUMBERS["freeu"], "b1,b2,s1,s2 from 0 to 10, such as 1.5,1.6,0.9,0.2"),
    "pag_layers": lambda value: tuple(value.split(",")),
    "detail_prompt": text,
    "detail": partial(name, read_places),
    "ip_image": pictures,
    "ip_blocks": partial(known, read_scales),
    "expand": partial(numbers, NUMBERS["expand"], "left,top,right,bottom in pixels, such as 64,0,64,0"),
}
_SIZE, _PLACE = "WIDTHxHEIGHT in pixels, such as 1024x768", "left,top in pixels, such as 0,0"
TYPES |= {
    name: partial(vertical_first, NUMBERS[name], _PLACE if "crop" in name else _SIZE)
    for name in SIZES
    if "score" not in name
}
TYPES |= {name: partial(several, TYPES[name], ranges=name == "seed") for name in SWEPT}
TYPES |= {"lora": lora, "controlnet": weighted, "ip_adapter": weighted, "memory_limit": gigabytes}
TYPES |= {"unet_bits": bits, "text_bits": bits}
