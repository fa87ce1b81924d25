"""The command lines of both scripts: which flags they have, what makes no sense together, and how a run is repeated."""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from ..app.records import repeat
from . import flags
from . import types as values
from .parser import Parser

_ONLY_RESOURCES = {"low_memory", "memory_limit", "batch_size", "decoding_batch_size", "preload_models"}

_EPILOG = """\
Flags may also be written with hyphens: --n-images is --n_images.

examples:
  %(prog)s {}
  %(prog)s {}
  %(prog)s {}

exit codes:
  0 done; 1 failed on the way; 2 refused, nothing was done; 130 interrupted
"""
_EXAMPLES = (
    (
        '"a lighthouse in a storm, oil painting" --model sd15',
        '"a red circle on a blue background" --model tiny --seed 7',
        '"a harbour at dawn" -q --low_memory --output harbour.png',
    ),
    (
        'photo.jpg "a lit fireplace" --strength 0.5',
        'photo.jpg "a green door" --mask door.png --mask_padding 32',
        'photo.jpg "a wide beach" --expand 128,0,128,0 --seed 7',
    ),
)


def script_parser(from_image: bool, prog: str | None = None) -> Parser:
    """The parser of ``image2image`` or ``txt2image``, under the name ``prog`` (None: that of the process)."""
    usage = '%(prog)s image "prompt" [flags]' if from_image else '%(prog)s "prompt" [flags]'
    parser = Parser(
        prog=prog,
        usage=usage,
        description="Change an image towards a prompt." if from_image else "Make images from a prompt.",
        epilog=_EPILOG.format(*_EXAMPLES[from_image]),
    )
    if from_image:
        parser.add_argument("image", nargs="?", help="the image to start from (PNG, JPEG, WebP, ...)")
    parser.add_argument("prompt", type=values.text, nargs="?", help="what to show")
    parser.add_version()
    flags.add_picture(parser, from_image)
    prompt = flags.add_prompt(parser)
    prompt.add_argument(
        "--prompt_file", metavar="FILE", help="a prompt on each line, with options of its own if it likes"
    )
    prompt.add_argument(
        "--from_image",
        metavar="FILE",
        help="make this picture again, as it says itself; flags, and a prompt, take the place of what it says",
    )
    prompt.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="FLAG",
        help="leave out this flag of --from_image's picture, such as lora or quantize; may be given again",
    )
    prompt.add_argument(
        "--whole_batch",
        action="store_true",
        help="make as many images at once as when --from_image's was made: then it is the same to the bit",
    )
    prompt.add_argument("--wildcards", metavar="DIR", help="read __name__ in prompts as the lines of DIR/name.txt")
    if from_image:
        flags.add_mask(parser)
    flags.add_control(parser)
    flags.add_second_pass(parser, from_image)
    flags.add_model(parser)
    flags.add_memory(parser)
    flags.add_output(parser)
    flags.add_preview(parser)
    return parser


def read(from_image: bool, argv: Sequence[str] | None, prog: str | None = None) -> tuple[Parser, argparse.Namespace]:
    """The parser of a script, and what it reads from ``argv`` (None: the arguments of the process)."""
    parser = script_parser(from_image, prog)
    args = parser.parse_args(argv)
    if args.from_image is not None:
        args = _repeated(parser, args.from_image, from_image, argv)
    if from_image and args.image is None:
        parser.error("give the image to start from, and a prompt")
    if (args.prompt is None) == (args.prompt_file is None):
        parser.error(
            "give a prompt, or --prompt_file FILE; behind a list, that needs commas: --seed 1,2 PROMPT"
            if args.prompt is None
            else "give a prompt or a file of them"
        )
    for rule, message in _RULES:
        if rule(vars(args)):
            parser.error(message)
    return parser, args


def _repeated(parser: Parser, path: str, from_image: bool, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the run that made the picture at ``path``, but for what ``argv`` says itself."""
    parser.where = f"{path}: "  # what argv says has been found right
    try:
        argv = sys.argv[1:] if argv is None else argv
        args, remarks = repeat(path, parser.parse_args, argv, recorded_flags(from_image))
    except ValueError as error:
        parser.where = ""
        parser.error(str(error))
    parser.where = ""
    for remark in remarks:
        print(f"{parser.prog}: {remark}", file=sys.stderr)
    return args


@cache
def recorded_flags(from_image: bool) -> tuple[str, ...]:
    """The names of the flags that have a say in a picture: they are recorded in it, and read from it again.

    These are all but the few named here and those that write files, which no picture may decide.
    """
    writing = Parser(add_help=False)
    flags.add_output(writing)
    flags.add_preview(writing)
    others = {"prompt_file", "from_image", "without", "whole_batch", "wildcards", "alternatives", "list_samplers"}
    others |= _ONLY_RESOURCES | vars(writing.parse_args([])).keys()
    return tuple(name for name in vars(script_parser(from_image).parse_args([])) if name not in others)


# What makes no sense together, and what to do about it. Flags of the other script are absent.
_RULES: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
    (
        lambda a: a["quality"] is not None and not a["output"].lower().endswith((".jpg", ".jpeg", ".webp")),
        "--quality is for JPEG and WebP: give --output a name that ends in .jpg or .webp",
    ),
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
    (
        lambda a: a["preview_every"] is not None and a["preview"] is None,
        "--preview_every needs --preview: a file or a folder",
    ),
    (
        lambda a: a["preview_vae"] is not None and a["preview"] is None and a["stepwise"] is None,
        "--preview_vae needs --preview: a file or a folder; or --stepwise FILE",
    ),
    (
        lambda a: (a["without"] or a["whole_batch"]) and a["from_image"] is None,
        "--without and --whole_batch need --from_image FILE",
    ),
    (lambda a: a["refiner"] and a.get("hires"), "--hires and --refiner do not go together: run one after the other"),
    (
        lambda a: a["refiner"] and (a.get("mask") or a.get("expand")),
        "--refiner does not go together with --mask and --expand: it does not know what is kept",
    ),
)
