r"""Read the prompt language: one prompt -> its parts, and pieces of text with weights.

    (words:1.3)  (words):1.3    weight 1.3; zero and negative weights are allowed
    (words)  ((words))          weight 1.1, 1.1 * 1.1
    [words]                     weight 1 / 1.1
    [from:to:0.4]               "from" for the first 0.4 of the steps, then "to"; [to:0.4], [from::0.4]: either is empty
    [from:to:10]                the same after 10 steps; a second pass continues the count, with fractions 1 to 2
    [a|b]  [a|b|]               "a" and "b" alternate, one step each; the last may be empty
    a AND b :0.7                two composed prompts, the second with weight 0.7
    BREAK                       start a new chunk of 75 tokens
    \(  \[  \{  \|  \:  \_  \\  the character itself

Alternatives, {a|b}, and wildcards are expanded by ``alternatives``; here their signs are text.
A bracket without its partner, and a colon that no number follows, are text: "a sign saying: open :)" is one piece.
Weights multiply where brackets are nested.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise, product
from typing import Literal

EMPHASES = ("mean", "values", "none")

_EMPHASIS = 1.1
_DEEPEST = 64  # nested brackets
_MOST_TEXTS = 500  # of prompt scheduling in a run
_PARTNERS = {")": "(", "]": "["}
_DIGITS = r"(?:\d{1,12}(?:\.\d{0,17})?|\.\d{1,17})"  # longer numbers are text
_NUMBER = rf"[+-]?{_DIGITS}"
_WEIGHT_AT_END = re.compile(rf":\s*({_NUMBER})\s*")
_WEIGHT_AFTER = re.compile(rf":({_NUMBER})(?![\w.])")
_WHEN = re.compile(rf"\s*({_NUMBER})\s*")
_KEYWORD = re.compile(r"(?<!\w)(AND|BREAK)(?!\w)")
_TOKEN = re.compile(r"\\.|[()\[\]|:]|[^()\[\]|:\\]+|\\", re.DOTALL)
_END_OF_BLOCK = re.compile(rf":({_NUMBER})(?=\s|$)")


@dataclass(frozen=True)
class Piece:
    """Hold a run of text with one weight; ``text`` is None for a BREAK."""

    text: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class Span:
    """Hold a set of steps of a run: between two fractions, between two steps, and one of each ``period``.

    Steps count from 0. Each pair excludes its end.
    """

    start: float = 0.0
    end: float = math.inf
    first: float = 0
    last: float = math.inf
    phase: int = 0
    period: int = 1

    def holds(self, step: int, steps: int) -> bool:
        """Return whether the span contains a step of a run of ``steps``."""
        start, end = (fraction * steps - 1e-9 for fraction in (self.start, self.end))  # 0.07 * 100 is above 7
        return start <= step < end and self.first <= step < self.last and step % self.period == self.phase

    def overlap(self, other: "Span") -> "Span | None":
        """Return the steps of both spans; None if their turns never coincide."""
        period = math.lcm(self.period, other.period)
        turns = (i for i in range(period) if i % self.period == self.phase and i % other.period == other.phase)
        if (phase := next(turns, None)) is None:
            return None
        fractions = max(self.start, other.start), min(self.end, other.end)
        return Span(*fractions, max(self.first, other.first), min(self.last, other.last), phase, period)

    def after(self, steps: int) -> "Span":
        """Return the span for a second pass: the first pass had ``steps``, and fractions up to 1 belong to it."""
        numbers = {"start": self.start - 1, "end": self.end - 1, "first": self.first - steps, "last": self.last - steps}
        return replace(self, **numbers)


@dataclass(frozen=True)
class Part:
    """Hold one part of a composed prompt, with its text in some spans of a run.

    ``pieces_2`` are the pieces for XL's second text encoder; None means the same ``pieces``.
    """

    pieces: tuple[Piece, ...]
    weight: float = 1.0
    spans: tuple[Span, ...] = (Span(),)
    pieces_2: tuple[Piece, ...] | None = None

    @property
    def of_encoders(self) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Return the pieces for the first and the second encoder."""
        return self.pieces, self.pieces if self.pieces_2 is None else self.pieces_2

    def beside(self, second: "Part") -> Iterator["Part"]:
        """Yield the part with the pieces of ``second`` for the second encoder, in the spans of both."""
        overlaps = [mine.overlap(other) for mine in self.spans for other in second.spans]
        if spans := tuple(span for span in overlaps if span is not None):
            yield replace(self, spans=spans, pieces_2=second.pieces)


def parts(text: str, emphasis: str = "mean", weight_blocks: bool = False, *, text_2: str | None = None) -> list[Part]:
    """Read a prompt: one part for each AND, and for each text of prompt scheduling.

    Args:
        text_2: the prompt for XL's second text encoder. Default: the same. Its parts belong to those of ``text`` in
            order, or a single part to all; weights of parts are those of ``text``.
        emphasis: one of ``EMPHASES``; "none" reads all signs of the language as text.
        weight_blocks: read "picture of:1 small:0.5 cat" instead: a part for each text up to a colon and a number before
            a space, weighted by its fraction of the numbers' sum. Text after the last number has weight 1.

    Raises ValueError for an unknown emphasis and for a wrong number of parts in a second prompt. So do brackets nested
    more than 64 deep, prompt scheduling with more than 500 texts, and blocks whose weights sum to zero.
    """
    if emphasis not in EMPHASES:
        raise ValueError(f"emphasis {emphasis!r} is unknown; choose one of {', '.join(EMPHASES)}")
    groups = _joined_parts(text, emphasis, weight_blocks)
    if text_2 is None:
        return [part for group in groups for part in group]
    seconds = _joined_parts(text_2, emphasis, weight_blocks)
    if len(seconds) not in (1, len(groups)):
        counts = f"the second encoder's prompt has {len(seconds)} parts and the first one's {len(groups)}"
        raise ValueError(f"{counts}; give it one part, or the same number")
    pairs = zip(groups, seconds * len(groups) if len(seconds) == 1 else seconds, strict=True)
    return [both for group, others in pairs for part, other in product(group, others) for both in part.beside(other)]


def _joined_parts(text: str, emphasis: str, weight_blocks: bool) -> list[list[Part]]:
    """Read a prompt: for each AND or block, the texts of prompt scheduling."""
    if weight_blocks:
        return [[part] for part in _blocks(text)]
    if emphasis == "none":
        return [[Part((Piece(text),))]]
    result, prompts = [], _split(_read(text), "AND")
    for items in prompts:
        ending = "".join(item for item in items[-2:] if isinstance(item, str))
        weight = _WEIGHT_AT_END.fullmatch(ending) if len(prompts) > 1 else None  # a single prompt has no weight
        items = items[:-2] if weight else items
        spans: dict[tuple[Piece, ...], list[Span]] = {}
        for span in _spans(items):
            spans.setdefault(_joined(_pieces(items, span)), []).append(span)
        factor = float(weight[1]) if weight else 1.0
        result.append([Part(pieces, factor, tuple(of_pieces)) for pieces, of_pieces in spans.items()])
    return result


def _blocks(text: str) -> list[Part]:
    *ended, rest = map(str.strip, _END_OF_BLOCK.split(text))  # text, weight, text, weight, ..., text
    blocks = [(block, float(weight)) for block, weight in zip(ended[::2], ended[1::2], strict=True)]
    if rest or not blocks:
        blocks.append((rest, 1.0))
    total = sum(weight for _, weight in blocks)
    if abs(total) < 1e-6:
        raise ValueError(f"the weights of the blocks sum to {total:g}, so they have no mean; change the weights")
    return [Part((Piece(block),), weight / total) for block, weight in blocks]


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Hold the contents of brackets.

    A "weight" has one branch, and the weight as its number, which is None until the weight after "(words)" is read. An
    "edit" has the text before and after its number, a float for a fraction of the run and an int for a step. A group of
    "turns" has a branch for each alternating step.
    """

    kind: Literal["weight", "edit", "turns"]
    branches: Sequence["_Items"]
    number: float | None

    @cached_property
    def depth(self) -> int:
        depths = (item.depth for branch in self.branches for item in branch if isinstance(item, _Group))
        return 1 + max(depths, default=0)


_Items = list[str | _Group]


def _read(text: str) -> _Items:
    items: _Items = []
    opened: dict[str, list[int]] = {bracket: [] for bracket in _PARTNERS.values()}  # their indices in the items
    for token in _TOKEN.findall(text):
        partner = _PARTNERS.get(token)
        if token in opened:
            opened[token].append(len(items))
            items.append(token)
        elif partner and opened[partner]:
            start = opened[partner].pop()
            for places in opened.values():  # brackets opened inside have no partner and are text
                while places and places[-1] > start:
                    places.pop()
            items[start:] = [_group(partner, items[start + 1 :])]
        else:
            items += _KEYWORD.split(token)
    return _weigh(items)


def _group(bracket: str, items: _Items) -> _Group:
    """Read "(words:1.3)", "(words)", "[a|b]", "[from:to:0.4]", "[to:0.4]" or "[words]"."""
    *before, last = _split(items, ":")
    ending = "".join(last) if all(isinstance(item, str) for item in last) else ""
    kind, branches, number = "weight", [items], None if bracket == "(" else 1 / _EMPHASIS
    if bracket == "(":
        if before and (weight := _WEIGHT_AT_END.fullmatch(f":{ending}")):
            branches, number = [items[: -len(last) - 1]], float(weight[1])
    elif "|" in items:
        kind, branches = "turns", _split(items, "|")
    elif len(before) in (1, 2) and (when := _WHEN.fullmatch(ending)):
        kind, branches, number = "edit", [[], *before][-2:], (float if "." in when[1] else int)(when[1])
    group = _Group(kind, [_weigh(branch) for branch in branches], number)
    if group.depth > _DEEPEST:
        raise ValueError(f"the prompt has brackets nested more than {_DEEPEST} deep; write some of them as \\( and \\)")
    return group


def _split(items: _Items, separator: str) -> list[_Items]:
    runs: list[_Items] = [[]]
    for item in items:
        if item == separator:
            runs.append([])
        else:
            runs[-1].append(item)
    return runs


def _weigh(items: _Items) -> _Items:
    """Give each "(words)" its weight: the number after it, as in "(words):1.3", or 1.1."""
    for i, item in enumerate(items):
        if isinstance(item, _Group) and item.number is None:
            behind = "".join(text for text in items[i + 1 : i + 3] if isinstance(text, str))
            after = _WEIGHT_AFTER.match(behind)
            items[i] = replace(item, number=float(after[1]) if after else _EMPHASIS)
            if after:
                items[i + 1 : i + 3] = ["", behind[after.end() :]]
    return items


# --- walking -----------------------------------------------------------------------------------------------------


def _groups(items: _Items) -> Iterator[_Group]:
    for item in items:
        if isinstance(item, _Group):
            yield item
            for branch in item.branches:
                yield from _groups(branch)


def _spans(items: _Items) -> list[Span]:
    """Return the spans of a run within which the text of the items is constant."""
    groups = list(_groups(items))
    changes = [group.number for group in groups if group.kind == "edit" and group.number > 0]
    fractions, steps = (sorted({change for change in changes if isinstance(change, kind)}) for kind in (float, int))
    period = math.lcm(*(len(group.branches) for group in groups if group.kind == "turns"))
    if (count := (len(fractions) + 1) * (len(steps) + 1) * period) > _MOST_TEXTS:
        raise ValueError(f"prompt scheduling gives {count} texts in a run; the limit is {_MOST_TEXTS}")
    return [
        Span(start, end, first, last, phase, period)
        for start, end in pairwise([0.0, *fractions, math.inf])
        for first, last in pairwise([0, *steps, math.inf])
        for phase in range(period)
    ]


def _pieces(items: _Items, span: Span, weight: float = 1.0) -> Iterator[Piece]:
    for item in items:
        if item == "BREAK":
            yield Piece(None)
        elif isinstance(item, str):
            if item:
                yield Piece(item[1:] if len(item) == 2 and item[0] == "\\" else item, weight)
        elif item.kind == "turns":
            yield from _pieces(item.branches[span.phase % len(item.branches)], span, weight)
        elif item.kind == "edit":
            start = span.start if isinstance(item.number, float) else span.first
            yield from _pieces(item.branches[start >= item.number], span, weight)
        else:
            yield from _pieces(item.branches[0], span, weight * item.number)


def _joined(pieces: Iterator[Piece]) -> tuple[Piece, ...]:
    """Join neighbours of equal weight, and drop blank pieces beside others."""
    result: list[Piece] = []
    for (is_break, weight), run in groupby(pieces, lambda piece: (piece.text is None, piece.weight)):
        texts = [piece.text for piece in run]
        result += [Piece(None)] * len(texts) if is_break else [Piece("".join(texts), weight)]
    return tuple(p for p in result if p.text is None or p.text.strip() or len(result) == 1) or (Piece(""),)
