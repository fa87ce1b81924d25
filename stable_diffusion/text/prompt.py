r"""The prompt language: what is written -> prompts, their parts, and pieces of text with weights. Knows no tokens.

    (words:1.3)  (words):1.3    weight 1.3; zero and negative weights are allowed
    (words)  ((words))          weight 1.1, 1.1 * 1.1
    [words]                     weight 1 / 1.1
    {a|b}  [a|b]                alternatives: one prompt for each
    __name__  __folder/name__   a wildcard: alternatives that are the lines of a list; without lists it is text
    [from:to:0.4]               "from" for the first 0.4 of the steps, then "to"; [to:0.4], [from::0.4]: either is empty
    a AND b :0.7                two prompts that guide together, the second with weight 0.7
    BREAK                       what follows starts a new chunk of 75 tokens
    \(  \[  \{  \|  \:  \_  \\  the character itself

A bracket without its partner, and a colon that no number follows, are text: "a sign saying: open :)" is one plain
piece. Weights multiply where brackets are nested.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from itertools import pairwise, product
from typing import NamedTuple

_EMPHASIS = 1.1
_DEEPEST = 64  # brackets and wildcards within each other
_MOST_PROMPTS = 10_000
_COUNTED = 10**15  # prompts; more are not told apart
_LONGEST = 100_000  # characters that a wildcard may grow to by those in its lines
_PAIRS = {")": "(", "]": "[", "}": "{"}
_SIGNS = frozenset("()[]{}|:\\")
_DIGITS = r"(?:\d{1,12}(?:\.\d{0,17})?|\.\d{1,17})"  # longer numbers are text
_NUMBER = rf"[+-]?{_DIGITS}"
_WEIGHT_AT_END = re.compile(rf":\s*({_NUMBER})\s*$")
_WEIGHT_AFTER = re.compile(rf":({_NUMBER})(?![\w.])")
_SHARE = re.compile(rf"\s*({_DIGITS})\s*")
_BREAK, _AND = (re.compile(rf"(?<![\w\\]){word}(?!\w)") for word in ("BREAK", "AND"))
_WILDCARD = re.compile(r"(__(?!_)(?:(?!__)[\w./-])+__)")
_END_OF_BLOCK = re.compile(rf":({_NUMBER})(?=\s|$)")


@dataclass(frozen=True)
class Piece:
    """A run of text with one weight; ``text`` is None for a BREAK."""

    text: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class Part:
    """One of the prompts that guide together, as it reads from ``start`` to ``end``, in shares of a run's steps."""

    text: str
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class _Weighted:
    items: "_Items"
    weight: float


@dataclass(frozen=True)
class _Choice:
    options: tuple["_Items", ...]

    @cached_property
    def size(self) -> tuple[int, int]:
        """How many prompts it stands for, and the length of the longest. Kept: wildcards share their choices."""
        prompts, lengths = zip(*map(_size, self.options), strict=True)
        return sum(prompts), max(lengths)


@dataclass(frozen=True)
class _Change:
    before: "_Items"
    after: "_Items"
    share: float


_Items = tuple["str | _Weighted | _Choice | _Change", ...]


def expand(text: str, seed: int | None = None, wildcards: Callable[[str], Sequence[str]] | None = None) -> list[str]:
    """All prompts that the alternatives of a prompt stand for, in order; with a ``seed``, one of them by chance.

    ``wildcards`` gives the lines that a wildcard's name stands for, at least one, each in the prompt language, such as
    :func:`stable_diffusion.wildcards.read_wildcards` makes; None leaves ``__name__`` as text.

    Raises ValueError for brackets and wildcards nested more than 64 deep, for more than 10,000 prompts, for wildcards
    that lead back to themselves or grow beyond 100,000 characters, and what ``wildcards`` raises.
    """
    items = _parse(text, None if wildcards is None else _Wildcards(wildcards))
    if seed is not None:
        return [_write(_choose(items, random.Random(seed)))]
    prompts, _ = _size(items)
    if prompts > _MOST_PROMPTS:
        raise ValueError(f"the alternatives stand for {prompts} prompts; at most {_MOST_PROMPTS} are expanded")
    return [_write(choice) for choice in _all(items)]


def parts(text: str) -> list[Part]:
    """The parts of a prompt without alternatives: one for each AND and each stretch between two changes.

    Raises ValueError for brackets nested more than 64 deep.
    """
    found = []
    for items, weight in _conjuncts(_parse(text)):
        ends = [0.0, *sorted({share for share in _shares(items) if 0 < share < 1}), 1.0]
        found += [Part(_write(_at(items, start)), weight, start, end) for start, end in pairwise(ends)]
    return found


def pieces(text: str) -> list[Piece]:
    """The pieces of a prompt, in order; neighbours of one weight are one piece.

    Raises ValueError for brackets nested more than 64 deep, or where alternatives or changes are left: ``expand`` the
    prompt, and take its ``parts``, first.
    """
    found: list[Piece] = []
    for piece in _flatten(_parse(text), 1.0):
        if found and piece.text is not None and found[-1].text is not None and found[-1].weight == piece.weight:
            found[-1] = Piece(found[-1].text + piece.text, piece.weight)
        else:
            found.append(piece)
    return [p for p in found if p.text is None or p.text.strip() or len(found) == 1] or [Piece("")]


def blocks(text: str) -> list[Piece]:
    """Weight blocks, "picture of:1 small:0.5 cat": text up to a colon, a number up to a blank; the rest weighs 1."""
    found, end = [], 0
    for match in _END_OF_BLOCK.finditer(text):
        found.append(Piece(text[end : match.start()].strip(), float(match[1])))
        end = match.end()
    rest = text[end:].strip()
    return found + [Piece(rest)] * bool(rest or not found)


# --- reading -----------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """A prompt on its way to items: the position of a bracket's partner is in ``partners``, if it has one."""

    tokens: Sequence[str]
    partners: dict[int, int]
    wildcards: "_Wildcards | None"


@dataclass
class _Wildcards:
    """The choices that wildcards stand for, each read once at a depth, and the names of those being read."""

    lines: Callable[[str], Sequence[str]]
    known: dict[tuple[str, int], _Choice] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)

    def choice(self, name: str, depth: int) -> _Choice:
        """The lines of a wildcard as alternatives, ``depth`` brackets and wildcards within the prompt."""
        if name in self.open:
            way = " -> ".join([*self.open[self.open.index(name) :], name])
            raise ValueError(f"the wildcard __{name}__ leads back to itself ({way}); take it out of one of these")
        if (name, depth) not in self.known:
            try:
                lines = self.lines(name)
            except ValueError as error:
                raise ValueError(f"{error}; __{self.open[-1]}__ asks for it" if self.open else str(error)) from error
            if not lines:
                raise ValueError(f"the wildcard __{name}__ has no lines; give it at least one")
            self.open.append(name)
            choice = _Choice(tuple(_parse(line, self, depth) for line in lines))
            self.open.pop()
            if choice.size[1] > _LONGEST:
                raise ValueError(f"the wildcard __{name}__ grows beyond {_LONGEST} characters; use fewer in its lines")
            self.known[name, depth] = choice
        return self.known[name, depth]


def _parse(text: str, wildcards: _Wildcards | None = None, depth: int = 0) -> _Items:
    tokens = re.findall(r"\\.|[()\[\]{}|:]|[^()\[\]{}|:\\]+|\\", text, re.DOTALL)
    if wildcards:
        tokens = [part for token in tokens for part in _WILDCARD.split(token)]
    return _items(_Source(tokens, _partners(tokens), wildcards), 0, len(tokens), depth)


def _partners(tokens: Sequence[str]) -> dict[int, int]:
    """Position of each opening bracket -> position of its partner. One without a partner is not in it."""
    partners: dict[int, int] = {}
    open_at: list[int] = []
    for i, token in enumerate(tokens):
        if token in _PAIRS.values():
            open_at.append(i)
        elif token in _PAIRS:
            # A bracket of another kind that was opened in between and not closed is text.
            candidates = (k for k in range(len(open_at) - 1, -1, -1) if tokens[open_at[k]] == _PAIRS[token])
            if (k := next(candidates, None)) is not None:
                partners[open_at[k]] = i
                del open_at[k:]
    return partners


def _items(source: _Source, start: int, stop: int, depth: int) -> _Items:
    tokens, partners, wildcards = source
    if depth > _DEEPEST:
        where = f" at __{wildcards.open[-1]}__" if wildcards and wildcards.open else ""
        raise ValueError(
            f"the prompt has brackets{where} nested more than {_DEEPEST} deep; write some of them as \\( and \\)"
        )
    items: list[str | _Weighted | _Choice | _Change] = []
    i = start
    while i < stop:
        if i not in partners:
            wild = wildcards and _WILDCARD.fullmatch(tokens[i])
            items.append(wildcards.choice(tokens[i][2:-2], depth + 1) if wild else tokens[i])
            i += 1
            continue
        close = partners[i]
        after = _WEIGHT_AFTER.match("".join(tokens[close + 1 : min(close + 3, stop)])) if tokens[i] == "(" else None
        weight = float(after[1]) if after else None
        group, weight_taken = _group(source, i, close, depth + 1, weight)
        items.append(group)
        i = close + 1
        if after and weight_taken:  # the colon, and the number at the beginning of what follows it
            items.append(tokens[i + 1][len(after[1]) :])
            i += 2
    return tuple(items)


def _group(
    source: _Source, start: int, close: int, depth: int, weight: float | None
) -> tuple[_Weighted | _Choice | _Change, bool]:
    """What stands between two brackets, and whether the ``weight`` that follows them was used for it."""
    tokens, partners, _ = source

    def split(at: str) -> list[tuple[int, int]]:
        """(start, stop) of the runs between the tokens ``at`` that are in no further brackets."""
        cuts, i = [start], start + 1
        while i < close:
            if i in partners:
                i = partners[i]
            elif tokens[i] == at:
                cuts.append(i)
            i += 1
        return [(a + 1, b) for a, b in pairwise([*cuts, close])]

    def read(run: tuple[int, int]) -> _Items:
        return _items(source, *run, depth)

    if tokens[start] != "(":
        options = split("|")
        if len(options) > 1 or tokens[start] == "{":
            return _Choice(tuple(map(read, options))), False
        *texts, last = split(":")
        share = _SHARE.fullmatch("".join(tokens[slice(*last)]))
        if len(texts) in (1, 2) and share and 0 <= float(share[1]) <= 1:
            after, before = read(texts[-1]), read(texts[0]) if len(texts) == 2 else ()
            if len(texts) == 2 and texts[1][0] == texts[1][1]:
                after = ()
            return _Change(before, after, float(share[1])), False
        return _Weighted(read((start + 1, close)), 1 / _EMPHASIS), False
    *_, last = split(":")
    inner = _WEIGHT_AT_END.match(":" + "".join(tokens[slice(*last)])) if last[0] > start + 1 else None
    if inner:
        return _Weighted(read((start + 1, last[0] - 1)), float(inner[1])), False
    return _Weighted(read((start + 1, close)), _EMPHASIS if weight is None else weight), weight is not None


def _conjuncts(items: _Items) -> list[tuple[_Items, float]]:
    """The items between ANDs, with the weight at the end of each; without an AND a number at the end is text."""
    runs: list[list] = [[]]
    for item in items:
        texts = _AND.split(item) if isinstance(item, str) else [item]
        runs[-1].append(texts[0])
        runs += [[text] for text in texts[1:]]
    if len(runs) == 1:
        return [(items, 1.0)]
    found = []
    for run in runs:
        tail = "".join(run[-2:]) if len(run) > 1 and all(isinstance(item, str) for item in run[-2:]) else ""
        match = _WEIGHT_AT_END.fullmatch(tail)
        found.append((tuple(run[:-2]), float(match[1])) if match else (tuple(run), 1.0))
    return found


# --- walking -----------------------------------------------------------------------------------------------------


def _flatten(items: _Items, weight: float) -> Iterator[Piece]:
    for item in items:
        if isinstance(item, _Weighted):
            yield from _flatten(item.items, weight * item.weight)
        elif not isinstance(item, str):
            raise ValueError("the prompt has alternatives or changes; expand it and take its parts first")
        elif item.startswith("\\"):
            yield Piece(item[1:] or item, weight)
        else:
            for i, text in enumerate(_BREAK.split(item)):
                if i:
                    yield Piece(None)
                if text:
                    yield Piece(text, weight)


def _branches(item: "_Weighted | _Change") -> tuple[_Items, ...]:
    return (item.items,) if isinstance(item, _Weighted) else (item.before, item.after)


def _rebuild(item: "_Weighted | _Change", branches: Sequence[_Items]) -> "_Weighted | _Change":
    if isinstance(item, _Weighted):
        return _Weighted(branches[0], item.weight)
    return _Change(branches[0], branches[1], item.share)


def _size(items: _Items) -> tuple[int, int]:
    """How many prompts the items stand for, up to ``_COUNTED``, and how long the longest is, a bracket for a letter."""
    prompts, length = 1, 0
    for item in items:
        if isinstance(item, str):
            length += len(item)
            continue
        for ways, longest in [item.size] if isinstance(item, _Choice) else map(_size, _branches(item)):
            prompts, length = min(prompts * ways, _COUNTED), length + longest + 1
    return prompts, length


def _all(items: _Items) -> Iterator[_Items]:
    """Every choice of alternatives; the last one varies fastest. What is chosen takes the place of its brackets."""

    def ways(item: "str | _Weighted | _Choice | _Change") -> list[_Items]:
        if isinstance(item, str):
            return [(item,)]
        if isinstance(item, _Choice):
            return [chosen for option in item.options for chosen in _all(option)]
        return [(_rebuild(item, chosen),) for chosen in product(*(list(_all(b)) for b in _branches(item)))]

    for chosen in product(*map(ways, items)):
        yield tuple(part for way in chosen for part in way)


def _choose(items: _Items, generator: random.Random) -> _Items:
    chosen: list = []
    for item in items:
        if isinstance(item, str):
            chosen.append(item)
        elif isinstance(item, _Choice):
            chosen += _choose(generator.choice(item.options), generator)
        else:
            chosen.append(_rebuild(item, [_choose(branch, generator) for branch in _branches(item)]))
    return tuple(chosen)


def _shares(items: _Items) -> Iterator[float]:
    """Where in a run the items change."""
    for item in items:
        if isinstance(item, _Change):
            yield item.share
        if isinstance(item, (_Weighted, _Change)):
            for branch in _branches(item):
                yield from _shares(branch)


def _at(items: _Items, share: float) -> _Items:
    """The items as they read at a share of the run."""
    found: list = []
    for item in items:
        if isinstance(item, _Change):
            found += _at(item.before if share < item.share else item.after, share)
        else:
            found.append(_Weighted(_at(item.items, share), item.weight) if isinstance(item, _Weighted) else item)
    return tuple(found)


def _write(items: _Items, nested: bool = False) -> str:
    """The items as a prompt that reads back as the same items."""
    written = []
    for item in items:
        if isinstance(item, str):
            # What stands alone here was no sign; next to others it might become one.
            written.append(f"\\{item}" if item in _SIGNS and (nested or item != ":") else item)
        elif isinstance(item, _Weighted):
            written.append(f"({_write(item.items, nested=True)}:{_digits(item.weight)})")
        elif isinstance(item, _Choice):
            written.append("{" + "|".join(_write(option, nested=True) for option in item.options) + "}")
        else:
            before, after = _write(item.before, nested=True), _write(item.after, nested=True)
            written.append(f"[{before}:{after}:{_digits(item.share)}]")
    return "".join(written)


def _digits(number: float) -> str:
    """The shortest digits that read back as the number, without an exponent."""
    return f"{Decimal(repr(number)):f}"
