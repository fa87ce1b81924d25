"""What can be said on the command line, and in a file of prompts: options, their bounds, and jobs.

Every option is checked as it is read, so that bad input ends before a model is touched.
"""

import argparse
import math
import re
import shlex
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NoReturn

from . import catalog
from .conditioning import EMPHASES
from .prompt import expand
from .samplers import find_sampler, options, table
from .schedule import SCHEDULES
from .weights.quantize import BITS

TEXT_BITS, UNET_BITS = 4, 8  # what -q stands for
_SIZE_UNIT, _LARGEST_SIDE = 8, 16384
_MANY = 9999  # more of anything is a slip of the keyboard


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, which begins with ``where`` the arguments come from."""

    where = ""

    def error(self, message: str) -> NoReturn:
        self.fail(2, self.where + message)

    def fail(self, code: int, message: str) -> NoReturn:
        """Leave with one line, also where the message quotes a path with line breaks."""
        self.exit(code, f"{self.prog}: error: {' '.join(message.splitlines())}\n")


def _bounded(convert: Callable[[str], Any], holds: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """An argparse type: a number for which ``holds``; the error names the value and what was ``wanted``."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


_count = _bounded(int, lambda n: 1 <= n <= _MANY, f"a whole number from 1 to {_MANY}")
_whole = _bounded(int, lambda n: 0 <= n <= _MANY, f"a whole number from 0 to {_MANY}")
_seed = _bounded(int, lambda n: 0 <= n < 2**63, "a whole number from 0 to 2^63 - 1")
_side = _bounded(
    int, lambda n: 64 <= n <= _LARGEST_SIDE and n % _SIZE_UNIT == 0, f"a multiple of 8 from 64 to {_LARGEST_SIDE}"
)
_number = _bounded(float, math.isfinite, "a number")
_share = _bounded(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
_strength = _bounded(float, lambda x: 0 < x <= 1, "above 0 and at most 1")


def _sampler(name: str) -> str:
    try:
        find_sampler(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


class _ListSamplers(argparse.Action):
    """Print the table of samplers and leave, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(table())
        parser.exit()


_text = _bounded(lambda text: text.encode().decode(), lambda _: True, "valid Unicode; type it in UTF-8")


def add(group: Any, flag: str, *more: str, **options: Any) -> None:
    """Add an option under its name with underscores and with hyphens."""
    group.add_argument(*dict.fromkeys((flag, flag.replace("_", "-"), *more)), **options)


def read(description: str, from_image: bool, argv: Sequence[str] | None) -> tuple["Parser", argparse.Namespace]:
    """The parser of a script, and what it reads from ``argv`` (None: the arguments of the process)."""
    parser = Parser(description=description)
    if from_image:
        parser.add_argument("image", help="the image to start from (PNG, JPEG, WebP, ...)")
    parser.add_argument("prompt", type=_text, nargs="?", help="what to show")
    _add_picture(parser, from_image)
    group = _add_prompt(parser)
    add(group, "--prompt_file", metavar="FILE", help="a prompt on each line, with options of its own if it likes")
    _add_model(parser)
    _add_output(parser)
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.prompt_file is None):
        parser.error(
            "give a prompt, or --prompt_file FILE" if args.prompt is None else "give a prompt or a file of them"
        )
    return parser, args


def _add_picture(parser: argparse.ArgumentParser, from_image: bool) -> None:
    picture = parser.add_argument_group("picture")
    add(picture, "--negative_prompt", type=_text, default="", help="what to steer away from; needs --cfg above 1")
    add(picture, "--width", type=_side, help="in pixels, a multiple of 8 (the model's own)")
    add(picture, "--height", type=_side, help="in pixels, a multiple of 8 (the model's own)")
    add(picture, "--n_images", type=_count, default=4, help="how many images to make (4)")
    add(picture, "--seed", type=_seed, help="of the first image, the others count on from it (random)")
    add(picture, "--steps", type=_count, help="sampler steps (the model's own)")
    add(picture, "--cfg", type=_number, help="guidance scale; 1 and below is none (the model's own)")
    add(picture, "--sampler", type=_sampler, metavar="NAME", help="how to denoise: --list-samplers (the model's own)")
    add(picture, "--list_samplers", action=_ListSamplers, nargs=0, help="print the samplers and leave")
    add(
        picture,
        "--schedule",
        choices=SCHEDULES,
        help="curve of the noise levels (the model's own, or the sampler name's)",
    )
    add(picture, "--eta", type=_share, help="share of fresh noise, 0 to 1, for the samplers that have one")
    if from_image:
        add(
            picture,
            "--strength",
            type=_strength,
            default=0.9,
            help="how far to go from the image: above 0, where little changes, to 1, where nothing is left of it (0.9)",
        )
        add(
            picture,
            "--resize",
            choices=("crop", "pad", "stretch"),
            default="crop",
            help="how the image comes to the size asked for: cut to fill it, fitted into it, or stretched (crop)",
        )


def _add_prompt(parser: argparse.ArgumentParser) -> Any:
    prompt = parser.add_argument_group("prompt")
    add(prompt, "--clip_skip", type=_whole, default=0, help="text encoder layers to leave out at the end (0)")
    add(
        prompt,
        "--emphasis",
        choices=EMPHASES,
        default="mean",
        help="how weights act: on the encoded words, keeping their mean; on what is taken from them; brackets are text",
    )
    add(prompt, "--weight_blocks", action="store_true", help='read "a red:2 cat:1" as blocks with weights')
    add(prompt, "--truncate", action="store_true", help="cut a prompt after its first 75 tokens")
    add(
        prompt,
        "--alternatives",
        choices=("all", "one"),
        default="all",
        help='of "a {red|blue} cat": make every one, or one that the seed chooses (all)',
    )
    return prompt


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    add(
        model,
        "--model",
        default="sdxl",
        help=f"one of {', '.join(catalog.names())}, a Hub id, or a folder in diffusers layout (sdxl)",
    )
    add(model, "--revision", help="branch, tag or commit of a Hub repository (main)")
    add(model, "--no_float16", dest="float16", action="store_false", help="compute in float32")
    add(
        model,
        "--quantize",
        "-q",
        action="store_true",
        help=f"quantize the text encoders to {TEXT_BITS} and the UNet to {UNET_BITS} bits",
    )
    add(model, "--unet_bits", type=int, choices=BITS, help="quantize the UNet to so many bits")
    add(model, "--text_bits", type=int, choices=BITS, help="quantize the text encoders to so many bits")
    add(
        model,
        "--embedding",
        action="append",
        default=[],
        metavar="FILE[=WORD]",
        help="a textual inversion embedding and the word for it in prompts (the file's own); may be given again",
    )
    add(model, "--preload_models", action="store_true", help="read all weights before the first step")


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    add(output, "--output", default="out.png", help="file to write; several images are numbered, this is their grid")
    add(output, "--n_rows", type=_count, default=1, help="rows of the grid (1)")
    add(output, "--decoding_batch_size", type=_count, default=1, help="images to decode at once (1)")
    add(output, "--verbose", "-v", action="store_true", help="say what is chosen, and how much memory was used")


def jobs(parser: Parser, args: argparse.Namespace) -> list[argparse.Namespace]:
    """One set of arguments for each prompt, with ``prompt`` and ``seed`` filled in.

    A line of ``--prompt_file`` is a prompt and, if it likes, options of the groups "picture" and "prompt", which hold
    for that line. Alternatives become a job each. Seeds count on over all images, and anew where a line gives one.
    """
    found: list[argparse.Namespace] = []
    seed = args.seed
    for job in [args] if args.prompt_file is None else _lines(parser, args):
        seed = seed if job.seed is None else job.seed
        if job.sampler is not None:
            options(find_sampler(job.sampler), eta=job.eta)
        for prompt in _variants(job, seed):
            found.append(copy(job))
            found[-1].prompt, found[-1].seed = prompt, seed
            seed += job.n_images
    return found


def _lines(parser: Parser, args: argparse.Namespace) -> list[argparse.Namespace]:
    path = Path(args.prompt_file).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"the prompt file {path} cannot be read ({error}); give a text file in UTF-8") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        prompt, _, flags = re.sub(r"(^|\s)(?=--\w)", "\0", line, count=1).partition("\0")
        own = Parser(prog=parser.prog, add_help=False)
        own.where = f"{path}, line {number}: "
        _add_picture(own, "image" in args)
        _add_prompt(own)
        job = copy(args)
        job.prompt, job.seed = prompt.strip(), None
        try:
            own.parse_args(shlex.split(flags), namespace=job)
        except ValueError as error:
            own.error(str(error))
        found.append(job)
    if not found:
        raise ValueError(f"the prompt file {path} holds no prompt; write one on each line")
    return found


def _variants(job: argparse.Namespace, seed: int) -> list[str]:
    """The prompts that the one given stands for."""
    if job.weight_blocks or job.emphasis == "none":
        return [job.prompt]
    return expand(job.prompt, seed if job.alternatives == "one" else None)
