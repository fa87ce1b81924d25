"""All command lines under one name: ``python -m stable_diffusion COMMAND``."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill

from .cli import check, convert, inspect, main, serve, train, upscale
from .cli.parser import Parser
from .cli.streams import open_closed

# Description and function of each command: (arguments, name of the program) -> exit code.
_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "txt2image": ("draw images from a prompt", main.txt2image),
    "image2image": ("change an image towards a prompt", main.image2image),
    "unconditional": ("draw images with a model that reads no prompt", main.unconditional),
    "convert": ("convert a model to a folder that loads at once", convert.main),
    "inspect": ("describe a model, network or LoRA, or the settings of an image", inspect.main),
    "upscale": ("enlarge pictures by an upscaler network", upscale.main),
    "train": ("train a LoRA from a few pictures", train.main),
    "serve": ("serve images to other programs and to a page in the browser", serve.main),
    "check": ("compare the results of this machine with references", check.main),
}


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (None: the process's arguments) begins with; returns its exit code."""
    open_closed()
    words = list(sys.argv[1:] if argv is None else argv)
    name = Path(sys.argv[0]).stem
    prog = name if name == "stable-diffusion" else "python -m stable_diffusion"
    parser = Parser(
        prog=prog,
        usage=f"{prog} command ...",
        description="Stable Diffusion for Apple Silicon in pure MLX.",
        epilog="\n".join(["commands:", *(f"  {name:15}{about}" for name, (about, _) in _COMMANDS.items()), "", ""]),
        examples=('txt2image "a red circle" --model tiny', "txt2image --help"),
        codes="",
    )
    parser.hint = fill(f"commands: {', '.join(_COMMANDS)}", 80, subsequent_indent="  ")
    parser.add_argument("command", choices=_COMMANDS, metavar="command", help="one of the commands below")
    command = parser.parse_args(words[:1]).command
    return _COMMANDS[command][1](words[1:], f"{prog} {command}")


if __name__ == "__main__":
    sys.exit(run())
