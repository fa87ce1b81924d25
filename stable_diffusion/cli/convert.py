"""Convert a model: ``python -m stable_diffusion convert SOURCE DEST -q``."""

import sys
from collections.abc import Sequence

from ..app.convert import DTYPES, MAX_SHARD_SIZE, convert
from ..app.engine import chosen_bits, chosen_parts
from ..app.request import KINDS, Request
from .flags import WEIGHTS, Group
from .parser import Parser
from .types import file_size


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion convert",
        usage="%(prog)s source dest [flags]",
        description="Write a model as a folder that loads at once.",
    )
    parser.add_argument("source", help="what to convert: a name, a Hub id, a folder or a file")
    parser.add_argument("dest", help="the folder to write, in diffusers layout; it must not exist")
    parser.add_version()
    about = "Beside the source, and of what precision it becomes."
    parser.add_flags([Group("what is read", about, WEIGHTS.flags)])
    add = parser.add_argument_group("what is written", "The form of the files.").add_argument
    add("--dtype", choices=DTYPES, default="float16", help="of the UNet and the text encoders (float16)")
    about = "of a file of weights, beyond which there are several (5GB)"
    add("--max_shard_size", type=file_size, default=MAX_SHARD_SIZE, metavar="SIZE", help=about)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    weights = {name: tuple(v) if isinstance(v, list) else v for name, v in vars(args).items() if name in KINDS}
    try:
        request = Request(**weights)
        path = convert(
            args.source,
            args.dest,
            dtype=args.dtype,
            **chosen_bits(request),
            loras=request.lora,
            lora_partial=request.lora_partial,
            revision=request.revision,
            max_shard_size=args.max_shard_size,
            report=lambda line: print(line, file=sys.stderr, flush=True),
            tokenizer=request.tokenizer,
            prediction=request.prediction,
            parts=chosen_parts(request),
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except (RuntimeError, MemoryError) as error:  # what MLX raises when memory runs out or a file vanishes
        parser.fail(1, f"the conversion failed ({str(error) or 'out of memory'}); nothing was written")
    except KeyboardInterrupt:
        parser.fail(130, "interrupted; nothing was written")
    print(path)
    return 0
