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

# Flags with which there need not be a prompt.
_PROMPTS = {"prompt_file", "from_image"}


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

    def words(self, one: bool) -> list[str]:
        """As argparse reads it; with ``one``, what follows the first value stands for itself."""
        if not self.values:
            return [self.flag]
        kept = self.values[:1] if one else self.values
        return [f"{self.flag}={','.join(kept)}", *self.values[len(kept) :]]


def gather(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The arguments with the values of each list in one word, ``--seed=1,2,3``, as argparse can read them."""
    words: list[str | _Run] = []
    loose: list[int] = []  # where in ``words`` the prompt and its like stand
    needed = sum(not action.option_strings for action in parser._actions)
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        action = _flag(parser, word)
        if word == "--":
            loose += range(len(words) + 1, len(words) + 1 + len(rest))
            words += [word, *rest]
            break
        if action is None:
            loose += [] if _looks_like_a_flag(word) else [len(words)]
            words.append(word)
        elif isinstance(action, Listed) and "=" not in word:
            words.append(_Run(word, _values(action, rest)))
        else:
            needed -= action.dest in _PROMPTS
            takes = action.nargs != 0 and "=" not in word and rest and not _looks_like_a_flag(rest[0])
            words += [word, rest.pop(0)] if takes else [word]
    spare = sum(len(word.values[1:]) for word in words if isinstance(word, _Run))
    one = spare <= needed - len(loose)
    for i in reversed(loose[max(needed, 0) :]):
        # More than is needed: what stands behind a list was meant for it, and its type says what is wrong.
        if i and isinstance(run := words[i - 1], _Run):
            run.values.append(words.pop(i))
    return [part for word in words for part in ([word] if isinstance(word, str) else word.words(one))]


def _values(action: argparse.Action, rest: list[str]) -> list[str]:
    """Take from ``rest`` the values of a flag: the word that follows it, and more while they are of its type."""
    found: list[str] = []
    while rest and not _looks_like_a_flag(rest[0]):
        try:
            if found:
                action.type(rest[0])
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
    return word[:1] == "-" and word != "-" and " " not in word and not re.match(r"-\.?\d", word)
