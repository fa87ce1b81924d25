"""Serve other programs and a page in the browser: ``python -m stable_diffusion serve --model sd15``."""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..app.engine import Resources
from ..app.library import Library, Limits, list_sources
from ..app.request import COUNT, Request
from ..models import cpu
from ..options import Number
from .arguments import line_of
from .flags import ABOUT
from .flags import FLAGS as OF_SCRIPTS
from .parser import Parser, number
from .streams import remark, show_log

_log = logging.getLogger("stable_diffusion")

_KEY = "SD_API_KEY"
FLAGS = {
    "server": {
        "--host ADDRESS": "address to listen on; another than the default demands --api_key (127.0.0.1)",
        "--port N": "port to listen on (7860)",
        "--api_key KEY": f"key that clients have to send, as Bearer or as Basic's password ({_KEY} in the environment)",
        "--cors ORIGIN ...": "let pages of this origin call, such as http://localhost:3000; may be given again",
        "--queue N": "jobs that may wait; further ones get 503 (32)",
        "--idle SECONDS": "free the networks after this time without a job (never)",
        "--most_steps N": "steps that a request may ask for (150)",
        "--most_pixels N": "side of a picture that a request may ask for (2048)",
        "--most_images N": "pictures that a request may ask for (16)",
        "--log": "form of the log on stderr: text, or json with an object for each request (text)",
    },
    "names": {
        "--models PLACE ...": "models that requests may name: a folder of models, a file, an alias or a Hub id; may be "
        "given again",
        "--vaes PLACE ...": "autoencoders that requests may name, likewise",
        "--controlnets PLACE ...": "ControlNets that requests may name, likewise",
        "--upscalers PLACE ...": "upscaler networks that requests may name, likewise",
    },
}
_ABOUT = {"server": "Who may ask, and for how much.", "names": "Requests name no files: these are what they choose of."}
_OF_PICTURE = {"width", "height", "steps", "cfg", "sampler", "schedule", "negative_prompt"}  # defaults of requests
_OF_RUN = {
    "low_memory",
    "memory_limit",
    "batch_size",
    "device",
    "cpu",
    "dtype",
    "no_float16",
    "exact",
    "preload_models",
}
_OF_RUN |= {"safety_check", "safety_model", "verbose"}
_GROUPS = {"picture": _OF_PICTURE, "model": None, "memory and time": _OF_RUN, "output": _OF_RUN}
_NUMBERS = {"port": Number(int, 0, 65535), "idle": Number(float, 0, excludes_lowest=True)}
_NUMBERS |= dict.fromkeys(("queue", "most_steps", "most_pixels", "most_images"), COUNT)
_TYPES = {name: partial(number, limits) for name, limits in _NUMBERS.items()}
_EXAMPLES = """\
examples:
  %(prog)s --model sd15
  %(prog)s --model sdxl -q --models ~/models --lora_dir ~/loras --idle 600
  %(prog)s --model sd15 --host 0.0.0.0 --api_key "$KEY"
"""


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion serve",
        usage="%(prog)s [flags]",
        description="Draw for programs that speak AUTOMATIC1111's or OpenAI's API, and for a page in the browser.",
        epilog=_EXAMPLES,
    )
    parser.types, parser.choices = parser.types | _TYPES, parser.choices | {"log": ("text", "json")}
    for title, flags in FLAGS.items():
        parser.add_flags(title, _ABOUT[title], flags)
    for title, wanted in _GROUPS.items():
        names = [word.removeprefix("--") for usage in OF_SCRIPTS[title] for word in usage.split()[:1]]
        left_out = set() if wanted is None else set(names) - wanted
        parser.add_flags(title, ABOUT[title], OF_SCRIPTS[title], left_out=left_out)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code."""
    parser = make_parser(prog)
    args = vars(parser.parse_args(argv))
    try:
        from ..server import serve
    except ImportError as error:
        parser.error(f"the server needs {error.name}: pip install 'stable-diffusion-mlx[server]'")
    show_log(parser.prog)
    _log.setLevel(logging.INFO if "verbose" in args or args.get("log") == "json" else logging.WARNING)
    cpu.tune()
    try:
        serve.run(_settings(args), lambda address: remark(f"{parser.prog}: listening on {address}"))
    except (ValueError, OSError) as error:
        parser.error(error)
    return 0


def _settings(args: Mapping[str, Any]) -> Any:
    """Return the settings of the server that flags stand for. Raises ValueError for those that do not go together."""
    from ..server.settings import Settings

    base, _ = line_of(Request(n_images=1), args)
    sources = {kind: list_sources(args.get(kind, ())) for kind in ("models", "vaes", "controlnets", "upscalers")}
    for kind, name in (("models", "model"), ("vaes", "vae")):
        if (source := base.value(name)) is not None:  # may be named too
            own = list_sources([source]) if name == "model" or os.path.exists(source) else {source: source}
            sources[kind] = own | sources[kind] | own
            base = base.with_values(**{name: next(iter(own.values()))})
    folders = tuple(os.path.abspath(os.path.expanduser(folder)) for folder in base.lora_dir or ())
    base = base.with_values(lora_dir=folders or None)
    limits = {name: args[f"most_{name}"] for name in ("steps", "pixels", "images") if f"most_{name}" in args}
    resources = {name: args[name] for name in ("low_memory", "memory_limit", "batch_size") if name in args}
    names = ("host", "port", "cors", "queue", "idle", "device", "safety_check", "safety_model", "preload_models")
    return Settings(
        base=base,
        library=Library(**sources, lora_folders=folders),
        limits=Limits(**limits),
        resources=Resources(**resources),
        api_key=args.get("api_key", os.environ.get(_KEY)),
        **{name: args[name] for name in names if name in args},
    )
