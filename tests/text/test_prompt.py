"""The prompt language: weights, changes, blocks, and text that only looks like them."""

import random
import time
from contextlib import suppress

import pytest

from stable_diffusion.text.prompt import Part, Piece, parts

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


def test_what_parts_do_not_read():
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        parts("(" * 65 + "a" + ")" * 65)
    assert pieces("(" * 64 + "a" + ")" * 64) == [Piece("a", pytest.approx(1.1**64))]
    assert pieces("a {b|(c:2)}") == [Piece("a {b|"), Piece("c", 2.0), Piece("}")]  # alternatives are expanded before
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


def test_random_text_is_read_or_refused():
    letters = [*"()[]{}|:\\ aB1.5-é\n猫😀_", "BREAK", " AND ", "((", "))", ":1.2)", "\\(", "0000", "99999", "[a:b:0.5]"]
    generator = random.Random(0)
    for _ in range(3_000):
        text = "".join(generator.choice(letters) for _ in range(generator.choice([3, 10, 10, 40, 40, 200])))
        with suppress(ValueError):  # of weights that sum to 0
            parts(text, weight_blocks=True)
        result = parts(text)
        assert result[0].start == 0 and result[-1].end == 1 and all(part.pieces for part in result)


LONG = ["(" * 200_000, "(a)" * 50_000, "([" * 60 + "x" * 100_000, "{[" * 50_000 + ")" * 100_000]
LONG += ["[a:" + "1" * 100_000 + "x]", "__a" * 50_000, "_" * 200_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:9])
def test_long_text_takes_linear_time(text):
    start = time.monotonic()
    parts(text)
    parts(text, weight_blocks=True)
    assert time.monotonic() - start < 20
