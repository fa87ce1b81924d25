r"""The prompt language: what is written -> pieces of text with weights. Knows no tokens and no arrays.

    (words:1.3)  (words):1.3    weight 1.3; zero and negative weights are allowed
    (words)  ((words))          weight 1.1, 1.1 * 1.1
    [words]                     weight 1 / 1.1
    {a|b}  [a|b]                alternatives: one prompt for each
    BREAK                       what follows starts a new chunk of 75 tokens
    \(  \[  \{  \|  \:  \\      the character itself

A bracket without its partner, and a colon that no number follows, are text: "a sign saying: open :)" is one plain
piece. Weights multiply where brackets are nested.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

_EMPHASIS = 1.1
_DEEPEST = 64  # brackets within brackets
_MOST_PROMPTS = 10_000
_PAIRS = {")": "(", "]": "[", "}": "{"}
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_WEIGHT_AT_END = re.compile(rf":\s*({_NUMBER})\s*$")
_WEIGHT_AFTER = re.compile(rf":({_NUMBER})(?![\w.])")
_BREAK = re.compile(r"(?<![\w\\])BREAK(?!\w)")
_BLOCK = re.compile(rf"(.*?):({_NUMBER})(?=\s|$)", re.DOTALL)


@dataclass(frozen=True)
class Piece:
    """A run of text with one weight; ``text`` is None for a BREAK."""

    text: str | None
    weight: float = 1.0


@dataclass(frozen=True)
class _Group:
    """Items in brackets: ``weight`` multiplies theirs; with several ``options`` one of them is chosen."""

    weight: float | None
    options: tuple[tuple["str | _Group", ...], ...]


_Items = tuple["str | _Group", ...]


def expand(text: str, seed: int | None = None) -> list[str]:
    """All prompts that the alternatives of a prompt stand for, in order; with a ``seed``, one of them by chance.

    Raises ValueError for brackets nested more than 64 deep and for more than 10,000 prompts.
    """
    items = _parse(text)
    if seed is not None:
        return [_write(_choose(items, random.Random(seed)))]
    if _count(items) > _MOST_PROMPTS:
        raise ValueError(f"the alternatives stand for {_count(items)} prompts; at most {_MOST_PROMPTS} are expanded")
    return [_write(choice) for choice in _all(items)]


def pieces(text: str) -> list[Piece]:
    """The pieces of a prompt without alternatives, in order; neighbours of one weight are one piece.

    Raises ValueError for brackets nested more than 64 deep, or where alternatives are left: :func:`expand` them first.
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
    for match in _BLOCK.finditer(text):
        found.append(Piece(match[1].strip(), float(match[2])))
        end = match.end()
    rest = text[end:].strip()
    return found + [Piece(rest)] * bool(rest or not found)


def _parse(text: str) -> _Items:
    tokens = re.findall(r"\\.|[()\[\]{}|]|[^()\[\]{}|\\]+|\\", text, re.DOTALL)
    return _items(tokens, _partners(tokens), 0, len(tokens))


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


def _items(tokens: Sequence[str], partners: dict[int, int], start: int, stop: int, depth: int = 0) -> _Items:
    if depth > _DEEPEST:
        raise ValueError(f"the prompt has brackets nested more than {_DEEPEST} deep; write some of them as \\( and \\)")
    items: list[str | _Group] = []
    i = start
    while i < stop:
        if i not in partners:
            items.append(tokens[i])
            i += 1
            continue
        close = partners[i]
        group = _group(tokens, partners, i, close, depth)
        i = close + 1
        if group.weight is None and i < stop and (after := _WEIGHT_AFTER.match(tokens[i])):
            group = _Group(float(after[1]), group.options)
            rest = tokens[i][after.end() :]
            items += [group, rest] if rest else [group]
            i += 1
        else:
            items.append(_Group(_EMPHASIS, group.options) if group.weight is None else group)
    return tuple(items)


def _group(tokens: Sequence[str], partners: dict[int, int], start: int, close: int, depth: int) -> _Group:
    """What stands between two brackets. Its weight is None for plain round ones, whose weight may follow them."""
    bars, i = [start], start + 1
    while i < close:
        if i in partners:
            i = partners[i]
        elif tokens[i] == "|" and tokens[start] != "(":
            bars.append(i)
        i += 1
    ends = [*bars[1:], close]
    options = tuple(_items(tokens, partners, a + 1, b, depth + 1) for a, b in zip(bars, ends, strict=True))
    if len(options) > 1 or tokens[start] == "{":
        return _Group(1.0, options)
    if tokens[start] == "[":
        return _Group(1 / _EMPHASIS, options)
    (inner,) = options
    if inner and isinstance(inner[-1], str) and (match := _WEIGHT_AT_END.search(inner[-1])):
        head = inner[-1][: match.start()]
        return _Group(float(match[1]), ((*inner[:-1], head) if head else inner[:-1],))
    return _Group(None, options)


def _unescape(token: str) -> str:
    return token[1:] if len(token) == 2 and token[0] == "\\" else token


def _flatten(items: _Items, weight: float) -> Iterator[Piece]:
    for item in items:
        if isinstance(item, _Group):
            if len(item.options) > 1:
                raise ValueError("the prompt has alternatives; expand them into prompts first")
            yield from _flatten(item.options[0], weight * item.weight)
        elif item.startswith("\\"):
            yield Piece(_unescape(item), weight)
        else:
            for i, part in enumerate(_BREAK.split(item)):
                if i:
                    yield Piece(None)
                if part:
                    yield Piece(part, weight)


def _count(items: _Items) -> int:
    """How many prompts the items stand for."""
    total = 1
    for item in items:
        if isinstance(item, _Group):
            total *= sum(_count(option) for option in item.options)
    return total


def _all(items: _Items) -> Iterator[_Items]:
    """Every choice of alternatives; the last one varies fastest."""
    ways = [
        [_Group(item.weight, (chosen,)) for option in item.options for chosen in _all(option)]
        if isinstance(item, _Group)
        else [item]
        for item in items
    ]
    yield from product(*ways)


def _choose(items: _Items, generator: random.Random) -> _Items:
    return tuple(
        _Group(item.weight, (_choose(generator.choice(item.options), generator),)) if isinstance(item, _Group) else item
        for item in items
    )


def _write(items: _Items) -> str:
    """The items as a prompt that reads back as the same items."""
    parts = []
    for item in items:
        if isinstance(item, str):
            # What stands alone here was no bracket with a partner; next to others it might find one.
            parts.append(f"\\{item}" if item in "()[]{}|\\" else item)
        elif item.weight == 1.0:
            parts.append(_write(item.options[0]))
        else:
            parts.append(f"({_write(item.options[0])}:{item.weight!r})")
    return "".join(parts)
