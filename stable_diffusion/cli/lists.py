"""Flags that take several values: ``--seed 1 2 3``, ``--seed 1-20``, ``--steps 10,20``, ``--sampler euler "DPM++ 2M"``.

What follows such a flag belongs to it while it is one of its values. That could take the prompt away where one follows
at once, as in ``txt2image.py --seed 42 "7"``, which was right before there were lists; so where a prompt would be
missing and each flag could have just one value, that is how it is read. Where that leaves a choice, nothing is guessed:
the prompt is missing, and is to be written first, or the list with commas.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# How many of image and prompt need not be given where these flags are.
_REPLACED = {"prompt_file": 1, "from_image": 2}


class Listed(argparse.Action):
    """Store a tuple of values, and in ``lists`` the names of the flags that were given, in their order."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, values)
        namespace.lists = tuple(dict.fromkeys((*getattr(namespace, "lists", ()), self.dest)))


def listed(value: Callable[[str], Any]) -> dict[str, Any]:
    """The options of a flag that takes one value of this type or several, each of them once."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(value(part.strip()) for part in text.split(",")))

    return {"action": Listed, "type": parse}


def with_ranges(value: Callable[[str], int], most: int) -> dict[str, Any]:
    """The same for whole numbers, of which ``2-5`` is 2, 3, 4 and 5; ``most`` says how many there may be at once."""

    def parse(text: str) -> tuple[int, ...]:
        found: dict[int, None] = {}
        for part in text.split(","):
            ends = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", part)
            first, last = (value(end) for end in (ends.groups() if ends else (part.strip(),) * 2))
            if first > last:
                raise argparse.ArgumentTypeError(f"{part!r} goes down; write the smaller number first: {last}-{first}")
            if last - first >= most:
                raise argparse.ArgumentTypeError(f"{part!r} is more than {most} values; give fewer")
            found |= dict.fromkeys(range(first, last + 1))
        return tuple(found)

    return {"action": Listed, "type": parse}


@dataclass
class _Run:
    """A flag that takes several values, and those that may be its own."""

    flag: str
    values: list[str]


def gather(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The arguments in an order in which argparse can read them: each list in one word, then the prompt and its like.

    (The prompt may be left out, so argparse of Python 3.11 takes it for left out where a flag stands before it.)
    """
    if not any(isinstance(action, Listed) for action in parser._actions):
        return list(argv)
    words: list[str | _Run] = []
    loose: list[int] = []  # where in ``words`` the prompt and its like stand
    needed = most = sum(not action.option_strings for action in parser._actions)
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        action = _flag(parser, word)
        if word == "--":
            loose += range(len(words), len(words) + len(rest))
            words, rest = words + rest, []
        elif action is None:
            loose += [] if _looks_like_a_flag(word) else [len(words)]
            words.append(word)
        elif isinstance(action, Listed) and "=" not in word:
            words.append(_Run(word, _values(action, rest)))
        else:
            needed -= _REPLACED.get(action.dest, 0)
            takes = action.nargs != 0 and "=" not in word and rest and not _looks_like_a_flag(rest[0])
            words += [word, rest.pop(0)] if takes else [word]
    one = sum(len(word.values[1:]) for word in words if isinstance(word, _Run)) <= needed - len(loose)
    for i in loose[most:]:
        # More than there can be: what stands behind a list was meant for it, and its type says what is wrong with it.
        if i and isinstance(run := words[i - 1], _Run):
            run.values.append(words[i])
    return _sorted(words, loose, one)


def _sorted(words: Sequence[str | _Run], loose: Sequence[int], one: bool) -> list[str]:
    """All words, those last that belong to no flag; with ``one`` each list has one value, and what follows is loose."""
    flags, others = [], []
    for i, word in enumerate(words):
        if isinstance(word, _Run):
            values = word.values[:1] if one else word.values
            flags.append(f"{word.flag}={','.join(_bare(value) for value in values)}" if values else word.flag)
            others += word.values[len(values) :]
        else:
            (others if i in loose else flags).append(word)
    return [*flags, "--", *others] if others else flags


def _bare(value: str) -> str:
    """One value of ``1, 2, 3``."""
    return value.removesuffix(",")


def _values(action: argparse.Action, rest: list[str]) -> list[str]:
    """Take from ``rest`` the values of a flag: the word that follows it, and more while they are of its type."""
    found: list[str] = []
    while rest and not _looks_like_a_flag(rest[0]):
        try:
            if found:
                action.type(_bare(rest[0]))
        except argparse.ArgumentTypeError:
            break
        found.append(rest.pop(0))
    return found


def _flag(parser: argparse.ArgumentParser, word: str) -> argparse.Action | None:
    """What a word is the flag of; as argparse does, names may be cut short."""
    if not _looks_like_a_flag(word):
        return None
    name = word.partition("=")[0]
    flags = parser._option_string_actions
    return flags.get(name) or next((flags[flag] for flag in flags if flag.startswith(name) and name[:2] == "--"), None)


def _looks_like_a_flag(word: str) -> bool:
    return word[:1] == "-" and word != "-" and " " not in word.partition("=")[0] and not re.match(r"-\.?\d", word)
