"""Jobs: what the options and a file of prompts ask for, prompt by prompt and setting by setting."""

import argparse
import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import product
from pathlib import Path
from typing import Any

from ..cli.flags import add_picture, add_prompt
from ..cli.parser import Parser
from ..diffusion.samplers import find_sampler, options
from ..text.prompt import expand
from ..text.wildcards import read_wildcards

_N_IMAGES = 4  # of a prompt, where nothing else is said
_MOST_IMAGES = 9999
_SETTINGS = ("steps", "cfg", "sampler", "strength")  # what may have several values, beside the seed

# <lora:name:0.8>; inside brackets its colons come back with a backslash.
_LORA = re.compile(r"\s*<lora\\?:([^:<>\\]+)(?:\\?:([+-]?(?:\d+\.?\d*|\.\d+)))?>")


def jobs(parser: Parser, args: argparse.Namespace) -> list[argparse.Namespace]:
    """One set of arguments for each prompt and setting, in the order of the images.

    A line of ``--prompt_file`` is a prompt and, if it likes, options of the groups "picture" and "prompt", which hold
    for that line. Alternatives are a prompt each. Where flags have several values, each combination is a setting: the
    first such flag of the command line changes slowest, then come the prompts, then the seeds.

    Seeds count on over all prompts, and anew where a line gives one; several seeds are those of every prompt. All
    settings of a prompt have the same seeds: what differs is the setting.

    Filled in are ``prompt``, its ``number``, ``seeds``, ``seed`` (the first of them), ``n_images`` (how many),
    ``loras`` (name, scale), one value for each flag, and in ``lists`` the names of those that had several. Raises
    ValueError for more than 9999 images, and where ``--n_images`` is not the number of the seeds.
    """
    found: list[tuple[int, argparse.Namespace]] = []
    following, number, total = _values(args.seed)[0], 0, 0
    wildcards = None if args.wildcards is None else read_wildcards(args.wildcards)
    for line in [args] if args.prompt_file is None else _lines(parser, args):
        given, settings = _values(line.seed), _settings(line)
        following = following if given[0] is None else given[0]
        for prompt in _variants(line, following, wildcards):
            seeds = given if len(given) > 1 else tuple(range(following, following + _count(line)))
            own = {"prompt": _LORA.sub("", prompt), "loras": tuple(_loras(prompt)), "number": number, "seeds": seeds}
            own |= {"seed": seeds[0], "n_images": len(seeds), "lists": _lists(line)}
            found += [(i, argparse.Namespace(**vars(line) | setting | own)) for i, setting in enumerate(settings)]
            following, number, total = seeds[-1] + 1, number + 1, total + len(settings) * len(seeds)
            _refuse_many(total)
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def _values(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)


def _lists(line: argparse.Namespace) -> tuple[str, ...]:
    """The flags that have several values, in their order on the command line."""
    return tuple(name for name in getattr(line, "lists", ()) if len(_values(getattr(line, name))) > 1)


def _count(line: argparse.Namespace) -> int:
    """How many images there are of each prompt and setting."""
    lists, seeds = _lists(line), _values(line.seed)
    if "seed" in lists:
        if line.n_images not in (None, len(seeds)):
            raise ValueError(f"--n_images {line.n_images} is not the number of the {len(seeds)} seeds; leave it out")
        return len(seeds)
    default = 1 if lists else _N_IMAGES
    return default if line.n_images is None else line.n_images


def _settings(line: argparse.Namespace) -> list[dict[str, Any]]:
    """The combinations of the values of all flags that may have several, the first flag of the line the slowest."""
    names = [name for name in dict.fromkeys((*_lists(line), *_SETTINGS)) if name in line and name != "seed"]
    values = [_values(getattr(line, name)) for name in names]
    _refuse_many(_count(line) * math.prod(map(len, values)))
    for sampler in _values(line.sampler):
        if sampler is not None:
            options(find_sampler(sampler), eta=line.eta)
    return [dict(zip(names, combination, strict=True)) for combination in product(*values)]


def _refuse_many(images: int) -> None:
    if images > _MOST_IMAGES:
        raise ValueError(f"more than {_MOST_IMAGES} images are asked for; give fewer values, or a smaller --n_images")


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
        add_picture(own, "image" in args)
        add_prompt(own)
        job = copy(args)
        job.prompt = prompt.strip()
        job.seed = args.seed if len(_values(args.seed)) > 1 else None  # a single one is where counting began
        try:
            own.parse_args(shlex.split(flags), namespace=job)
        except ValueError as error:
            own.error(str(error))
        found.append(job)
    if not found:
        raise ValueError(f"the prompt file {path} holds no prompt; write one on each line")
    return found


def _variants(job: argparse.Namespace, seed: int, wildcards: Callable[[str], Sequence[str]] | None) -> list[str]:
    """The prompts that the one given stands for."""
    if job.weight_blocks or job.emphasis == "none":
        return [job.prompt]
    prompt = _LORA.sub(lambda tag: tag[0].replace("__", "\\__"), job.prompt)  # in a name they are no wildcards
    return expand(prompt, seed if job.alternatives == "one" else None, wildcards)


def _loras(prompt: str) -> Iterator[tuple[str, float]]:
    """(name, scale) of each LoRA that a prompt asks for."""
    for name, scale in _LORA.findall(prompt):
        yield name.strip(), float(scale) if scale else 1.0
