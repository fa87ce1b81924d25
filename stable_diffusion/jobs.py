"""Jobs: what the options and a file of prompts ask for, prompt by prompt."""

import argparse
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path

from .arguments import Parser, add_picture, add_prompt
from .prompt import expand
from .samplers import find_sampler, options
from .wildcards import read_wildcards

# <lora:name:0.8>; inside brackets its colons come back with a backslash.
_LORA = re.compile(r"\s*<lora\\?:([^:<>\\]+)(?:\\?:([+-]?(?:\d+\.?\d*|\.\d+)))?>")


def jobs(parser: Parser, args: argparse.Namespace) -> list[argparse.Namespace]:
    """One set of arguments for each prompt, with ``prompt`` and ``seed`` filled in, and ``loras`` (name, scale).

    A line of ``--prompt_file`` is a prompt and, if it likes, options of the groups "picture" and "prompt", which hold
    for that line. Alternatives become a job each. Seeds count on over all images, and anew where a line gives one.
    """
    found: list[argparse.Namespace] = []
    seed = args.seed
    wildcards = None if args.wildcards is None else read_wildcards(args.wildcards)
    for job in [args] if args.prompt_file is None else _lines(parser, args):
        seed = seed if job.seed is None else job.seed
        if job.sampler is not None:
            options(find_sampler(job.sampler), eta=job.eta)
        for prompt in _variants(job, seed, wildcards):
            found.append(copy(job))
            found[-1].seed, found[-1].loras = seed, tuple(_loras(prompt))
            found[-1].prompt = _LORA.sub("", prompt)
            seed += job.n_images
    return found


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
        job.prompt, job.seed = prompt.strip(), None
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
