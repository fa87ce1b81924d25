"""All command lines under one name: ``python -m stable_diffusion COMMAND``."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .cli import check, convert, inspect, main, serve, train, upscale
from .cli.parser import Parser
from .cli.streams import open_closed

# Description and function of each command: (arguments, name of the program) -> exit code.
_COMMANDS: dict[str, tuple[str, Callable[[Sequence[str], str], int]]] = {
    "txt2image": ("make images from a prompt", main.txt2image),
    "image2image": ("change an image towards a prompt", main.image2image),
    "unconditional": ("make images with a model that reads no prompt", main.unconditional),
    "convert": ("write a model as a folder that loads at once", convert.main),
    "inspect": ("say what a model, a part of one or a LoRA is, or how an image was made", inspect.main),
    "upscale": ("enlarge pictures by a network", upscale.main),
    "train": ("train a LoRA from a few pictures", train.main),
    "serve": ("draw for other programs and a page in the browser", serve.main),
    "check": ("compare what this machine computes with references", check.main),
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
        epilog="commands:\n" + "\n".join(f"  {name:15}{about}" for name, (about, _) in _COMMANDS.items()),
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="command", help="what to do; with --help, how")
    command = parser.parse_args(words[:1]).command
    return _COMMANDS[command][1](words[1:], f"{prog} {command}")


if __name__ == "__main__":
    sys.exit(run())
