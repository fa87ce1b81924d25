"""Convert a model: ``python -m stable_diffusion convert MODEL DEST -q``."""

import argparse
import re
from collections.abc import Sequence

from ..app.convert import MAX_SHARD_SIZE, convert
from ..app.request import CHOICES, Request
from ..models import cpu
from .arguments import line_of
from .flags import FLAGS
from .parser import Parser
from .streams import remark, say_if_read

_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion convert",
        usage="%(prog)s model dest [flags]",
        description="Convert a model to a folder that loads at once.",
        examples=("sd15 sd15-small -q", "model.safetensors model/ --dtype float32"),
    )
    parser.add_argument("model", help="model to convert: a name, a Hub id, a folder or a file")
    parser.add_argument("dest", help="new folder to write, in diffusers layout")
    about = "Choose parts, LoRAs and quantization."
    parser.add_flags("input", about, FLAGS["model"], left_out={"model", "lora_dir", "embedding"})
    add = parser.add_argument_group("files", "Set precision and size of the files.").add_argument
    add("--dtype", choices=CHOICES["dtype"], help="number format of the UNet and text encoders (default: float16)")
    about = "split files of weights above this size (default: 5GB)"
    add("--max_shard_size", type=file_size, default=MAX_SHARD_SIZE, metavar="SIZE", help=about)
    return parser


def file_size(value: str) -> int:
    """Return bytes, from "5GB", "500 MB" or "1000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", value.strip(), re.IGNORECASE)
    if not match or (size := float(match[1]) * _BYTES[match[2].upper()]) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a size such as 5GB or 500MB")
    return int(size)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    try:
        request, _ = line_of(Request(), vars(args))
        cpu.choose_device()
        path = convert(request, args.dest, max_shard_size=args.max_shard_size, report=remark)
    except (ValueError, OSError) as error:
        parser.error(error)
    except (RuntimeError, MemoryError) as error:  # what MLX raises when memory runs out or a file vanishes
        parser.fail(1, f"the conversion failed ({str(error) or 'out of memory'}); nothing was written")
    except KeyboardInterrupt:
        parser.fail(130, "interrupted; nothing was written")
    say_if_read(str(path), f"{path} is", warn=remark)
    return 0
