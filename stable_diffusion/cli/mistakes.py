"""Explain mistakes on a command line in one line with a remedy."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ..options import Number
from .flags import FLAGS, FOREIGN, SWEPT
from .foreign_flags import COUNTERPARTS

_IMAGE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic)$", re.IGNORECASE)
_CURLY = re.compile("[\u201c\u201d\u201e\u00ab\u2018\u2019\u201a]")  # quotes that a shell reads as letters
_ALL = {word for flags in FLAGS.values() for usage in flags for word in usage.split() if word.startswith("--")}


def unknown_flag(word: str, known: Mapping[str, Any], counterparts: Mapping[str, str], of_line: bool) -> str | None:
    """Explain a word that looks like a flag and is none of ``known``: a foreign name, or a similar one."""
    if dash := re.fullmatch("[\u2013\u2014\u2015\u2212]+-?([A-Za-z][\\w-]*)(=.*)?", word, re.DOTALL):
        flag = f"--{dash[1].replace('-', '_')}"
        return f"{word} begins with a long dash; type two hyphens: {flag}" if flag in known else None
    match = re.fullmatch(r"(--?[A-Za-z][\w-]*)(=.*)?", word, re.DOTALL)
    if match is None:
        return None
    name, is_long = match[1].lstrip("-").replace("-", "_"), match[1].startswith("--")
    flag, counterpart = f"--{name}" if is_long else match[1], counterparts.get(name, "")
    if not is_long and len(name) > 1 and f"--{name}" in known:
        return f"{match[1]} has one hyphen; type two: --{name}"
    is_short = flag[:2] in known and not is_long  # also with its value, as in -pTEXT
    if is_short or flag in known or (not counterpart and any(option.startswith(flag) for option in known)):
        return None
    needed = {f"--{one}" for one in re.findall(r"--(\w+)", counterpart or f"--{name}")}
    if counterpart and needed <= known.keys():
        return f"{match[1]} is {counterpart} here" if counterpart[:2] == "--" else f"{match[1]}: {counterpart}"
    if scripts := [script for script, lacking in FOREIGN.items() if needed <= _ALL - {f"--{x}" for x in lacking}]:
        *others, last = scripts
        owner = f"{', '.join(others)} and {last}" if others else last
        return f"{match[1]} is {counterpart or 'a flag'} of {'the command, not of a line' if of_line else owner}"
    similar = get_close_matches(f"--{name}", known, 1, 0.75)
    remedy = f"did you mean {similar[0]}?" if similar else f"see {'--help_all' if '--help_all' in known else '--help'}"
    return f"unknown flag {match[1]}; {remedy}"


def unknown_choice(name: str, value: Any, choices: Sequence[Any]) -> str:
    """Explain a value that is none of the ``choices`` of the flag or argument ``name``."""
    known = [*map(str, choices)]
    foreign = COUNTERPARTS.get(str(value).lower(), "").removeprefix(f"--{name} ")  # such as cuda: --device gpu
    similar = [foreign] if foreign in known else get_close_matches(str(value).lower(), known, 1)
    guess = f"did you mean {similar[0]}? " if similar and not isinstance(value, int) else ""
    if name == "command" and " " in value:
        guess = f'to draw a prompt: txt2image "{value[:100]}"; '
    return f"{value!r} is unknown; {guess}choose one of {', '.join(known)}"


def explained(message: str, parser: argparse.ArgumentParser) -> str:
    """Return a message of argparse in plain words, with the usage of the flag."""
    if missing := re.match("the following arguments are required: (.*)", message):
        return f"{missing[1]} is missing; {' '.join(parser.format_usage().split())}"
    match = re.match(r"argument (\S+): (.*)", message, re.DOTALL)
    if match is None:
        return message
    *_, flag = sorted(match[1].split("/"), key=len)
    action = parser._option_string_actions.get(flag)
    if action is not None and match[2].startswith("expected"):
        values = "{" + ",".join(map(str, action.choices or ())) + "}"
        return f"{flag} needs a value: {flag} {action.metavar or values}"
    if ignored := re.match("ignored explicit argument '(.*)'", match[2], re.DOTALL):
        return f"{flag} takes no value, but {ignored[1]} follows{_bits(flag, ignored[1])}"
    return f"{flag}: {match[2]}"


def _bits(flag: str, value: str) -> str:
    return f"; --unet_bits {value} sets the bits" if flag == "--quantize" else ""


def stray_words(words: Sequence[str], rest: Sequence[str], prompt: str | None, parser: argparse.ArgumentParser) -> str:
    """Explain the words ``rest`` of a command line, which belong to no flag."""
    extra, place = " ".join(rest)[:100], len(words) - 1 - words[::-1].index(rest[0])
    if any(_CURLY.match(word) for word in (*rest, prompt or "")):
        return 'curly quotes do not hold a prompt together; type straight ones: "a prompt"'
    if all(re.fullmatch(r"-?[\d.]+", word) for word in rest):
        flag, value = ["", "", *words[:place]][-2:]
        switch, action = (parser._option_string_actions.get(word) for word in (value, flag))
        if switch is not None:
            *_, name = sorted(switch.option_strings, key=len)
            return f"{value} takes no value, but {extra} follows{_bits(name, rest[0])}"
        if action is not None and ":SCALE" in str(action.metavar):
            return f"{extra} belongs to no flag; a scale follows a colon: {flag} {value}:{rest[0]}"
        lists = f"; lists have commas: {flag} {','.join([value, *rest])}" if action and action.dest in SWEPT else ""
        return f"{extra} belongs to no flag{lists}"
    if prompt is not None and os.path.isfile(prompt):
        return f'{prompt} is a file; to change an image: image2image {prompt} "prompt"'
    if prompt is not None:
        return f'words follow the prompt; put all of it in quotes: "{prompt[:100]} {extra}"'
    return f"unexpected words: {extra}; {' '.join(parser.format_usage().split())}"


def file_as_prompt(prompt: str) -> str | None:
    """Explain a prompt that is the path of an image or of a file of prompts."""
    if not os.path.isfile(prompt):
        return None
    if _IMAGE.search(prompt):
        return f'{prompt} is an image; to change it: image2image {prompt} "prompt"'
    return (
        f"{prompt} is a text file; to read prompts from it: --prompt_file {prompt}" if prompt.endswith(".txt") else None
    )


def number_remedy(limits: Number, text: str) -> str:
    """Return how to write a number that has a unit, a comma or another size, after a semicolon, or nothing."""
    if match := re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+)) ?(%|[A-Za-z]+)", text):
        value = float(match[1]) / (100 if match[2] == "%" else 1)
        value = int(value) if limits.kind is int and value.is_integer() else value
        return f"; write {value:g}" if limits.accepts(value) else ""
    if limits.multiple > 1 and re.fullmatch(r"\d+ ?[x*] ?\d+", text):
        return "; give width and height in two flags"
    if limits.multiple > 1 and text.isdecimal():
        nearest = (int(text[:9]) + limits.multiple // 2) // limits.multiple * limits.multiple
        return f"; the nearest is {nearest}" if limits.accepts(nearest) else ""
    if re.fullmatch(r"\d+,\d+", text) and limits.accepts(float(text.replace(",", "."))):
        return f"; write {text.replace(',', '.')}"
    return ""
