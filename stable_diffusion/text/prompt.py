r"""Read the prompt language: text -> prompts, their parts, and pieces of text with weights.

    (words:1.3)  (words):1.3    weight 1.3; zero and negative weights are allowed
    (words)  ((words))          weight 1.1, 1.1 * 1.1
    [words]                     weight 1 / 1.1
    {a|b}  [a|b]                alternatives: one prompt for each
    __name__  __folder/name__   a wildcard: alternatives that are the lines of a list; without lists it is text
    [from:to:0.4]               "from" for the first 0.4 of the steps, then "to"; [to:0.4], [from::0.4]: either is empty
    a AND b :0.7                two prompts that guide together, the second with weight 0.7
    BREAK                       what follows starts a new chunk of 75 tokens
    \(  \[  \{  \|  \:  \_  \\  the character itself

A bracket without its partner, and a colon that no number follows, are text: "a sign saying: open :)" is one piece.
Weights multiply where brackets are nested.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from itertools import chain, pairwise, product
from typing import Literal

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
_MEANING = re.compile(r"[()\[\]{}\\]|AND|BREAK")  # text without any of these is one piece
_WILDCARD = re.compile(r"(__(?!_)(?:(?!__)[\w./-])+__)")
_END_OF_BLOCK = re.compile(rf":({_NUMBER})(?=\s|$)")


@dataclass(frozen=True)
class Piece:
    """Hold a run of text with one weight; ``text`` is None for a BREAK."""

    text: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class Part:
    """Hold one of the prompts that guide together, as it reads from ``start`` to ``end``, shares of a run's steps."""

    pieces: tuple[Piece, ...]
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0


def expand(text: str, seed: int | None = None, wildcards: Callable[[str], Sequence[str]] | None = None) -> list[str]:
    """Return every prompt that the alternatives of a prompt stand for, in order; with a ``seed``, one by chance.

    A prompt without alternatives comes back just as typed.

    Args:
        wildcards: a wildcard's name -> its lines, at least one, each in the prompt language
            (:func:`stable_diffusion.text.wildcards.read_wildcards`); None leaves ``__name__`` as text.

    Raises ValueError for brackets and wildcards nested more than 64 deep, for more than 10,000 prompts, for wildcards
    that lead back to themselves or grow beyond 100,000 characters, and what ``wildcards`` raises.
    """
    if not _MEANING.search(text) and not (wildcards and "__" in text):
        return [text]
    items = _parse(text, None if wildcards is None else _Wildcards(wildcards))
    if not any(group.kind == "choice" for group in _groups(items)):
        return [text]
    if seed is not None:
        generator = random.Random(seed)
        return [_write(next(_choices(items, lambda branches: [generator.choice(branches)])))]
    prompts, _ = _size(items)
    if prompts > _MOST_PROMPTS:
        raise ValueError(f"the alternatives stand for {prompts} prompts; at most {_MOST_PROMPTS} are expanded")
    return [_write(choice) for choice in _choices(items)]


def parts(text: str) -> list[Part]:
    """Read a prompt without alternatives: a part for each AND and for each stretch between two changes.

    Raises ValueError for brackets nested more than 64 deep, and for alternatives: ``expand`` the prompt first.
    """
    if not _MEANING.search(text):
        return [Part((Piece(text),))]
    result = []
    for items, weight in _conjuncts(_parse(text)):
        shares = {group.number for group in _groups(items) if group.kind == "edit" and 0 < group.number < 1}
        ends = [0.0, *sorted(shares), 1.0]
        result += [Part(_joined(_pieces(items, start)), weight, start, end) for start, end in pairwise(ends)]
    return result


def blocks(text: str) -> list[Piece]:
    """Read weight blocks, "picture of:1 small:0.5 cat": text up to a colon, a number up to a blank; a rest weighs 1."""
    result, end = [], 0
    for match in _END_OF_BLOCK.finditer(text):
        result.append(Piece(text[end : match.start()].strip(), float(match[1])))
        end = match.end()
    rest = text[end:].strip()
    return result + [Piece(rest)] * bool(rest or not result)


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Hold what stands in brackets.

    A "weight" has one branch and the weight as its number, a "choice" a branch for each alternative. An "edit" has what
    is read before and after a share of the run, its number.
    """

    kind: Literal["weight", "choice", "edit"]
    branches: tuple["_Items", ...]
    number: float = 1.0

    @cached_property
    def size(self) -> tuple[int, int]:
        """Return the number of its prompts, and the length of the longest. Cached, as wildcards share their choices."""
        prompts, lengths = zip(*map(_size, self.branches), strict=True)
        return (sum(prompts), max(lengths)) if self.kind == "choice" else (math.prod(prompts), sum(lengths))


_Items = tuple[str | _Group, ...]


@dataclass
class _Wildcards:
    """Read wildcards as choices, each once at a depth; ``open`` are the names of those being read."""

    lines: Callable[[str], Sequence[str]]
    known: dict[tuple[str, int], _Group] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)

    def choice(self, name: str, depth: int) -> _Group:
        """Return the lines of a wildcard as alternatives, ``depth`` brackets and wildcards within the prompt."""
        if name in self.open:
            circle = " -> ".join([*self.open[self.open.index(name) :], name])
            raise ValueError(f"the wildcard __{name}__ leads back to itself ({circle}); take it out of one of these")
        if (name, depth) not in self.known:
            try:
                lines = self.lines(name)
            except ValueError as error:
                raise ValueError(f"{error}; __{self.open[-1]}__ asks for it" if self.open else str(error)) from error
            if not lines:
                raise ValueError(f"the wildcard __{name}__ has no lines; give it at least one")
            self.open.append(name)
            choice = _Group("choice", tuple(_parse(line, self, depth) for line in lines))
            self.open.pop()
            if choice.size[1] > _LONGEST:
                raise ValueError(f"the wildcard __{name}__ grows beyond {_LONGEST} characters; use fewer in its lines")
            self.known[name, depth] = choice
        return self.known[name, depth]


def _parse(text: str, wildcards: _Wildcards | None = None, depth: int = 0) -> _Items:
    tokens = re.findall(r"\\.|[()\[\]{}|:]|[^()\[\]{}|:\\]+|\\", text, re.DOTALL)
    if wildcards:
        tokens = [part for token in tokens for part in _WILDCARD.split(token)]
    return _Parser(tokens, wildcards).items(0, len(tokens), depth)


class _Parser:
    """Turn the tokens of a prompt into items."""

    def __init__(self, tokens: Sequence[str], wildcards: _Wildcards | None):
        self.tokens, self.wildcards = tokens, wildcards
        self.partners = _partners(tokens)

    def items(self, start: int, stop: int, depth: int) -> _Items:
        if depth > _DEEPEST:
            place = f" at __{self.wildcards.open[-1]}__" if self.wildcards and self.wildcards.open else ""
            raise ValueError(
                f"the prompt has brackets{place} nested more than {_DEEPEST} deep; write some of them as \\( and \\)"
            )
        items: list[str | _Group] = []
        i = start
        while i < stop:
            token, close = self.tokens[i], self.partners.get(i)
            if close is None:
                wild = self.wildcards and _WILDCARD.fullmatch(token)
                items.append(self.wildcards.choice(token[2:-2], depth + 1) if wild else token)
                i += 1
            elif token == "(":
                weighted, i = self._weighted(i, close, stop, depth + 1)
                items += weighted
            else:
                items.append(self._bracketed(i, close, depth + 1))
                i = close + 1
        return tuple(items)

    def _weighted(self, start: int, close: int, stop: int, depth: int) -> tuple[_Items, int]:
        """Read "(words:1.3)", "(words):1.3" or "(words)": the items, and the position behind them."""
        *_, (last, _) = self._split(start, close, ":")
        inside = _WEIGHT_AT_END.match(":" + "".join(self.tokens[last:close])) if last > start + 1 else None
        if inside:
            return (_Group("weight", (self.items(start + 1, last - 1, depth),), float(inside[1])),), close + 1
        branches = (self.items(start + 1, close, depth),)
        after = _WEIGHT_AFTER.match("".join(self.tokens[close + 1 : min(close + 3, stop)]))
        if not after:
            return (_Group("weight", branches, _EMPHASIS),), close + 1
        rest = self.tokens[close + 2][len(after[1]) :]  # of the text that begins with the number
        return (_Group("weight", branches, float(after[1])), rest), close + 3

    def _bracketed(self, start: int, close: int, depth: int) -> _Group:
        """Read "{a|b}", "[a|b]", "[from:to:0.4]", "[to:0.4]" or "[words]"."""
        options = self._split(start, close, "|")
        if len(options) > 1 or self.tokens[start] == "{":
            return _Group("choice", tuple(self.items(*option, depth) for option in options))
        *texts, last = self._split(start, close, ":")
        share = _SHARE.fullmatch("".join(self.tokens[slice(*last)]))
        if len(texts) in (1, 2) and share and float(share[1]) <= 1:
            branches = (self.items(*text, depth) for text in texts)
            return _Group("edit", ((), *branches)[-2:], float(share[1]))
        return _Group("weight", (self.items(start + 1, close, depth),), 1 / _EMPHASIS)

    def _split(self, start: int, close: int, separator: str) -> list[tuple[int, int]]:
        """Return (start, stop) of the runs between the separators of a bracket, without those of brackets in it."""
        cuts, i = [start], start + 1
        while i < close:
            if self.tokens[i] == separator:
                cuts.append(i)
            i = self.partners.get(i, i) + 1
        return [(a + 1, b) for a, b in pairwise([*cuts, close])]


def _partners(tokens: Sequence[str]) -> dict[int, int]:
    """Return the position of each opening bracket -> the position of its partner; without one it is not in it."""
    partners: dict[int, int] = {}
    open_at: list[int] = []
    opened: Counter[str | None] = Counter()
    for i, token in enumerate(tokens):
        if token in _PAIRS.values():
            open_at.append(i)
            opened[token] += 1
        partner = _PAIRS.get(token)
        while opened[partner]:  # brackets of another kind that were opened in between are text
            k = open_at.pop()
            opened[tokens[k]] -= 1
            if tokens[k] == partner:
                partners[k] = i
                break
    return partners


def _conjuncts(items: _Items) -> list[tuple[_Items, float]]:
    """Return the items between ANDs, with the weight at the end of each; without an AND a number there is text."""
    runs: list[list] = [[]]
    for item in items:
        texts = _AND.split(item) if isinstance(item, str) else [item]
        runs[-1].append(texts[0])
        runs += [[text] for text in texts[1:]]
    if len(runs) == 1:
        return [(items, 1.0)]
    result = []
    for run in runs:
        tail = "".join(run[-2:]) if len(run) > 1 and all(isinstance(item, str) for item in run[-2:]) else ""
        match = _WEIGHT_AT_END.fullmatch(tail)
        result.append((tuple(run[:-2]), float(match[1])) if match else (tuple(run), 1.0))
    return result


# --- walking -----------------------------------------------------------------------------------------------------


def _groups(items: _Items) -> Iterator[_Group]:
    """Yield all groups, also those within others."""
    for item in items:
        if isinstance(item, _Group):
            yield item
            for branch in item.branches:
                yield from _groups(branch)


def _pieces(items: _Items, share: float, weight: float = 1.0) -> Iterator[Piece]:
    """Yield the pieces of the items as they read at a share of the run."""
    for item in items:
        if isinstance(item, str):
            if item.startswith("\\"):
                yield Piece(item[1:] or item, weight)
                continue
            for i, text in enumerate(_BREAK.split(item)):
                if i:
                    yield Piece(None)
                if text:
                    yield Piece(text, weight)
        elif item.kind == "choice":
            raise ValueError("the prompt has alternatives; expand it, and encode one of them")
        elif item.kind == "edit":
            yield from _pieces(item.branches[share >= item.number], share, weight)
        else:
            yield from _pieces(item.branches[0], share, weight * item.number)


def _joined(pieces: Iterator[Piece]) -> tuple[Piece, ...]:
    """Join neighbours of one weight, and drop pieces of blanks beside others."""
    result: list[Piece] = []
    for piece in pieces:
        if result and piece.text is not None and result[-1].text is not None and result[-1].weight == piece.weight:
            result[-1] = Piece(result[-1].text + piece.text, piece.weight)
        else:
            result.append(piece)
    return tuple(p for p in result if p.text is None or p.text.strip() or len(result) == 1) or (Piece(""),)


def _size(items: _Items) -> tuple[int, int]:
    """Return the number of prompts of the items, up to ``_COUNTED``, and the length of the longest."""
    prompts, length = 1, 0
    for item in items:
        count, longest = (1, len(item)) if isinstance(item, str) else item.size
        prompts, length = min(prompts * count, _COUNTED), length + longest + isinstance(item, _Group)
    return prompts, length


def _choices(items: _Items, pick: Callable[[tuple[_Items, ...]], Sequence[_Items]] = tuple) -> Iterator[_Items]:
    """Yield every choice of the alternatives that are picked, the last one fastest, in place of their brackets."""

    def options(item: str | _Group) -> Iterator[_Items]:
        if isinstance(item, str):
            yield (item,)
        elif item.kind == "choice":
            for branch in pick(item.branches):
                yield from _choices(branch, pick)
        else:
            for branches in product(*(_choices(branch, pick) for branch in item.branches)):
                yield (replace(item, branches=branches),)

    for chosen in product(*map(options, items)):
        yield tuple(chain.from_iterable(chosen))


def _write(items: _Items, nested: bool = False) -> str:
    """Return items without choices as a prompt that reads back as the same items."""
    written = []
    for item in items:
        if isinstance(item, str):
            # What stands alone here was no sign; next to others it might become one.
            written.append(f"\\{item}" if item in _SIGNS and (nested or item != ":") else item)
            continue
        *before, last = (_write(branch, nested=True) for branch in item.branches)
        number = f"{Decimal(repr(item.number)):f}"  # reads back as the number, and has no exponent
        written.append(f"[{before[0]}:{last}:{number}]" if item.kind == "edit" else f"({last}:{number})")
    return "".join(written)
