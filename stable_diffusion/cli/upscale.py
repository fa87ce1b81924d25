"""Enlarge images with an upscaler network: ``python -m stable_diffusion upscale photo.jpg --upscaler FILE``."""

from collections.abc import Sequence

from ..app.memory import set_limits
from ..app.upscale import upscale
from ..models import cpu
from .parser import Parser
from .values import gigabytes


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion upscale",
        usage="%(prog)s image ... --upscaler FILE [flags]",
        description="Enlarge pictures by an upscaler network.",
        examples=(
            "photo.jpg --upscaler RealESRGAN_x4plus.pth",
            "*.png --upscaler 4x.pth --output large/",
        ),
    )
    parser.add_argument("images", nargs="+", metavar="image", help="pictures to enlarge (PNG, JPEG, WebP, ...)")
    about = "network: a file of an ESRGAN, Real-ESRGAN or SRVGG, or one on the Hub as owner/name/file"
    parser.add_argument("--upscaler", required=True, metavar="FILE", help=about)
    about = "file, or folder for several (default: NAME_xSCALE.png in the current folder)"
    parser.add_argument("--output", default=None, metavar="PATH", help=about)
    about = "memory budget in GB, kept by tiles (default: 75 %% of RAM, at most 90 %% of Metal's recommendation)"
    parser.add_argument("--memory_limit", type=gigabytes, default=None, metavar="GB", help=about)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code."""
    parser, written = make_parser(prog), []
    args = parser.parse_args(argv)
    try:
        cpu.choose_device()
        cpu.tune()
        limit = set_limits(args.memory_limit, low_memory=True)
        for path in upscale(args.images, args.upscaler, args.output, limit):
            written.append(path)
            parser.say(str(path))
    except (ValueError, OSError) as error:
        parser.fail(1 if written else 2, error)
    except (RuntimeError, MemoryError) as error:  # what MLX raises when memory runs out
        parser.fail(1, f"the computation failed ({str(error) or 'out of memory'}); try a smaller --memory_limit")
    except KeyboardInterrupt:
        parser.fail(130, "interrupted; the files named so far are complete")
    return 0
