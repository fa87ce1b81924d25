"""Parsers of the command lines, made from the table of flags; errors are one line."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn, TypeVar

from .. import __version__
from ..app.detail import read_places
from ..app.request import CHOICES, COUNT, FRACTION, MOST_IMAGES, NUMBERS, SIZES
from ..app.sharing import SHARES
from ..diffusion.choice import read_name, read_schedule, table
from ..diffusion.generators import NOISE_SOURCES
from ..diffusion.image_prompts import read_scales
from ..lora.delta import Scale
from ..models import check_mlx
from ..models.cpu import DEVICES
from ..models.seamless import SEAMLESS
from ..options import Number, SettingError
from ..weights.files import PREDICTIONS
from ..weights.quantize import FORMATS
from .flags import ABOUT, FLAGS, FOREIGN, SWEPT
from .foreign_flags import COUNTERPARTS
from .streams import in_one_line, say

T = TypeVar("T")
_HYPHENS = re.compile(r"\A--(\w[\w-]*)(?=\Z|=)")  # a flag, and not the value behind its "="
_UNREAD = 141  # 128 and SIGPIPE, of which a command dies that knows nothing of it
_EPILOG = """\
Flags may also be written with hyphens: --n-images is --n_images.

examples:
{}

exit codes:
  0 done; 1 failed on the way; 2 refused, nothing was done; 130 interrupted
"""
_EXAMPLES = {
    "txt2image": """\
  %(prog)s "a lighthouse in a storm, oil painting" --model sd15
  %(prog)s "a red circle on a blue background" --model tiny --seed 7
  %(prog)s "a harbour at dawn" -q --low_memory --output harbour.png""",
    "image2image": """\
  %(prog)s photo.jpg "a lit fireplace" --strength 0.5
  %(prog)s photo.jpg "a green door" --mask door.png --mask_padding 32
  %(prog)s photo.jpg "a wide beach" --expand 128,0,128,0 --seed 7""",
    "unconditional": """\
  %(prog)s --model google/ddpm-cat-256 --sampler ddim --steps 50
  %(prog)s --model CompVis/ldm-celebahq-256 --output face.png""",
}
_SCRIPTS = {  # the words of their usage, and what they do
    "txt2image": (['"prompt"'], "Make images from a prompt."),
    "image2image": (["image", '"prompt"'], "Change an image towards a prompt."),
    "unconditional": ([], "Make images with a model that reads no prompt."),
}


class Parser(argparse.ArgumentParser):
    """Parse flags that are named with underscores and may be given with hyphens.

    Only flags that are given are in the result. An error begins with ``where`` the arguments come from. ``types`` and
    ``choices`` are those of flags by name.
    """

    where = ""
    counterparts: Mapping[str, str] = COUNTERPARTS  # names of flags in other programs -> flags here

    def __init__(self, **options: Any) -> None:
        self.types, self.choices = _TYPES, _CHOICES
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, argument_default=argparse.SUPPRESS, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # also the first of a list: --seed -1,5
        if self.add_help:
            version = f"stable-diffusion-mlx {__version__}"
            self.add_argument("--version", action="version", version=version, help="print the version and leave")

    def add_flags(self, title: str, about: str, flags: Mapping[str, str], left_out: Collection[str] = ()) -> None:
        """Add a group of flags (usage -> help), except those with the names ``left_out``."""
        group = None
        for usage, help_text in flags.items():
            words = usage.removesuffix(" ...").split()
            names = [word for word in words if word.startswith("-")]
            name = names[0].removeprefix("--")
            if name in left_out:
                continue
            options = {"type": self.types.get(name), "choices": self.choices.get(name)}
            if len(words) > len(names):
                options |= {"metavar": words[-1], "action": "append" if usage.endswith(" ...") else "store"}
            elif name not in self.choices:
                options = {"action": "store_true"}
            if name in _CONSTANTS:
                dest, const = _CONSTANTS[name]
                options = {"action": "store_const", "const": const, "dest": dest}
            if name == "prompt":
                options |= {"action": _Once}
            group = group or self.add_argument_group(title, about)
            group.add_argument(*names, help=help_text, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse arguments after hyphens in flags have become underscores."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        problems = [self._problem(word) for word in words[:end]]
        if found := [*dict.fromkeys(filter(None, problems))]:
            self.error("; ".join(found[:3]))
        words[:end] = [_HYPHENS.sub(lambda flag: f"--{flag[1].replace('-', '_')}", word) for word in words[:end]]
        result = super().parse_known_args(words, namespace)
        try:
            check_mlx()
        except ImportError as error:
            self.error(error)
        return result

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse arguments, or say what is wrong with words that belong to none."""
        result, rest = self.parse_known_args(args, namespace)
        if not rest:
            return result
        words, prompt = " ".join(rest)[:100], getattr(result, "prompt", None)
        text = f"there are words too many: {words}"
        if all(re.fullmatch(r"-?[\d.]+", word) for word in rest):
            text = f"{words} belongs to no flag: lists have commas (--steps 4,8), and --unet_bits sets the bits of -q"
        elif prompt is not None and os.path.isfile(prompt):
            text = f"{prompt} is a file; image2image makes images from one"
        elif prompt is not None:
            text = f'words follow the prompt; put all of it in quotes: "{prompt[:100]} {words}"'
        self.error(text)

    def _problem(self, word: str) -> str | None:
        """Return the name that a flag of another program has here, or one similar to an unknown flag."""
        match = re.fullmatch(r"(--?[A-Za-z][\w-]*)(=.*)?", word, re.DOTALL)
        if match is None:
            return None
        name, known = match[1].lstrip("-").replace("-", "_"), self._option_string_actions
        flag = f"--{name}" if match[1].startswith("--") else match[1]
        counterpart = self.counterparts.get(name, "")
        is_short = flag[:2] in known and not flag.startswith("--")  # also with its value, as in -pTEXT
        if is_short or flag in known or (not counterpart and any(option.startswith(flag) for option in known)):
            return None
        needed = {f"--{one}" for one in re.findall(r"--(\w+)", counterpart or f"--{name}")}
        if needed <= known.keys():
            return f"{match[1]} is {counterpart} here" if counterpart[:2] == "--" else f"{match[1]}: {counterpart}"
        if scripts := [script for script, lacking in FOREIGN.items() if needed <= _ALL - {f"--{x}" for x in lacking}]:
            *others, last = scripts
            owner = f"{', '.join(others)} and {last}" if others else last
            owner = owner if self.add_help else "the command, not of a line"
            return f"{match[1]} is {counterpart or 'a flag'} of {owner}"
        similar = get_close_matches(f"--{name}", known, 1, 0.75)
        return f"there is no flag {match[1]}; " + (f"did you mean {similar[0]}?" if similar else "see --help")

    def say(self, text: str, end: str = "\n") -> None:
        """Print the result of a command, or exit: with 141 (SIGPIPE) where nobody reads it, else with 1 and a line."""
        try:
            say(text, end)
        except BrokenPipeError:
            super().exit(_UNREAD)
        except OSError as error:
            super().exit(1, f"{self.prog}: error: stdout cannot be written to ({error.strerror})\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit after what is printed has been written, such as the help."""
        self.say("", end="")
        super().exit(status, message)

    def error(self, message: str | Exception) -> NoReturn:
        """Exit with code 2 and one line."""
        self.fail(2, message)

    def fail(self, code: int, message: str | Exception) -> NoReturn:
        """Exit with one line, also where the message quotes a path with line breaks; settings become flags."""
        text = str(message).replace("partial=True", "--lora_partial")
        if isinstance(message, SettingError):
            text = re.sub(rf"\b({'|'.join(message.names)})\b", r"--\1", text)
        self.exit(code, in_one_line(f"{self.prog}: error: {self.where}{text}") + "\n")


class _Once(argparse.Action):
    """Store a value, and refuse another one: the prompt stands without a flag or behind one."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, value: Any, option_string: Any = None) -> None:
        if self.dest in namespace:
            first = getattr(namespace, self.dest)
            parser.error(f"the {self.dest} is given twice: {first[:80]!r} and {value[:80]!r}; put all of it in quotes")
        setattr(namespace, self.dest, value)


def script_parser(script: str, prog: str | None = None) -> Parser:
    """Return the parser of a script, a key of ``FOREIGN``, under the name ``prog`` (None: the process's)."""
    words, description = _SCRIPTS[script]
    usage, epilog = " ".join(["%(prog)s", *words, "[flags]"]), _EPILOG.format(_EXAMPLES[script])
    parser = Parser(prog=prog, usage=usage, description=description, epilog=epilog)
    if "image" in words:
        parser.add_argument("image", nargs="?", help="the image to start from (PNG, JPEG, WebP, ...)")
    if '"prompt"' in words:
        parser.add_argument("prompt", type=text, nargs="?", action=_Once, help="what to show")
    parser.add_argument("--list_samplers", action="version", version=table(), help="print the samplers and leave")
    for title, about in ABOUT.items():
        parser.add_flags(title, about, FLAGS[title], left_out=FOREIGN[script])
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


# --- types: each reads a value from text, or says in one line what is wrong with it -----------------------------------


def number(limits: Number, value: str) -> float:
    """Return a number within limits."""
    with suppress(ValueError):
        if limits.accepts(read := limits.kind(value)):
            return read
    raise argparse.ArgumentTypeError(f"{value!r} is not {limits}")


def several(one: Callable[[str], T], value: str, ranges: bool = False) -> T | tuple[T, ...]:
    """Return a value, or a tuple of those between commas: each once, or with ``ranges`` as given, 2-4 as 2, 3 and 4."""
    result: list[T] = []
    for part in value.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part) if ranges else None
        if ends is None:
            result.append(one(part.strip()))
            continue
        first, last = map(one, ends.groups())
        if first > last:
            raise argparse.ArgumentTypeError(f"{part!r} goes down; write the smaller number first: {last}-{first}")
        if last - first >= MOST_IMAGES:
            raise argparse.ArgumentTypeError(f"{part!r} is more than {MOST_IMAGES} values; give fewer")
        result += range(first, last + 1)
    values = tuple(result if ranges else dict.fromkeys(result))
    return values if len(values) > 1 else values[0]


def name(read: Callable[[str], Any], value: str) -> Any:
    """Return what ``read`` makes of a name, also as other programs write it."""
    try:
        return read(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def known(read: Callable[[str], Any], value: str) -> str:
    """Return a value as it is written, if ``read`` can read it."""
    name(read, value)
    return value


def text(value: str) -> str:
    """Return text that is valid Unicode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not valid Unicode; type it in UTF-8") from None
    return value


def gigabytes(value: str) -> float:
    """Return bytes, from a number of GB such as 6."""
    return 1e9 * number(_GIGABYTES, value)


def numbers(limits: Number, form: str, value: str) -> tuple[float, ...]:
    """Return numbers within limits, as many as ``form`` has between commas or "x": "start,end in ...", for messages."""
    with suppress(argparse.ArgumentTypeError):
        parts = re.split("[x,]", value)
        if len(parts) == len(re.split("[x,]", form.split()[0])):
            return tuple(number(limits, part) for part in parts)
    raise argparse.ArgumentTypeError(f"{value!r} is not {form}")


def vertical_first(limits: Number, form: str, value: str) -> tuple[float, ...]:
    """Return a size as (height, width), or a place as (top, left), from "width x height" or "left,top"."""
    return numbers(limits, form, value)[::-1]


def weighted(value: str) -> tuple[str, float]:
    """Return a path and its weight: the number behind the last colon, or 1."""
    path, weight = _WEIGHTED.fullmatch(value).groups()
    return path, float(weight or 1)


def lora(value: str) -> tuple[str, Scale]:
    """Return a path and its scale: a number behind a colon, or two, for the text encoders and for the UNet."""
    path, last = _WEIGHTED.fullmatch(value).groups()
    path, first = _WEIGHTED.fullmatch(path).groups() if last else (path, None)
    return path, float(last or 1) if first in (None, last) else (float(first), float(last))


def bits(value: str) -> int | str:
    """Return a number of bits, or the name of a quantization."""
    return int(value) if value.isdecimal() else value


def pictures(value: str) -> tuple[str, ...]:
    """Return the paths between commas; a file whose name has commas is one."""
    return (value,) if os.path.isfile(value) else tuple(value.split(","))


_ALL = {word for flags in FLAGS.values() for usage in flags for word in usage.split() if word.startswith("--")}
_CONSTANTS = {"no_float16": ("dtype", "float32"), "cpu": ("device", "cpu")}
_WEIGHTED = re.compile(r"(.*?)(?::([+-]?(?:\d+\.?\d*|\.\d+)))?", re.DOTALL)
_RUN_NUMBERS = dict.fromkeys(("batch_size", "decoding_batch_size", "n_rows", "preview_every"), COUNT)
_RUN_NUMBERS |= {"quality": Number(int, 1, 100)}
_GIGABYTES = Number(float, 0, 9999, excludes_lowest=True)
_CHOICES = CHOICES | {
    "device": DEVICES,
    "noise_source": NOISE_SOURCES,
    "prediction": PREDICTIONS,
    "seamless": SEAMLESS,
    "share": SHARES,
    "unet_bits": FORMATS,
    "text_bits": FORMATS,
}
_TYPES = {name: partial(number, limits) for name, limits in (NUMBERS | _RUN_NUMBERS).items()}
_TYPES |= {
    "prompt": text,
    "negative_prompt": text,
    "prompt_2": text,
    "negative_prompt_2": text,
    "sampler": partial(known, read_name),
    "schedule": partial(name, read_schedule),
    "guidance_interval": partial(numbers, FRACTION, "start,end in shares of the steps, such as 0.2,0.8"),
    "freeu": partial(numbers, NUMBERS["freeu"], "b1,b2,s1,s2 from 0 to 10, such as 1.5,1.6,0.9,0.2"),
    "pag_layers": lambda value: tuple(value.split(",")),
    "detail_prompt": text,
    "detail": partial(name, read_places),
    "ip_image": pictures,
    "ip_blocks": partial(known, read_scales),
    "expand": partial(numbers, NUMBERS["expand"], "left,top,right,bottom in pixels, such as 64,0,64,0"),
}
_SIZE, _PLACE = "WIDTHxHEIGHT in pixels, such as 1024x768", "left,top in pixels, such as 0,0"
_TYPES |= {
    name: partial(vertical_first, NUMBERS[name], _PLACE if "crop" in name else _SIZE)
    for name in SIZES
    if "score" not in name
}
_TYPES |= {name: partial(several, _TYPES[name], ranges=name == "seed") for name in SWEPT}
_TYPES |= {"lora": lora, "controlnet": weighted, "ip_adapter": weighted, "memory_limit": gigabytes}
_TYPES |= {"unet_bits": bits, "text_bits": bits}
