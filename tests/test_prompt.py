"""The prompt language: weights, alternatives, blocks, and text that only looks like them."""

import random
import time

import pytest

from stable_diffusion.prompt import Part, Piece, blocks, expand, parts, pieces

BREAK = (None, 1.0)
TEXTS = {
    "a red cat": [("a red cat", 1)],
    "": [("", 1)],
    "a (cat:1.3) b": [("a ", 1), ("cat", 1.3), (" b", 1)],
    "a (cat):1.3 b": [("a ", 1), ("cat", 1.3), (" b", 1)],
    "a (cat): b": [("a ", 1), ("cat", 1.1), (": b", 1)],
    "a (cat):1.5x": [("a ", 1), ("cat", 1.1), (":1.5x", 1)],
    "(cat)": [("cat", 1.1)],
    "((cat))": [("cat", 1.1 * 1.1)],
    "[cat]": [("cat", 1 / 1.1)],
    "(a [b] (c:2) d:0.5)": [("a ", 0.5), ("b", 0.5 / 1.1), ("c", 1.0), (" d", 0.5)],
    "(cat:0) (dog:-1.5)": [("cat", 0), ("dog", -1.5)],
    "(cat:1)s": [("cats", 1)],
    "a sign saying: open :)": [("a sign saying: open :)", 1)],
    "cat:1.3, 3:2": [("cat:1.3, 3:2", 1)],
    r"a \(cat\) \[b\] \{c\} \\": [("a (cat) [b] {c} \\", 1)],
    r"(smile \:\):1.2)": [("smile :)", 1.2)],
    "((cat": [("((cat", 1)],
    "cat)]}": [("cat)]}", 1)],
    "([cat)]": [("[cat", 1.1), ("]", 1)],
    "a BREAK b": [("a ", 1), BREAK, (" b", 1)],
    "(a BREAK b:2)": [("a ", 2), BREAK, (" b", 2)],
    "BREAKFAST": [("BREAKFAST", 1)],
    r"\BREAK": [("BREAK", 1)],
    "(cat:abc)": [("cat:abc", 1.1)],
    "(cat:1.2.3)": [("cat:1.2.3", 1.1)],
}


@pytest.mark.parametrize("text", TEXTS)
def test_pieces(text):
    found = pieces(text)
    assert [p.text for p in found] == [t for t, _ in TEXTS[text]]
    assert [p.weight for p in found] == pytest.approx([w for _, w in TEXTS[text]])


def test_alternatives_give_every_prompt_in_order():
    assert expand("a {red|blue} {cat|dog}") == ["a red cat", "a red dog", "a blue cat", "a blue dog"]
    assert expand("[cat | dog] x") == ["cat  x", " dog x"]
    assert expand("a {red|{light|dark} blue} cat") == ["a red cat", "a light blue cat", "a dark blue cat"]
    assert expand("({a|b}:1.5)") == ["(a:1.5)", "(b:1.5)"]
    assert expand("a cat | a dog") == [r"a cat \| a dog"] and pieces(r"a cat \| a dog") == [Piece("a cat | a dog")]
    assert expand("plain") == ["plain"]


def test_alternatives_by_chance_are_repeated_by_their_seed():
    text = "{a|b|c|d} {e|f|g|h}"
    chosen = {expand(text, seed)[0] for seed in range(200)}
    assert chosen == set(expand(text))
    assert all(len(expand(text, seed)) == 1 and expand(text, seed) == expand(text, seed) for seed in range(5))


def test_too_much_is_refused():
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        pieces("(" * 100 + "a" + ")" * 100)
    with pytest.raises(ValueError, match="1000000000000 prompts; at most 10000"):
        expand("{a|b|c|d|e|f|g|h|i|j}" * 12)
    for text in ("{a|b}", "[a:b:0.5]"):
        with pytest.raises(ValueError, match="expand it and take its parts first"):
            pieces(text)


def test_parts_that_guide_together():
    assert parts("a cat") == [Part("a cat")]
    assert parts("a cat AND a (dog:2) :0.5 AND x:-1") == [Part("a cat "), Part(" a (dog:2.0) ", 0.5), Part(" x", -1.0)]
    assert parts("a cat:5") == [Part("a cat:5")]
    assert parts(r"SAND ANDY \AND (a AND b)") == [Part(r"SAND ANDY \AND (a AND b:1.1)")]
    assert pieces(r"\AND") == [Piece("AND")]


def test_parts_that_change_on_the_way():
    assert parts("a [red:blue:0.4] cat") == [Part("a red cat", 1, 0, 0.4), Part("a blue cat", 1, 0.4, 1)]
    assert parts("[cat:.3]") == [Part("", 1, 0, 0.3), Part("cat", 1, 0.3, 1)]
    assert parts("[cat::0.3]") == [Part("cat", 1, 0, 0.3), Part("", 1, 0.3, 1)]
    assert parts("[[a:b:0.2]:c:0.6]") == [Part("a", 1, 0, 0.2), Part("b", 1, 0.2, 0.6), Part("c", 1, 0.6, 1)]
    assert parts("[a:b:0]") == [Part("b")] and parts("[a:b:1]") == [Part("a")]
    assert parts("[a:b:0.5] AND c") == [Part("a ", 1, 0, 0.5), Part("b ", 1, 0.5, 1), Part(" c")]
    for text in ("[a:b]", "[a:b:2]", "[a:b:c:0.5]", "[a:b:x]"):
        assert len(parts(text)) == 1 and pieces(parts(text)[0].text)[0].weight == pytest.approx(1 / 1.1)


def test_blocks():
    found = blocks("picture of:1 small:0.5 cat sitting on:1 big:2 dog")
    wanted = [("picture of", 1), ("small", 0.5), ("cat sitting on", 1), ("big", 2), ("dog", 1)]
    assert [(b.text, b.weight) for b in found] == wanted
    assert blocks("a sign saying: open") == [Piece("a sign saying: open")]
    assert blocks("") == [Piece("")]
    assert blocks("cat:-.5") == [Piece("cat", -0.5)]


def test_random_text_is_read_or_refused_and_written_stably():
    """10,000 strings: the documented error or none, no hang, and what is written reads back as the same pieces."""
    letters = [*"()[]{}|:\\ aB1.5-é\n猫😀", "BREAK", " AND ", "((", "))", ":1.2)", "\\("]
    generator, refused, start = random.Random(0), 0, time.monotonic()
    for _ in range(10_000):
        text = "".join(generator.choice(letters) for _ in range(generator.choice([3, 10, 40, 200])))
        try:
            prompts = expand(text)
        except ValueError as error:
            assert "nested more than" in str(error) or "at most 10000" in str(error)
            refused += 1
            continue
        for prompt in (*prompts[:2], *expand(text, seed=1)):
            (again,) = expand(prompt)
            assert expand(again) == [again]
            assert [(p.weight, p.start, p.end) for p in parts(again)] == [
                (p.weight, p.start, p.end) for p in parts(prompt)
            ]
            for part, same in zip(parts(prompt), parts(again), strict=True):
                assert pieces(part.text) == pieces(same.text)
    assert refused < 1000
    assert time.monotonic() - start < 120


@pytest.mark.parametrize(
    "text", ["(" * 200_000, ")" * 200_000, "(a)" * 50_000, "([" * 60 + "x" * 100_000, "a|" * 50_000]
)
def test_long_text_takes_linear_time(text):
    start = time.monotonic()
    pieces(expand(text)[0])
    assert time.monotonic() - start < 20
