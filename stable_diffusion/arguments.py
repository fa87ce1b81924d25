"""What can be said on the command line: the options of both scripts and their bounds.

Every option is checked as it is read, so that bad input ends before a model is touched.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from . import catalog
from .conditioning import EMPHASES
from .samplers import find_sampler, table
from .schedule import SCHEDULES
from .weights.files import PREDICTIONS
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
_factor = _bounded(float, lambda x: 1 <= x <= 8, "a number from 1 to 8")
_gigabytes = _bounded(lambda text: float(text) * 1e9, lambda x: 1e6 <= x < 1e15, "a number of GB above 0, such as 6")
_radius = _bounded(float, lambda x: 0 <= x <= _MANY, f"a number from 0 to {_MANY}")


def _sampler(name: str) -> str:
    try:
        find_sampler(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def _borders(text: str) -> tuple[int, ...]:
    numbers = re.fullmatch(r"\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*,\s*(\d{1,4})\s*", text)
    if not numbers or not any(borders := tuple(map(int, numbers.groups()))):
        raise argparse.ArgumentTypeError(f"{text!r} is not left,top,right,bottom in pixels, such as 64,0,64,0")
    return borders


def _interval(text: str) -> tuple[float, float]:
    numbers = re.fullmatch(r"\s*(\d*\.?\d+)\s*,\s*(\d*\.?\d+)\s*", text)
    if not numbers or not 0 <= float(numbers[1]) <= float(numbers[2]) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not start,end in shares of the steps, such as 0.2,0.8")
    return float(numbers[1]), float(numbers[2])


def weighted(text: str) -> tuple[str, float]:
    """An argparse type: what is behind a path's last colon is its weight, if it is a number; 1 without one."""
    path, colon, number = text.rpartition(":")
    if colon and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
        return path, float(number)
    return text, 1.0


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
    add_picture(parser, from_image)
    group = add_prompt(parser)
    add(group, "--prompt_file", metavar="FILE", help="a prompt on each line, with options of its own if it likes")
    add(group, "--wildcards", metavar="DIR", help="read __name__ in prompts as the lines of DIR/name.txt")
    if from_image:
        _add_mask(parser)
    _add_control(parser)
    _add_second_pass(parser, from_image)
    _add_model(parser)
    _add_output(parser)
    args = parser.parse_args(argv)
    if (args.prompt is None) == (args.prompt_file is None):
        parser.error(
            "give a prompt, or --prompt_file FILE" if args.prompt is None else "give a prompt or a file of them"
        )
    for rule, message in _RULES:
        if rule(vars(args)):
            parser.error(message)
    return parser, args


# What makes no sense together, and what to do about it. Flags of the other script are absent.
_RULES: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
    (
        lambda a: (
            (a.get("invert_mask") or a.get("mask_blur") or a.get("mask_padding") is not None)
            and not (a["mask"] or a["expand"])
        ),
        "--invert_mask, --mask_blur and --mask_padding need --mask FILE or --expand",
    ),
    (lambda a: a.get("invert_mask") and not a["mask"], "--invert_mask needs --mask FILE"),
    (
        lambda a: a.get("depth") and a["expand"],
        "--depth and --expand do not go together: the map does not show the borders; without it, it is estimated",
    ),
    (
        lambda a: a["control_image"] and not a["controlnet"],
        "--control_image needs --controlnet: an id, a folder or a file",
    ),
    (
        lambda a: a["controlnet"] and len(a["control_image"]) not in (1, len(a["controlnet"])),
        "--control_image is needed once for each --controlnet, or once for all",
    ),
    (
        lambda a: any(len(a[name]) not in (0, 1, len(a["controlnet"])) for name in ("control_start", "control_end")),
        "--control_start and --control_end are given once for each --controlnet, or once for all",
    ),
    (
        lambda a: a["low_memory"] and a["preload_models"],
        "--low_memory reads each network when it is used, --preload_models all of them at once: leave one out",
    ),
    (lambda a: a["refiner"] and a.get("hires"), "--hires and --refiner do not go together: run one after the other"),
    (
        lambda a: a["refiner"] and (a.get("mask") or a.get("expand")),
        "--refiner does not go together with --mask and --expand: it does not know what is kept",
    ),
)


def add_picture(parser: argparse.ArgumentParser, from_image: bool) -> None:
    """The options of the picture, which may also stand in a line of a file of prompts."""
    picture = parser.add_argument_group("picture")
    add(picture, "--negative_prompt", type=_text, default="", help="what to steer away from; needs --cfg above 1")
    add(picture, "--width", type=_side, help="in pixels, a multiple of 8 (the model's own)")
    add(picture, "--height", type=_side, help="in pixels, a multiple of 8 (the model's own)")
    add(picture, "--n_images", type=_count, default=4, help="how many images to make (4)")
    add(picture, "--seed", type=_seed, help="of the first image, the others count on from it (random)")
    add(picture, "--steps", type=_count, help="sampler steps (the model's own)")
    add(picture, "--cfg", type=_number, help="guidance scale; 1 and below is none (the model's own)")
    add(
        picture,
        "--guidance_interval",
        type=_interval,
        default=(0.0, 1.0),
        metavar="START,END",
        help="shares of the steps between which there is guidance; the others take half the time (0,1)",
    )
    add(picture, "--sampler", type=_sampler, metavar="NAME", help="how to denoise: --list-samplers (the model's own)")
    add(picture, "--list_samplers", action=_ListSamplers, nargs=0, help="print the samplers and leave")
    add(
        picture,
        "--schedule",
        choices=SCHEDULES,
        help="curve of the noise levels (the model's own, or the sampler name's)",
    )
    add(picture, "--eta", type=_share, help="share of fresh noise, 0 to 1, for the samplers that have one")
    add(
        picture,
        "--resize",
        choices=("crop", "pad", "stretch"),
        default="crop",
        help="how a given image comes to the size asked for: cut to fill it, fitted into it, or stretched (crop)",
    )
    if from_image:
        add(
            picture,
            "--strength",
            type=_strength,
            help="how far to go from the image: above 0, where little changes, to 1, where nothing is left of it "
            "(0.9; 1 with --expand and for models made for masks or instructions)",
        )
        add(picture, "--image_cfg", type=_number, help="how closely models for instructions follow the image (1.5)")


def add_prompt(parser: argparse.ArgumentParser) -> Any:
    """The options of how prompts are read, which may also stand in a line of a file of prompts."""
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


def _add_mask(parser: argparse.ArgumentParser) -> None:
    mask = parser.add_argument_group("a part of the image")
    add(mask, "--mask", metavar="FILE", help="make anew what is white in this image, keep what is black, blend grey")
    add(mask, "--invert_mask", action="store_true", help="make anew what is black")
    add(mask, "--mask_blur", type=_radius, default=0.0, metavar="PIXELS", help="soften the edges of the mask (0)")
    add(
        mask,
        "--mask_padding",
        type=_whole,
        metavar="PIXELS",
        help="work on what is masked and so much around it, at the model's own size, and paste it back (on all of it)",
    )
    add(mask, "--no_composite", action="store_true", help="write what the model made, also where the image is kept")
    add(mask, "--expand", type=_borders, metavar="L,T,R,B", help="paint borders of so many pixels around the image")
    add(mask, "--depth", metavar="FILE", help="depth map for models made for it, lighter is nearer (estimated)")


def _add_control(parser: argparse.ArgumentParser) -> None:
    control = parser.add_argument_group("ControlNet")
    repeated: dict[str, Any] = {"action": "append", "default": []}
    add(
        control,
        "--controlnet",
        type=weighted,
        metavar="NET[:SCALE]",
        help="an id, folder or file of a ControlNet and how strongly it steers (1); may be given again",
        **repeated,
    )
    add(control, "--control_image", metavar="FILE", help="what it is shown; once for each, or for all", **repeated)
    add(control, "--canny", action="store_true", help="show it the edges of that image")
    add(control, "--control_start", type=_share, metavar="SHARE", help="of the steps, when it begins (0)", **repeated)
    add(control, "--control_end", type=_share, metavar="SHARE", help="of the steps, when it ends (1)", **repeated)
    add(control, "--guess_mode", action="store_true", help="let it steer without the help of the prompt")


def _add_second_pass(parser: argparse.ArgumentParser, from_image: bool) -> None:
    second = parser.add_argument_group("second pass")
    if not from_image:
        add(second, "--hires", type=_factor, metavar="FACTOR", help="enlarge the image so much and work on it again")
        add(second, "--hires_strength", type=_strength, default=0.5, help="how much that changes it (0.5)")
        add(second, "--hires_steps", type=_count, help="sampler steps, of which it takes that share (--steps)")
        add(
            second,
            "--hires_upscaler",
            choices=("latents", "pixels"),
            default="latents",
            help="what is enlarged: the latents, or the decoded image, which changes less (latents)",
        )
    add(second, "--refiner", metavar="MODEL", help="a model that does the last steps, such as sdxl-refiner")
    add(
        second,
        "--refiner_start",
        type=_strength,
        default=0.8,
        metavar="SHARE",
        help="of the noise that is gone when it begins (0.8)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    add(
        model,
        "--model",
        default="sdxl",
        help=f"one of {', '.join(catalog.names())}, a Hub id, a folder or a file with a checkpoint (sdxl)",
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
    add(
        model,
        "--lora",
        type=weighted,
        action="append",
        default=[],
        metavar="LORA[:SCALE]",
        help="a file, folder or id of a LoRA to add to the weights, and how much of it (1); may be given again",
    )
    add(model, "--lora_dir", metavar="DIR", help="where <lora:name:0.8> in a prompt is looked for")
    add(model, "--lora_partial", action="store_true", help="take what fits of a LoRA")
    for part in ("vae", "unet", "text_encoder", "text_encoder_2"):
        add(model, f"--{part}", metavar="PART", help=f"an id, folder or file with another {part}")
    add(model, "--tokenizer", metavar="DIR", help="a folder with vocab.json and merges.txt")
    add(model, "--prediction", choices=PREDICTIONS, help="what the UNet predicts (what the checkpoint says)")
    add(model, "--low_memory", action="store_true", help="keep only the networks in memory that are being used")
    add(model, "--memory_limit", type=_gigabytes, metavar="GB", help="memory to make do with (three quarters of all)")
    add(model, "--preload_models", action="store_true", help="read all weights before the first step")


def _add_output(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    add(output, "--output", default="out.png", help="file to write; several images are numbered, this is their grid")
    add(output, "--n_rows", type=_count, default=1, help="rows of the grid (1)")
    add(output, "--batch_size", type=_count, help="images to make at once, of several prompts too (--n_images)")
    add(output, "--decoding_batch_size", type=_count, default=1, help="images to decode at once (1)")
    add(output, "--verbose", "-v", action="store_true", help="say what is chosen, and how much memory was used")
