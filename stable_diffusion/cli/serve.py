"""Serve other programs and a page in the browser: ``python -m stable_diffusion serve --model sd15``."""

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..app.engine import Resources
from ..app.library import Library, Limits, list_sources
from ..app.request import COUNT, NUMBERS, Request
from ..diffusion.choice import read_name
from ..models import cpu
from ..options import Number
from .arguments import line_of
from .flags import ABOUT
from .flags import FLAGS as OF_SCRIPTS
from .parser import Parser
from .streams import remark, show_log
from .values import known, number

_log = logging.getLogger("stable_diffusion")

_KEY = "SD_API_KEY"
EVERYDAY = ("model", "models", "lora_dir", "host", "port", "api_key", "idle", "low_memory", "safety_check", "quantize")
FLAGS = {
    "server": {
        "--host ADDRESS": "address to listen on; any other than the default requires --api_key (default: 127.0.0.1)",
        "--port N": "port to listen on (default: 7860)",
        "--api_key KEY": f"require this key of clients, as Bearer or as Basic's password (default: {_KEY} in the "
        "environment)",
        "--cors ORIGIN ...": "allow requests from pages of this origin, such as http://localhost:3000; repeatable",
        "--queue N": "jobs that may wait; the server refuses more with 503 (default: 32)",
        "--idle SECONDS": "free the networks after this time without a job (default: never)",
        "--most_steps N": "most steps per request (default: 150)",
        "--most_pixels N": "longest side of an image per request (default: 2048)",
        "--most_images N": "most images per request (default: 16)",
        "--log": "format of the log on stderr: text, or json with one object per request (default: text)",
    },
    "names": {
        "--models PLACE ...": "offer these models by name: folder of models, file, alias or Hub id; repeatable",
        "--vaes PLACE ...": "offer these autoencoders by name, as --models",
        "--controlnets PLACE ...": "offer these ControlNets by name, as --models",
        "--upscalers PLACE ...": "offer these upscaler networks by name, as --models",
    },
    "defaults": {
        "--negative_prompt TEXT": "negative prompt",
        "--width PIXELS": "width, a multiple of 8 (default: the model's)",
        "--height PIXELS": "height, a multiple of 8 (default: the model's)",
        "--steps N": "denoising steps (default: the model's)",
        "--cfg SCALE": "classifier-free guidance scale; 1 and below turn guidance off (default: the model's)",
        "--sampler NAME": "sampler, see txt2image --list_samplers (default: the model's)",
        "--schedule NAME": "curve of the noise levels, as for txt2image (default: the model's)",
    },
}
_ABOUT = {"server": "Set address, access and limits.", "names": "Name the networks that clients may choose."}
_ABOUT |= {
    "defaults": "Set the values for requests that omit them.",
    "model": ABOUT["model"],
    "memory and time": ABOUT["memory and time"],
}
_ABOUT |= {"output": "Set safety check and messages."}
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
_GROUPS = {"model": None, "memory and time": _OF_RUN, "output": _OF_RUN}
_NUMBERS = {"port": Number(int, 0, 65535), "idle": Number(float, 0, excludes_lowest=True)}
_NUMBERS |= dict.fromkeys(("queue", "most_steps", "most_pixels", "most_images"), COUNT)
_NUMBERS |= {name: NUMBERS[name] for name in ("steps", "cfg")}  # no lists
_TYPES = {name: partial(number, limits) for name, limits in _NUMBERS.items()} | {"sampler": partial(known, read_name)}
_EXAMPLES = (
    "--model sd15",
    "--model sdxl -q --models ~/models --idle 600",
    '--model sd15 --host 0.0.0.0 --api_key "$KEY"',
)


def make_parser(prog: str | None = None) -> Parser:
    """Return the parser of this command line, under the name ``prog``."""
    parser = Parser(
        prog=prog or "python -m stable_diffusion serve",
        usage="%(prog)s [flags]",
        description="Serve programs with AUTOMATIC1111's or OpenAI's API, and a page in the browser.",
        examples=_EXAMPLES,
        codes="",
    )
    parser.types, parser.choices = parser.types | _TYPES, parser.choices | {"log": ("text", "json")}
    groups = dict(FLAGS)
    for title, wanted in _GROUPS.items():
        flags = OF_SCRIPTS[title].items()
        groups[title] = {usage: text for usage, text in flags if wanted is None or usage.split()[0][2:] in wanted}
    parser.add_groups(groups, _ABOUT, EVERYDAY)
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line with the arguments ``argv`` (None: the process's), and return the exit code."""
    parser = make_parser(prog)
    args = vars(parser.parse_args(argv))
    try:
        from ..server import serve
    except ImportError as error:
        parser.error(f"the server needs {error.name}: pip install '.[server]'")
    show_log(parser.prog)
    _log.setLevel(logging.INFO if "verbose" in args or args.get("log") == "json" else logging.WARNING)
    cpu.tune()
    try:
        serve.run(_settings(args), lambda address: remark(f"{parser.prog}: listening on {address}"))
    except (ValueError, OSError) as error:
        parser.error(error)
    except KeyboardInterrupt:  # while the model is opened, which another thread does and may take long
        remark(f"{parser.prog}: error: interrupted; nothing was started")
        os._exit(130)
    return 0


def _settings(args: Mapping[str, Any]) -> Any:
    """Return the server settings of the flags. Raises ValueError for flags that cannot be combined."""
    from ..server.settings import Settings

    base, _ = line_of(Request(n_images=1), args)
    sources = {kind: list_sources(args.get(kind, ())) for kind in ("models", "vaes", "controlnets", "upscalers")}
    for kind, name in (("models", "model"), ("vaes", "vae")):
        if (source := base.value(name)) is not None:  # clients may also name it
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
