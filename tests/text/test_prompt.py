"""The prompt language: weights, changes, blocks, and text that only looks like them."""

import random
import time
from contextlib import suppress

import pytest

from stable_diffusion.text.prompt import Part, Piece, Span, parts

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


def part(text: str, weight: float = 1.0, *spans: Span) -> Part:
    return Part((Piece(text),), weight, spans or (Span(),))


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
    early, late = Span(end=0.4), Span(0.4)
    assert parts("a [red:blue:0.4] cat") == [part("a red cat", 1, early), part("a blue cat", 1, late)]
    assert parts("[cat:.4]") == [part("", 1, early), part("cat", 1, late)]
    assert parts("[cat::0.4]") == [part("cat", 1, early), part("", 1, late)]
    middle = Span(0.2, 0.4)
    assert parts("[[a:b:0.2]:c:0.4]") == [part("a", 1, Span(end=0.2)), part("b", 1, middle), part("c", 1, late)]
    assert parts("[a:b:0]") == parts("[a:b:-.5]") == [part("b")]
    assert parts("[a:b:0.4] AND c") == [part("a ", 1, early), part("b ", 1, late), part(" c")]
    changes = [Part((Piece("a", 2), Piece(" c")), 1, (early,)), Part((Piece("b", 3), Piece(" c")), 1, (late,))]
    assert parts("[(a:2):(b:3):0.4] c") == changes
    for text in ("[a:b]", "[a:b:c:0.5]", "[a:b:x]", "[a:b:2x]"):
        assert pieces(text)[0].weight == pytest.approx(1 / 1.1)


def test_numbers_without_a_point_are_steps():
    assert parts("[a:b:1]") == [part("a", 1, Span(last=1)), part("b", 1, Span(first=1))]
    assert parts("[a:b:1.]") == [part("a", 1, Span(end=1.0)), part("b", 1, Span(1.0))]
    both = [Span(0, 1.0, 0, 1), Span(0, 1.0, 1), Span(1.0, last=1), Span(1.0, first=1)]
    texts = ["ac", "bc", "ad", "bd"]
    assert parts("[a:b:1][c:d:1.0]") == [part(text, 1, span) for text, span in zip(texts, both, strict=True)]


def test_texts_that_take_turns():
    first, second = Span(period=2), Span(phase=1, period=2)
    assert parts("a [red|blue] cat") == [part("a red cat", 1, first), part("a blue cat", 1, second)]
    weighted = Part((Piece("b", 1.3),), 1, (second,))
    assert parts("[a|(b:1.3)]") == [part("a", 1, first), weighted]
    assert parts("[a|b] AND c")[:2] == [part("a ", 1, first), part("b ", 1, second)]
    assert parts("[a BREAK b|c]")[0].pieces == (Piece("a "), Piece(None), Piece(" b"))
    assert parts("[a|b|a]") == [
        part("a", 1, Span(period=3), Span(phase=2, period=3)),
        part("b", 1, Span(phase=1, period=3)),
    ]
    assert pieces(r"(a|b) | [a\|b]")[0].text == "a|b"
    turns = "[a|b|c|d|e|f|g] [a|b|c|d|e|f|g|h|i] [a|b|c|d|e|f|g|h]"
    with pytest.raises(ValueError, match="prompt scheduling gives 504 texts in a run; the limit is 500"):
        parts(turns)
    assert len(parts(turns.replace("|f|g|h]", "]").replace("|h|i]", "]"))) == 35


def test_a_second_pass_counts_on():
    """Steps of the first pass, and fractions up to 1, are over; turns begin again."""
    spans = {"[a:b:25]": "aaaaabbbbb", "[a:b:20]": "b" * 10, "[a:b:5]": "b" * 10, "[a:b:0.5]": "b" * 10}
    spans |= {"[a:b:1.5]": "aaaaabbbbb", "[a:b:1.0]": "b" * 10, "[a:b:2.0]": "a" * 10, "[a|b]": "ab" * 5, "a": "a" * 10}
    for text, wanted in spans.items():
        later = [(p.pieces[0].text, [span.after(20) for span in p.spans]) for p in parts(text)]
        read = [t for step in range(10) for t, spans in later if any(span.holds(step, 10) for span in spans)]
        assert "".join(read) == wanted


def test_blocks_have_shares_of_the_sum_of_weights():
    shares = {"picture of": 1, "small": 0.5, "cat sitting on": 1, "big": 2.5, "dog": 1}
    blocks = parts("picture of:1 small:0.5 cat sitting on:1 big:2.5 dog", weight_blocks=True)
    assert blocks == [part(text, share / 6) for text, share in shares.items()]
    for text, words in (("(open) at 10:30am", "(open) at 10:30am"), ("", ""), ("cat:-.5", "cat")):
        assert parts(text, weight_blocks=True) == [part(words)]
    with pytest.raises(ValueError, match="weights of the blocks sum to 0"):
        parts("red:1 cat:-1", weight_blocks=True)


def test_random_text_is_read_or_refused():
    letters = [*"()[]{}|:\\ aB1.5-é\n猫😀_", "BREAK", " AND ", "((", "))", ":1.2)", "\\(", "0000", "99999"]
    letters += ["[a:b:0.5]", "[a|b]", "[a:2]"]
    generator = random.Random(0)
    for _ in range(1_500):
        text = "".join(generator.choice(letters) for _ in range(generator.choice([3, 10, 10, 40, 40, 200])))
        with suppress(ValueError):  # of weights that sum to 0
            parts(text, weight_blocks=True)
        result = parts(text)
        assert all(part.pieces for part in result)
        read = [sum(any(span.holds(step, 5) for span in part.spans) for part in result) for step in range(5)]
        assert min(read) == max(read) >= 1  # one text for each AND


LONG = ["(" * 50_000, "(a)" * 12_000, "([" * 60 + "x" * 25_000, "{[" * 12_000 + ")" * 25_000]
LONG += ["[a:" + "1" * 25_000 + "x]", "__a" * 12_000, "_" * 50_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:9])
def test_long_text_takes_linear_time(text):
    start = time.process_time()
    parts(text)
    parts(text, weight_blocks=True)
    assert time.process_time() - start < 5
