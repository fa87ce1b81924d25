r"""Expand the alternatives and wildcards of a prompt: one text -> a list of prompts.

    {red|blue}  {0.7::red|blue}    one of them; random choices use the weights (1)
    {2$$a|b|c}  {1-2$$ and $$a|b}  two of them, or one to two, in each order; joined by a comma, or by the given text
    __name__  __artists/*__        a wildcard: one line of a list, or of several lists
    # words                        a comment: at the beginning of a line, or between spaces
    \{  \|  \_  \#                 the character itself

This is the language of dynamicprompts (github.com/adieyal/dynamicprompts) without variables and wrappers. All other
text is unchanged, for ``prompt`` to read. Signs of the language that have no effect are logged.
"""

import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from itertools import pairwise, permutations, product
from operator import itemgetter
from typing import NamedTuple

_log = logging.getLogger(__name__)

_DEEPEST = 64  # nested braces and wildcards
_MOST_PROMPTS = 10_000
_COUNTED = 10**15  # prompts; larger numbers are not distinguished
_LONGEST = 100_000  # characters of expanded alternatives
_PARTNERS = {"]": "[", "}": "{"}
COMMENT = re.compile(r"(?:^[^\S\n]*#|(?<!\s)\s+#(?=[\s#]|$)).*", re.MULTILINE)
_TOKEN = re.compile(
    r"(?P<brace>\$\{(?=\s*[A-Za-z_-][\w-]*\s*[?=:}])|%\{(?=[^{}|]*\$\$)|\{)"
    r"(?:\s*(?P<method>[~!@]))?(?:\s*(?P<bounds>\d{1,6}-\d{0,6}|-?\d{1,6})\s*\$\$(?:(?P<separator>[^${}]*)\$\$)?)?"
    r"|__(?P<draw>[~!@])?(?![_\s])(?P<name>(?:(?!__|\\_)[^(){}|$#<>\n])+)(?P<variables>\([^()\n]*\))?(?<!\s)__"
    r"|\\.|<(?:lora|lyco|hypernet):(?!__)[^<>{}]*>|\$\$|[^][{}|\\_$%#<]+|.",
    re.DOTALL,
)
_WEIGHT = re.compile(r"\s*(\d{1,12}(?:\.\d{0,17})?|\.\d{1,17})\s*::")
_NO_EFFECT = {
    "${": "variables, as ${name=text}, are not supported and stay plain text",
    **dict.fromkeys(("%{", "$$"), "$$ is plain text unless it follows { and a number; so are wrappers, %{a$$b}"),
    "__": "wildcards, as __name__, are plain text without a wildcard folder",
    "#": r"# begins a comment only between spaces, here it is plain text; write \# to say so",
    **dict.fromkeys("~!@", "the prefixes ~, ! and @ of alternatives and wildcards have no effect"),
}


def expand(
    text: str, seeds: Sequence[int] | None = None, wildcards: Callable[[str], Sequence[str]] | None = None
) -> list[str]:
    """Return every prompt that the alternatives of a text give, in order; with ``seeds``, a random one for each seed.

    Args:
        wildcards: a function from a wildcard's name or pattern to its lines, at least one, each in this language.
            Without it ``__name__`` is plain text.

    Raises ValueError for braces and wildcards nested more than 64 deep, and wildcards that lead back to themselves. The
    limits are 10,000 prompts and 100,000 characters of alternatives. Errors of ``wildcards`` are passed on.
    """
    items = _Reader(wildcards).read(text)
    if seeds is not None:
        return [_draw(items, random.Random(seed)) for seed in seeds]
    count = _measure(items).prompts
    if count > _MOST_PROMPTS:
        raise ValueError(f"the alternatives give {count} prompts; the limit is {_MOST_PROMPTS}")
    prompts = list(dict.fromkeys(_write(items)))
    if not prompts:
        raise ValueError("the alternatives to combine are all the same; give others, or combine fewer")
    return prompts


class _Size(NamedTuple):
    """Hold the number of prompts of a list of items, the length of the longest, and the depth of choices."""

    prompts: int
    length: int
    depth: int


@dataclass(frozen=True)
class _Choice:
    """Hold options, of which ``lowest`` to ``highest`` are chosen, in any order."""

    options: Sequence["_Items"]
    weights: Sequence[float]
    lowest: int = 1
    highest: int = 1
    separator: str = ","

    @cached_property
    def size(self) -> _Size:
        """Measure the choice; the result is cached, since wildcards are shared."""
        prompts, lengths, depths = zip(*map(_measure, self.options), strict=True)
        length = sum(nlargest(self.highest, lengths)) + self.highest * len(self.separator)
        return _Size(min(self._count(prompts), _COUNTED), length, 1 + max(depths))

    def _count(self, prompts: Sequence[int]) -> int:
        if self.highest >= 8:  # 8! orders exceed the limit
            return _COUNTED
        sets = [1, *[0] * self.highest]  # by the number of options in them
        for number in prompts:
            for taken in range(self.highest, 0, -1):
                sets[taken] += number * sets[taken - 1]
        return sum(sets[taken] * math.factorial(taken) for taken in range(self.lowest, self.highest + 1))

    def write(self) -> Iterator[str]:
        """Yield the texts of all options, or of all orders of different ones."""
        for count in range(self.lowest, self.highest + 1):
            for options in permutations(self.options, count):
                yield from (self._join(texts) for texts in product(*map(_write, options)) if len({*texts}) == count)

    def draw(self, generator: random.Random) -> str:
        """Return the text of options drawn at random, by weight."""
        if self.highest == 1 and len({*self.weights}) == 1:
            return self._join([_draw(generator.choice(self.options), generator) for _ in range(self.lowest)])
        # The order of exponential variates draws by weight: Efraimidis and Spirakis 2006.
        keys = [generator.expovariate(weight) if weight else math.inf for weight in self.weights]
        count, texts = generator.randint(self.lowest, self.highest), []
        for _, option in sorted(zip(keys, self.options, strict=True), key=itemgetter(0)):
            if len(texts) < count and (text := _draw(option, generator)) not in texts:
                texts.append(text)
        return self._join(texts)

    def _join(self, texts: Sequence[str]) -> str:
        if len(texts) == 1:
            return texts[0]
        return self.separator.join(texts).removeprefix(self.separator).removesuffix(self.separator)


_Items = list[str | _Choice]


def _measure(items: _Items) -> _Size:
    prompts, length, depth = 1, 0, 0
    for item in items:
        size = _Size(1, len(item), 0) if isinstance(item, str) else item.size
        prompts, depth = min(prompts * size.prompts, _COUNTED), max(depth, size.depth)
        length += size.length + isinstance(item, _Choice)
    return _Size(prompts, length, depth)


def _write(items: _Items) -> Iterator[str]:
    """Yield all texts of the items, the last choice changing fastest."""
    return map("".join, product(*([item] if isinstance(item, str) else item.write() for item in items)))


def _draw(items: _Items, generator: random.Random) -> str:
    return "".join(item if isinstance(item, str) else item.draw(generator) for item in items)


# --- reading ---------------------------------------------------------------------------------------------------------

_Place = tuple[int, re.Match]  # of a sign among the items


class _Reader:
    """Read prompts, and each wildcard once."""

    def __init__(self, lines: Callable[[str], Sequence[str]] | None):
        self.lines = lines
        self.known: dict[str, _Choice] = {}
        self.open: list[str] = []  # the wildcards being read

    def read(self, text: str) -> _Items:
        text = COMMENT.sub("", text)
        items: _Items = []
        opened: dict[str, list[_Place]] = {"{": [], "[": []}
        bars: list[_Place] = []
        for token in _TOKEN.finditer(text):
            place, opening = (len(items), token), _PARTNERS.get(token[0])
            if opening and opened[opening]:
                start = opened[opening].pop()
                edges = [start, *_pop_after(start, bars), place]
                for places in opened.values():  # brackets opened inside have no partner and are text
                    _pop_after(start, places)
                if opening == "{":
                    options = [items[left + 1 : right] for (left, _), (right, _) in pairwise(edges)]
                    items[start[0] :] = [self._group(start[1], text[start[1].start() : token.end()], options)]
                    continue
            elif token["name"]:
                items.append(self._wildcard(token))
                continue
            elif token["brace"] or token[0] == "[":
                opened["{" if token["brace"] else "["].append(place)
            elif token[0] == "|":
                bars.append(place)
            elif token[0] in ("#", "$$"):
                _remark(token[0])
            items.append(token[0])
        return items

    def _group(self, opening: re.Match, text: str, options: list[_Items]) -> str | _Choice:
        """Read "{a|b}"; "${a=b}" stays text."""
        if opening["brace"] in _NO_EFFECT:
            _remark(opening["brace"])
            return text
        _remark(opening["method"])
        if opening["bounds"] is None:
            return self._check(_Choice(*_weigh(options)))
        inside = _TOKEN.fullmatch(text[len(opening[0]) : -1])
        if inside and inside["name"] and isinstance(options[0][0], _Choice):  # several lines of a list
            options, weights = options[0][0].options, options[0][0].weights
        else:
            options, weights = _weigh(options, strip=True)
        low, is_range, high = opening["bounds"].partition("-")
        bounds = int(low or 1), int(high or len(options)) if is_range else int(low)
        bounds = sorted(min(bound, len(options)) for bound in bounds)
        separator = "," if opening["separator"] is None else opening["separator"]
        return self._check(_Choice(options, weights, *bounds, separator))

    def _wildcard(self, token: re.Match) -> str | _Choice:
        unread = "__" if self.lines is None else "${" if token["variables"] else None
        _remark(unread or token["draw"])
        if unread:
            return token[0]
        name = token["name"]
        if name in self.open:
            circle = " -> ".join([*self.open[self.open.index(name) :], name])
            raise ValueError(f"the wildcard __{name}__ leads back to itself ({circle}); remove it from one of these")
        if name not in self.known:
            try:
                lines = self.lines(name)
            except ValueError as error:
                raise ValueError(f"{error}; __{self.open[-1]}__ refers to it" if self.open else str(error)) from error
            if not lines:
                raise ValueError(f"the wildcard __{name}__ has no lines; give it at least one")
            self.open.append(name)
            self._check_depth(0)
            options = [self.read(line) for line in lines]
            self.open.pop()
            self.known[name] = self._check(_Choice(options, [1.0] * len(options)), f" of __{name}__")
        return self.known[name]

    def _check(self, choice: _Choice, place: str = "") -> _Choice:
        if choice.size.length > _LONGEST:
            raise ValueError(f"the alternatives{place} exceed {_LONGEST} characters; nest fewer of them")
        self._check_depth(choice.size.depth)
        return choice

    def _check_depth(self, depth: int) -> None:
        """Raise ValueError if ``depth`` choices inside the open wildcards are nested too deep."""
        if len(self.open) + depth > _DEEPEST:
            place = f" at __{self.open[-1]}__" if self.open else ""
            text = f"the prompt has braces{place} nested more than {_DEEPEST} deep; write some of them as "
            raise ValueError(text + r"\{ and \}")


def _pop_after(start: _Place, places: list[_Place]) -> list[_Place]:
    after = []
    while places and places[-1][0] > start[0]:
        after.append(places.pop())
    return after[::-1]


def _weigh(options: list[_Items], strip: bool = False) -> tuple[list[_Items], list[float]]:
    """Split the weights from the options: "0.7::red" -> "red", 0.7."""
    result, weights = [], []
    for first, *rest in (option or [""] for option in options):
        weight = _WEIGHT.match(first) if isinstance(first, str) else None
        weights.append(float(weight[1]) if weight else 1.0)
        if isinstance(first, str):
            first = first[weight.end() :] if weight else first
            first = first.lstrip() if strip else first
        result.append([first, *rest])
    return result, weights


def _remark(sign: str | None) -> None:
    if sign:
        _log.warning("%s", _NO_EFFECT[sign])
