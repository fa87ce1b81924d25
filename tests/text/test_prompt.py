"""The prompt language: weights, alternatives, blocks, and text that only looks like them."""

import random
import time
from contextlib import suppress

import pytest

from stable_diffusion.text.prompt import Part, Piece, expand, parts

BREAK = (None, 1.0)
TEXTS = {
    "a red cat": [("a red cat", 1)],
    "": [("", 1)],
    "a (cat:1.3) b": [("a ", 1), ("cat", 1.3), (" b", 1)],
    "a (cat):1.3 b": [("a ", 1), ("cat", 1.3), (" b", 1)],
    "a (cat): b": [("a ", 1), ("cat", 1.1), (": b", 1)],
    "a (cat):1.5x": [("a ", 1), ("cat", 1.1), (":1.5x", 1)],
    "((cat))": [("cat", 1.1 * 1.1)],
    "(a [b] (c:2) d:0.5)": [("a ", 0.5), ("b", 0.5 / 1.1), ("c", 1.0), (" d", 0.5)],
    "(cat:0) (dog:-1.5)": [("cat", 0), ("dog", -1.5)],
    "(cat:1)s": [("cats", 1)],
    r"a \(cat\) \[b\] \{c\} \\": [("a (cat) [b] {c} \\", 1)],
    r"(smile \:\):1.2)": [("smile :)", 1.2)],
    "((cat": [("((cat", 1)],
    "([cat)]": [("[cat", 1.1), ("]", 1)],
    "(a BREAK b:2)": [("a ", 2), BREAK, (" b", 2)],
    r"BREAKFAST \BREAK": [("BREAKFAST BREAK", 1)],
    "(cat:1.2.3)": [("cat:1.2.3", 1.1)],
    "(cat:0.00001)": [("cat", 1e-5)],
    "(cat:1234567890123)": [("cat:1234567890123", 1.1)],
    r"a __colour__ \__colour__": [("a __colour__ __colour__", 1)],
}


def pieces(text: str) -> list[Piece]:
    (part,) = parts(text)
    return list(part.pieces)


def part(text: str, weight: float = 1.0, start: float = 0.0, end: float = 1.0) -> Part:
    return Part((Piece(text),), weight, start, end)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces(text):
    result = pieces(text)
    assert [p.text for p in result] == [t for t, _ in TEXTS[text]]
    assert [p.weight for p in result] == pytest.approx([w for _, w in TEXTS[text]])
    assert expand(text) == [text]


def test_alternatives_give_every_prompt_in_order():
    assert expand("a {red|blue} {cat|dog}") == ["a red cat", "a red dog", "a blue cat", "a blue dog"]
    assert expand("[cat | dog] x") == ["cat  x", " dog x"]
    assert expand("a {red|{light|dark} blue} cat") == ["a red cat", "a light blue cat", "a dark blue cat"]
    assert expand("({a|b}:1.5)") == ["(a:1.5)", "(b:1.5)"]
    assert expand("{a | b|c} | d") == [r"a  \| d", r" b \| d", r"c \| d"] and pieces(r"a  \| d") == [Piece("a  | d")]


@pytest.mark.parametrize("seed", [None, 0])
def test_text_without_alternatives_comes_back_as_it_was_typed(seed):
    for text in ("", " plain ", "a cat | a dog: (x):1.30 [y] [a:b:.50]", r"\{ { (] AND BREAK \\", "__colour__ )"):
        assert expand(text, seed) == [text]
        assert expand(text.replace("__", ""), seed, lists) == [text.replace("__", "")]


@pytest.mark.parametrize("text", ["(a:0.00001)", "(a:123456789012.5)", "[a:b:0.0000001]", "(a:-0.00000000000000001)"])
def test_numbers_are_written_as_they_are_read(text):
    (written,) = expand("{" + text + "}")
    assert "e" not in written and parts(written) == parts(text)


LISTS = {
    "colour": ["red", "{light|dark} blue"],
    "animal": ["cat", "(dog:1.5)", "__colour__ bird"],
    "odd/one": ["a | b: c)"],
    "odd/two": ["(q", "[s:t:0.5]", r"\__animal__"],
    "two": ["__one-way__ x"],
    "one-way": ["__two__"],
    "self": ["__self__"],
    "nested": ["__absent__"],
    "none": [],
}


def lists(name: str) -> list[str]:
    if name not in LISTS:
        raise ValueError(f"there is no {name}")
    return LISTS[name]


def wild(text: str, seed: int | None = None) -> list[str]:
    return expand(text, seed, lists)


def test_a_wildcard_stands_for_the_lines_of_its_list():
    colours = ["red", "light blue", "dark blue"]
    animals = ["cat", "(dog:1.5)", *(f"{colour} bird" for colour in colours)]
    assert wild("__animal__") == animals
    assert wild("__colour__ __animal__") == [f"{colour} {animal}" for colour in colours for animal in animals]
    assert wild("(__colour__:0.5)") == [f"({colour}:0.5)" for colour in colours]
    assert wild("(a):0.5__colour__")[0] == "(a:0.5)red"
    assert wild("{a|__colour__}") == ["a", *colours]
    assert wild("[__colour__:x:0.5]")[0] == "[red:x:0.5]"
    assert wild("__colour____colour__")[0] == "redred" and wild("_a__colour___")[0] == "_ared_"
    assert wild("(__odd/one__:0.5)") == [r"(a \| b\: c\):0.5)"]
    assert wild("__odd/one__") == [r"a \| b: c\)"] and pieces(r"a \| b: c\)") == [Piece("a | b: c)")]


def test_what_only_looks_like_a_wildcard_is_text():
    for text in ("__ colour__", "____", "_colour_", "__col our__", "__colour_", "___", "__(colour)__", r"\__colour__"):
        assert wild(text) == expand(text)
    assert expand("a __colour__ {x|y}") == ["a __colour__ x", "a __colour__ y"]  # without lists


def test_a_seed_chooses_every_prompt_and_repeats_its_choice():
    text = "a __colour__ __animal__ or {a|b}"
    assert {wild(text, seed)[0] for seed in range(500)} == set(wild(text))
    for seed in range(20):
        (chosen,) = wild("__colour__ {a|b}", seed)
        # A list chooses as its lines do where they are written out.
        assert [chosen] == wild("__colour__ {a|b}", seed) == expand("{red|{light|dark} blue} {a|b}", seed)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a __two__", r"__two__ leads back to itself \(two -> one-way -> two\)"),
        ("__self__", r"__self__ leads back to itself \(self -> self\)"),
        ("__absent__", r"^there is no absent$"),
        ("__nested__", r"^there is no absent; __nested__ asks for it$"),
        ("__none__", "__none__ has no lines"),
    ],
)
def test_wildcards_that_cannot_be_read_are_named(text, message):
    for seed in (None, 0):
        with pytest.raises(ValueError, match=message):
            wild(text, seed)


@pytest.mark.parametrize("seed", [None, 0])
def test_wildcards_within_wildcards_have_limits(seed):
    def chain(line: str, last: str, length: int):
        return lambda name: [line.format(int(name) + 1)] if int(name) < length else [last]

    assert expand("__0__", seed, chain("__{}__", "end", 63)) == ["end"]
    deep, repeated = {"deep": ["(" * 10 + "x" + ")" * 10]}, "__{0}__ __{0}__"
    for text, read, message in (
        ("__0__", chain("__{}__", "end", 64), "brackets at __64__ nested more than 64 deep"),
        # also where it was read nearer to the surface
        ("__0__ " + "(" * 10 + "__0__" + ")" * 10, chain("__{}__", "end", 60), "nested more than 64 deep"),
        ("__deep__ __0__", lambda n: deep.get(n) or chain("__{}__", "__deep__", 60)(n), "nested more than 64 deep"),
        ("__0__", chain(repeated, "end", 62), "__47__ grows beyond 100000 characters"),
        ("__0__", chain(repeated, "{|}", 60), "__45__ grows beyond 100000 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(text, seed, read)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("__b__", 10_001),
        ("__b__ __c____b__", 10_003_000_300_010),
        ("{a|b|c|d|e|f|g|h|i|j}" * 12, 10**12),
        ("{a|b}" * 1000, 10**15),  # more are not told apart
    ],
)
def test_too_many_prompts_are_refused(text, count):
    table = {"a": [str(i) for i in range(100)], "b": ["__a__ __a__", "x"], "c": ["__b__"] * 10}.__getitem__
    with pytest.raises(ValueError, match=f"stand for {count} prompts; at most 10000"):
        expand(text, None, table)
    assert len(expand("__a__ __a__", None, table)) == 10_000 and len(expand(text, 0, table)) == 1


def test_what_parts_do_not_read():
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        parts("(" * 65 + "a" + ")" * 65)
    assert pieces("(" * 64 + "a" + ")" * 64) == [Piece("a", pytest.approx(1.1**64))]
    with pytest.raises(ValueError, match="expand it"):
        parts("a {b|c}")
    with pytest.raises(ValueError, match="emphasis 'loud' is unknown; choose one of mean, values, none"):
        parts("a", "loud")


def test_parts_that_guide_together():
    assert parts("a cat") == [part("a cat")]
    heavy = Part((Piece(" a "), Piece("dog", 2.0)), 0.5)
    assert parts("a cat AND a (dog:2) :0.5 AND x:-1") == [part("a cat "), heavy, part(" x", -1.0)]
    assert parts("a cat:5") == [part("a cat:5")]
    assert parts(r"SAND ANDY \AND (a AND b)") == [Part((Piece("SAND ANDY AND "), Piece("a AND b", 1.1)))]
    assert pieces(r"\AND") == [Piece("AND")]


def test_parts_that_change_on_the_way():
    assert parts("a [red:blue:0.4] cat") == [part("a red cat", 1, 0, 0.4), part("a blue cat", 1, 0.4, 1)]
    assert parts("[cat:.3]") == [part("", 1, 0, 0.3), part("cat", 1, 0.3, 1)]
    assert parts("[cat::0.3]") == [part("cat", 1, 0, 0.3), part("", 1, 0.3, 1)]
    assert parts("[[a:b:0.2]:c:0.6]") == [part("a", 1, 0, 0.2), part("b", 1, 0.2, 0.6), part("c", 1, 0.6, 1)]
    assert parts("[a:b:0]") == [part("b")] and parts("[a:b:1]") == [part("a")]
    assert parts("[a:b:0.5] AND c") == [part("a ", 1, 0, 0.5), part("b ", 1, 0.5, 1), part(" c")]
    changes = [Part((Piece("a", 2), Piece(" c")), 1, 0, 0.5), Part((Piece("b", 3), Piece(" c")), 1, 0.5, 1)]
    assert parts("[(a:2):(b:3):0.5] c") == changes
    for text in ("[a:b]", "[a:b:2]", "[a:b:c:0.5]", "[a:b:x]"):
        assert pieces(text)[0].weight == pytest.approx(1 / 1.1)


def test_blocks_have_shares_of_the_sum_of_weights():
    shares = {"picture of": 1, "small": 0.5, "cat sitting on": 1, "big": 2.5, "dog": 1}
    blocks = parts("picture of:1 small:0.5 cat sitting on:1 big:2.5 dog", weight_blocks=True)
    assert blocks == [part(text, share / 6) for text, share in shares.items()]
    for text, words in (("(open) at 10:30am", "(open) at 10:30am"), ("", ""), ("cat:-.5", "cat")):
        assert parts(text, weight_blocks=True) == [part(words)]
    with pytest.raises(ValueError, match="weights of the blocks sum to 0"):
        parts("red:1 cat:-1", weight_blocks=True)


def test_random_text_is_read_or_refused_and_written_stably():
    """The documented error or none, and what is written reads back as the same pieces."""
    letters = [*"()[]{}|:\\ aB1.5-é\n猫😀_", "BREAK", " AND ", "((", "))", ":1.2)", "\\(", "0000", "99999"]
    letters += ["__", "__animal__", "__odd/two__", "\\_"]
    generator, refused = random.Random(0), 0
    for number in range(3_000):
        text = "".join(generator.choice(letters) for _ in range(generator.choice([3, 10, 10, 40, 40, 200])))
        wildcards = lists if number % 2 else None
        with suppress(ValueError):  # of weights that sum to 0
            parts(text, weight_blocks=True)
        try:
            prompts = expand(text, wildcards=wildcards)
        except ValueError as error:
            assert any(known in str(error) for known in ("nested more than", "at most 10000", "there is no"))
            refused += 1
            continue
        for prompt in {prompts[0], prompts[-1], *expand(text, 1, wildcards)}:
            assert expand(prompt) == [prompt]
            (written,) = expand("{}" + prompt)
            assert parts(written) == parts(prompt)
    assert refused < 600


LONG = ["(" * 200_000, "(a)" * 50_000, "([" * 60 + "x" * 100_000, "{[" * 50_000 + ")" * 100_000]
LONG += ["[a:" + "1" * 100_000 + "x]", "__a" * 50_000, "_" * 200_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:9])
def test_long_text_takes_linear_time(text):
    start = time.monotonic()
    parts(expand(text, None, lambda name: [name])[0])
    parts(text, weight_blocks=True)
    assert time.monotonic() - start < 20
