r"""Read the prompt language: one prompt -> its parts, and pieces of text with weights.

    (words:1.3)  (words):1.3    weight 1.3; zero and negative weights are allowed
    (words)  ((words))          weight 1.1, 1.1 * 1.1
    [words]                     weight 1 / 1.1
    [from:to:0.4]               "from" for the first 0.4 of the steps, then "to"; [to:0.4], [from::0.4]: either is empty
    a AND b :0.7                two prompts that guide together, the second with weight 0.7
    BREAK                       what follows starts a new chunk of 75 tokens
    \(  \[  \{  \|  \:  \_  \\  the character itself

Alternatives, {a|b}, and wildcards are written out by ``alternatives``; here their signs are text.
A bracket without its partner, and a colon that no number follows, are text: "a sign saying: open :)" is one piece.
Weights multiply where brackets are nested.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Literal

EMPHASES = ("mean", "values", "none")

_EMPHASIS = 1.1
_DEEPEST = 64  # brackets within each other
_PARTNERS = {")": "(", "]": "["}
_DIGITS = r"(?:\d{1,12}(?:\.\d{0,17})?|\.\d{1,17})"  # longer numbers are text
_NUMBER = rf"[+-]?{_DIGITS}"
_WEIGHT_AT_END = re.compile(rf":\s*({_NUMBER})\s*")
_WEIGHT_AFTER = re.compile(rf":({_NUMBER})(?![\w.])")
_SHARE = re.compile(rf"\s*({_DIGITS})\s*")
_KEYWORD = re.compile(r"(?<!\w)(AND|BREAK)(?!\w)")
_MEANING = re.compile(r"[()\[\]\\]|AND|BREAK")  # text without any of these is one piece
_TOKEN = re.compile(r"\\.|[()\[\]|:]|[^()\[\]|:\\]+|\\", re.DOTALL)
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


def parts(text: str, emphasis: str = "mean", weight_blocks: bool = False) -> list[Part]:
    """Read a prompt: a part for each AND and for each stretch between two changes.

    Args:
        emphasis: one of ``EMPHASES``; "none" reads all signs of the language as text.
        weight_blocks: read "picture of:1 small:0.5 cat" instead: a part for each text up to a colon and a number before
            a blank, weighted by its share of the numbers' sum. Text behind the last number weighs 1.

    Raises ValueError for an unknown emphasis, for brackets nested more than 64 deep, and for blocks whose weights sum
    to zero.
    """
    if emphasis not in EMPHASES:
        raise ValueError(f"emphasis {emphasis!r} is unknown; choose one of {', '.join(EMPHASES)}")
    if weight_blocks:
        return _blocks(text)
    if emphasis == "none" or not _MEANING.search(text):
        return [Part((Piece(text),))]
    result, prompts = [], _split(_read(text), "AND")
    for items in prompts:
        ending = "".join(item for item in items[-2:] if isinstance(item, str))
        weight = _WEIGHT_AT_END.fullmatch(ending) if len(prompts) > 1 else None  # a lone prompt has none
        items = items[:-2] if weight else items
        shares = {group.number for group in _groups(items) if group.kind == "edit" and 0 < group.number < 1}
        for start, end in pairwise([0.0, *sorted(shares), 1.0]):
            result.append(Part(_joined(_pieces(items, start)), float(weight[1]) if weight else 1.0, start, end))
    return result


def _blocks(text: str) -> list[Part]:
    blocks, end = [], 0
    for match in _END_OF_BLOCK.finditer(text):
        blocks.append((text[end : match.start()].strip(), float(match[1])))
        end = match.end()
    rest = text[end:].strip()
    if rest or not blocks:
        blocks.append((rest, 1.0))
    total = sum(weight for _, weight in blocks)
    if abs(total) < 1e-6:
        raise ValueError(f"the weights of the blocks sum to {total:g}; their mean needs another sum")
    return [Part((Piece(block),), weight / total) for block, weight in blocks]


# --- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Hold what stands in brackets.

    A "weight" has one branch and the weight as its number. An "edit" has what is read before and after a share of the
    run, its number. The number is None until the weight behind "(words)" is read.
    """

    kind: Literal["weight", "edit"]
    branches: Sequence["_Items"]
    number: float | None

    @cached_property
    def depth(self) -> int:
        """Count the brackets within each other."""
        depths = (item.depth for branch in self.branches for item in branch if isinstance(item, _Group))
        return 1 + max(depths, default=0)


_Items = list[str | _Group]


def _read(text: str) -> _Items:
    """Read a text as its signs and words, and groups."""
    items: _Items = []
    opened: dict[str, list[int]] = {bracket: [] for bracket in _PARTNERS.values()}  # their places in the items
    for token in _TOKEN.findall(text):
        partner = _PARTNERS.get(token)
        if token in opened:
            opened[token].append(len(items))
            items.append(token)
        elif partner and opened[partner]:
            start = opened[partner].pop()
            for places in opened.values():  # what was opened within has no partner and is text
                while places and places[-1] > start:
                    places.pop()
            items[start:] = [_group(partner, items[start + 1 :])]
        else:
            items += _KEYWORD.split(token)
    return _weigh(items)


def _group(bracket: str, items: _Items) -> _Group:
    """Read "(words:1.3)", "(words)", "[from:to:0.4]", "[to:0.4]" or "[words]"."""
    *before, last = _split(items, ":")
    ending = "".join(last) if all(isinstance(item, str) for item in last) else ""
    kind, branches, number = "weight", [items], None if bracket == "(" else 1 / _EMPHASIS
    if bracket == "(":
        if before and (weight := _WEIGHT_AT_END.fullmatch(f":{ending}")):
            branches, number = [items[: -len(last) - 1]], float(weight[1])
    elif len(before) in (1, 2) and (share := _SHARE.fullmatch(ending)) and float(share[1]) <= 1:
        kind, branches, number = "edit", [[], *before][-2:], float(share[1])
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
    """Give each "(words)" its weight: the number behind it, as in "(words):1.3", or 1.1."""
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
    """Yield all groups, also those within others."""
    for item in items:
        if isinstance(item, _Group):
            yield item
            for branch in item.branches:
                yield from _groups(branch)


def _pieces(items: _Items, share: float, weight: float = 1.0) -> Iterator[Piece]:
    """Yield the pieces of the items as they read at a share of the run."""
    for item in items:
        if item == "BREAK":
            yield Piece(None)
        elif isinstance(item, str):
            if item:
                yield Piece(item[1:] if len(item) == 2 and item[0] == "\\" else item, weight)
        elif item.kind == "edit":
            yield from _pieces(item.branches[share >= item.number], share, weight)
        else:
            yield from _pieces(item.branches[0], share, weight * item.number)


def _joined(pieces: Iterator[Piece]) -> tuple[Piece, ...]:
    """Join neighbours of one weight, and drop pieces of blanks beside others."""
    result: list[Piece] = []
    for (is_break, weight), run in groupby(pieces, lambda piece: (piece.text is None, piece.weight)):
        texts = [piece.text for piece in run]
        result += [Piece(None)] * len(texts) if is_break else [Piece("".join(texts), weight)]
    return tuple(p for p in result if p.text is None or p.text.strip() or len(result) == 1) or (Piece(""),)
