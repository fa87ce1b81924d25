"""Pictures that say how they were made, and how to make them again: ``--from_image``.

A record is what ``metadata`` writes: the flags of the run ("arguments") and what they came to. Of a picture by another
program only "arguments" can be told, and what else it says ("other").
"""

import argparse
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ..images.image import SUFFIXES, read_text
from . import infotext

_UNSET: Any = object()


def recorded(path: str | os.PathLike) -> dict[str, Any]:
    """What a picture says of how it was made; ValueError, one line, where it says nothing."""
    texts = read_text(path)
    try:
        record = json.loads(texts.get("stable_diffusion", ""))
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict) and isinstance(record.get("arguments"), dict):
        return record
    arguments, other = infotext.as_arguments(texts.get("parameters", ""))
    if not (other or arguments.keys() - {"prompt", "negative_prompt", "n_images"}):
        raise ValueError(f"{path} does not say how it was made; write a prompt, and flags, in place of --from_image")
    return {"arguments": arguments, "other": other}


def repeat(
    path: str, parse: Callable[..., argparse.Namespace], argv: Sequence[str], recorded_flags: Collection[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of the run that made a picture, but for what ``argv`` says itself; and remarks, a line each.

    What the picture says is put into words of the command line, so it is checked as those are; it is not trusted more.

    Args:
        parse: ``parse_args`` of the script.
        recorded_flags: names of the flags that are taken from a picture. Others that are in it have no effect.

    Raises ValueError, one line, for a picture without a record, or with one that is damaged.
    """
    record, defaults = recorded(path), vars(parse([]))
    given = _given(parse, argv, defaults)
    asked = parse(argv)
    said = _without(record["arguments"], asked.without, recorded_flags)
    words = []
    if asked.whole_batch:
        seeds = _batch(record, path)
        said |= {"seed": seeds}
        words.append(f"--batch_size={len(seeds)}")
    words += [
        word
        for name in recorded_flags
        if name not in given | {"image", "prompt", "n_images"} and name in said and said[name] != _plain(defaults[name])
        for word in _words(name, said[name], defaults[name])
    ]
    args = parse([*words, *argv])
    if "image" in args and args.prompt is None and args.prompt_file is None and not _is_image(args.image):
        args.image, args.prompt = None, args.image  # the one word that was given
    for name in {"image", "prompt"} & vars(args).keys():
        if getattr(args, name) is None and not (name == "prompt" and args.prompt_file):
            setattr(args, name, _text(said.get(name), name, path))
    if not given & {"n_images", "prompt_file"} and not (isinstance(args.seed, tuple) and len(args.seed) > 1):
        args.n_images = 1
    return args, [*_remarks(path, record, defaults, given)]


def _given(parse: Callable[..., argparse.Namespace], argv: Sequence[str], defaults: Mapping[str, Any]) -> set[str]:
    """The names of what ``argv`` itself says."""
    blank = {name: [] if isinstance(value, list) else _UNSET for name, value in defaults.items()}
    said = vars(parse(argv, argparse.Namespace(**blank)))
    return {name for name, value in said.items() if value is not _UNSET and value != [] and value is not None}


def _batch(record: Mapping[str, Any], path: str) -> list[int]:
    """The seeds of all images that were made at once with a picture, of which it is one."""
    made = record.get("made")
    seeds = made.get("batch") if isinstance(made, dict) else None
    if not isinstance(seeds, list) or not seeds:
        raise ValueError(f"{path} does not say what it was made together with; leave out --whole_batch")
    return seeds


def _without(said: Mapping[str, Any], names: Iterable[str], recorded_flags: Collection[str]) -> dict[str, Any]:
    """What a picture says, but for these flags, which may be written as on the command line."""
    left_out = {name.lstrip("-").replace("-", "_"): name for name in names}
    for flag, name in left_out.items():
        if flag not in recorded_flags or flag in ("image", "prompt"):
            known = ", ".join(sorted((said.keys() & recorded_flags) - {"image", "prompt"}))
            raise ValueError(f"--without {name} is none of the flags that can be left out; the picture has {known}")
    return {name: value for name, value in said.items() if name not in left_out}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _words(name: str, value: Any, default: Any) -> Iterable[str]:
    """A recorded value in the words of the command line. What is off is off by being left out."""
    if isinstance(value, bool):
        yield from [f"--{name}"] if value else [f"--no_{name}"] if default else []
    elif isinstance(default, list):  # a flag that may be given again
        for item in value if isinstance(value, list) else [value]:
            yield f"--{name}={_joined(item, ':')}"
    else:
        yield f"--{name}={_joined(value, ',')}"


def _joined(value: Any, sign: str) -> str:
    return sign.join(_joined(item, sign) for item in value) if isinstance(value, list) else infotext.number(value)


def _is_image(word: str | None) -> bool:
    """Whether a word that may be a prompt names an image, also one that is not there."""
    return word is None or os.path.isfile(word) or word.lower().endswith(SUFFIXES)


def _text(value: Any, name: str, path: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{path} names no {name}; give one")
    return value


def _remarks(path: str, record: Mapping[str, Any], flags: Collection[str], given: Collection[str]) -> Iterable[str]:
    unknown = sorted(record["arguments"].keys() - flags)
    if "script" in record and (record["script"] == "image2image") != ("image" in flags):
        yield f"{path} was made with {record['script']}; what only that has is left out"
    elif unknown:
        yield f"{path} was made with what is not known here: {', '.join(unknown)}"
    if "partial" in record:
        yield f"{path} was not finished ({record['partial']}); here all steps are made"
    other = record.get("other")
    if isinstance(other, dict):
        if "Model" in other and "model" not in given:
            yield f"{path} was made with the model {other['Model']}; --model chooses one, nothing is chosen by itself"
        left = ", ".join(f"{name} {value}" for name, value in other.items() if name != "Model")
        yield f"{path} is by another program, whose noise is another" + (f"; not used: {left}" if left else "")
