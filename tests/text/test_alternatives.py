"""Alternatives, wildcards and comments, beside dynamicprompts, and text that only looks like them."""

import random
import time
from collections import Counter
from contextlib import suppress

import pytest
from dynamicprompts.generators import CombinatorialPromptGenerator
from dynamicprompts.wildcards import WildcardManager

from stable_diffusion.app.wildcards import read_wildcards
from stable_diffusion.text.alternatives import expand
from stable_diffusion.text.prompt import parts

FILES = {
    "colour": "red\nblue # as the sky\n# none\n{light|dark} grey\nred\n",
    "colour2": "pink\n",
    "animals/cat": "cat\nwild cat\n",
    "animals/dog": "dog\n__colour2__ dog\n",
    "far/away/hat": "fez\n",
    "hair colour": "blond\n",
}
SAME = """
a cat; {a}; {}; a { red | blue } b; {red|green|blue} {cat|dog}; x {|a}; {a|b|} c; {a|{b|c} d} e; {a|a|b}; a | b; a}
({a|b}:1.2) [c:d:0.5]; a [{b|c}:0.5]; <lora:x:0.5> {a|b}; <lora:{a|b}:0.5>; {(a:1.2), b|[c]}; {a, b|c:d}
{0.7::red|0.3::blue}; {2::a|b}; { .5::a|b}; {1::a|{2::b|c}}; {0::a|b}; {3.::a|0.5::b|c}
{2$$a|b|c}; {1$$a|b|c}; {3$$a|b|c}; {5$$a|b}; {0$$a|b}; {2$$a}; {2$${a|b}|c}; {2$$2::a|b|c}; { 2$$a|b}; {2$$a|a|b}
{1-2$$a|b}; {1-$$a|b|c}; {-2$$a|b|c}; {0-1$$a|b}; {2-1$$a|b}; {1-9$$a|b}; x {1-2$$a|{b|c}} y; {2$$ a| b |c}; {2$$a|}
{2$$ and $$a|b|c}; {1-2$$ and $$a|b}; {2$$, $$a|b}; {2$$|$$a|b}; {2$$ / $$a|{b|c}}; {2$${2$$a|b}|c}
__colour__; __colour__ and __colour2__; {__colour__|green}; (__colour2__:0.5); __colour2____animals/cat__; \
__hair colour__
__animals/*__; __colour*__; __animals/?og__; __*/*__; __hat__; __c*r[2]__; __*__; __**__
{2$$__colour__}; {2$$__colour__|x}; {1-2$$ and $$__animals/*__}; {2$$ - $$__colour2__|__colour__}; {3$$ __colour2__ }
a # comment; {a|b} # {c|d}; __colour__ # all
"""
# Text, or signs without effect, and a remark.
REMARKS = {
    "${x={a|b}} ${x}": ["${x={a|b}} ${x}"],
    "${x:a} cat": ["${x:a} cat"],
    "{a|${x}}": ["a", "${x}"],
    "${x=!{a|b}} {c|d}": ["${x=!{a|b}} c", "${x=!{a|b}} d"],
    "%{a ... b$$c}": ["%{a ... b$$c}"],
    "{a$$b|c}": ["a$$b", "c"],
    "{~a|b}": ["a", "b"],
    "{@2$$a|b}": ["a,b", "b,a"],
    "__~colour2__": ["pink"],
    "__colour2(x=1)__": ["__colour2(x=1)__"],
    "{2$$__colour2(x=1)__}": ["__colour2(x=1)__"],
    "poster #1": ["poster #1"],
    "C#": ["C#"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of wildcards."""
    root = tmp_path_factory.mktemp("wildcards")
    for name, text in FILES.items():
        path = root / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def blanks(prompts: list[str]) -> set[str]:
    """Return the prompts with one blank for several, and none before a comma."""
    return {" ".join(prompt.split()).replace(" ,", ",") for prompt in prompts}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pyparsing renames what dynamicprompts uses
@pytest.mark.parametrize("text", [text.strip() for text in SAME.replace("\n", ";").split(";") if text.strip()])
def test_the_same_prompts_as_dynamicprompts(folder, caplog, text):
    """In an order of their own, and with as many blanks as were typed."""
    theirs = CombinatorialPromptGenerator(WildcardManager(folder), ignore_whitespace=True).generate(text)
    ours, drawn = (expand(text, seeds, read_wildcards(folder)) for seeds in (None, range(40)))
    assert blanks(ours) == blanks(theirs) >= blanks(drawn) and len(ours) == len({*ours})
    assert not [record for record in caplog.records if record.name.startswith("stable_diffusion")]


def test_wildcards_without_lists_are_remarked_on_once(caplog):
    assert expand("a __colour__ {__animals/*__|cat}") == ["a __colour__ __animals/*__", "a __colour__ cat"]
    assert {record.message for record in caplog.records} == {
        "wildcards, as __name__, are plain text without a wildcard folder"
    }


@pytest.mark.parametrize("text", REMARKS)
def test_what_has_no_effect_is_remarked_on(folder, caplog, text):
    assert expand(text, None, read_wildcards(folder)) == REMARKS[text]
    (remark,) = {record.message for record in caplog.records}
    assert "text" in remark or "no effect" in remark


def test_a_prompt_is_drawn_by_weight():
    table = {"{0.7::a|0.3::b}": (700, 300), "{2::a|b|c}": (500, 250, 250), "{0::a|b}": (0, 1000), "{a|b}": (500, 500)}
    for text, wanted in table.items():
        drawn = Counter(expand(text, range(1000)))
        assert [drawn[letter] for letter in "abc"[: len(wanted)]] == pytest.approx(wanted, abs=50)
    pairs = Counter(expand("{2$$2::a|b|c}", range(2000)))  # the first by weight, then by the weights that are left
    wanted = {"a,b": 500, "a,c": 500, "b,a": 333, "b,c": 167, "c,a": 333, "c,b": 167}
    assert pairs == pytest.approx(wanted, abs=70) and Counter(expand("{1-2$$a|b}", range(1000)))["a"] < 400
    assert {*expand("{0::a|0::b}", range(50))} == {"a", "b"}


def test_alternatives_give_every_prompt_in_order():
    assert expand("a {red|blue} {cat|dog}") == ["a red cat", "a red dog", "a blue cat", "a blue dog"]
    assert expand("{[a|b]|c [d} e|f]") == ["[a|b] e|f]", "c [d e|f]"]  # alternation is of another kind
    assert expand("a {red|{light|dark} blue} cat") == ["a red cat", "a light blue cat", "a dark blue cat"]
    assert expand("({a|b}:1.5)") == ["(a:1.5)", "(b:1.5)"]
    assert expand("{a | b|c} | d") == ["a  | d", " b | d", "c | d"]
    assert expand("{2$${a|b}|a}") == ["b,a", "a,b"] and expand("{2$$$$a|b}") == ["ab", "ba"]
    with pytest.raises(ValueError, match="are all the same; give others, or combine fewer"):
        expand("{2$$a|a}")


@pytest.mark.parametrize("seed", [None, [0]])
def test_text_without_alternatives_comes_back_as_it_was_typed(seed):
    texts = [
        "",
        " plain ",
        "a cat | a dog: (x):1.30 [y] [a|b:.50]",
        r"\{ { (] AND BREAK \\",
        "__colour__ )",
        r"\# [small]",
    ]
    for text in [*texts, "50% of $5 {", "<lora:a__colour__b:1>"]:
        assert expand(text, seed) == [text]
        assert expand(text.replace("__", ""), seed, lists) == [text.replace("__", "")]


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
    return expand(text, None if seed is None else [seed], lists)


def test_a_wildcard_stands_for_the_lines_of_its_list():
    colours = ["red", "light blue", "dark blue"]
    animals = ["cat", "(dog:1.5)", *(f"{colour} bird" for colour in colours)]
    assert wild("__animal__") == animals
    assert wild("__colour__ __animal__") == [f"{colour} {animal}" for colour in colours for animal in animals]
    assert wild("(__colour__:0.5)") == [f"({colour}:0.5)" for colour in colours]
    assert wild("(a):0.5__colour__")[0] == "(a):0.5red"
    assert wild("{a|__colour__}") == ["a", *colours]
    assert wild("[__colour__:x:0.5]")[0] == "[red:x:0.5]"
    assert wild("__colour____colour__")[0] == "redred" and wild("_a__colour___")[0] == "_ared_"
    assert wild("{__odd/one__|x}") == ["a | b: c)", "x"]  # as it stands in the list


def test_what_only_looks_like_a_wildcard_is_text():
    for text in ("__ colour__", "____", "_colour_", "__colour_", "___", "__(colour)__", r"\__colour__"):
        assert wild(text) == expand(text)
    assert expand("a __colour__ {x|y}") == ["a __colour__ x", "a __colour__ y"]  # without lists


def test_a_seed_chooses_every_prompt_and_repeats_its_choice():
    text = "a __colour__ __animal__ or {a|b}"
    assert {wild(text, seed)[0] for seed in range(500)} == set(wild(text))
    for seed in range(20):
        (chosen,) = wild("__colour__ {a|b}", seed)
        # A list chooses as its lines do where they are written out.
        assert [chosen] == wild("__colour__ {a|b}", seed) == expand("{red|{light|dark} blue} {a|b}", [seed])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a __two__", r"__two__ leads back to itself \(two -> one-way -> two\)"),
        ("__self__", r"__self__ leads back to itself \(self -> self\)"),
        ("__absent__", r"^there is no absent$"),
        ("__nested__", r"^there is no absent; __nested__ refers to it$"),
        ("__none__", "__none__ has no lines"),
    ],
)
def test_wildcards_that_cannot_be_read_are_named(text, message):
    for seed in (None, 0):
        with pytest.raises(ValueError, match=message):
            wild(text, seed)


@pytest.mark.parametrize("seeds", [None, [0]])
def test_wildcards_within_wildcards_have_limits(seeds):
    def chain(line: str, last: str, length: int):
        return lambda name: [line.format(int(name) + 1)] if int(name) < length else [last]

    assert expand("__0__", seeds, chain("__{}__", "end", 63)) == ["end"]
    deep, repeated = {"deep": ["{" * 10 + "x" + "}" * 10]}, "__{0}__ __{0}__"
    for text, read, message in (
        ("__0__", chain("__{}__", "end", 64), "braces at __64__ nested more than 64 deep"),
        # also where it was read nearer to the surface
        ("__0__ " + "{" * 10 + "__0__" + "}" * 10, chain("__{}__", "end", 60), "nested more than 64 deep"),
        ("__deep__ __0__", lambda n: deep.get(n) or chain("__{}__", "__deep__", 60)(n), "nested more than 64 deep"),
        ("__0__", chain(repeated, "end", 62), "of __48__ exceed 100000 characters"),
        ("__0__", chain(repeated, "{|}", 60), "of __46__ exceed 100000 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            expand(text, seeds, read)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("__b__", 10_001),
        ("__b__ __c____b__", 10_003_000_300_010),
        ("{a|b|c|d|e|f|g|h|i|j}" * 12, 10**12),
        ("{a|b}" * 1000, 10**15),  # more are not told apart
        ("{1-2$$" + "|".join(map(str, range(101))) + "}", 101 + 101 * 100),
        ("{8$$" + "|" * 12_000 + "}", 10**15),
    ],
)
def test_too_many_prompts_are_refused(text, count):
    table = {"a": [str(i) for i in range(100)], "b": ["__a__ __a__", "x"], "c": ["__b__"] * 10}.__getitem__
    with pytest.raises(ValueError, match=f"give {count} prompts; the limit is 10000"):
        expand(text, None, table)
    assert len(expand("__a__ __a__", None, table)) == 10_000 and len(expand(text, [0], table)) == 1


def test_random_text_is_expanded_or_refused():
    letters = [
        *"[]{}|:\\ aB1.5-é\n😀_#$%~@",
        "{2$$",
        "{1-2$$ and $$",
        "0.5::",
        "__",
        "__animal__",
        "__odd/two__",
        "\\_",
        "${x=",
        "$$",
    ]
    generator, refused = random.Random(0), 0
    for number in range(1_500):
        text = "".join(generator.choice(letters) for _ in range(generator.choice([3, 10, 10, 40, 40, 200])))
        wildcards = lists if number % 2 else None
        try:
            prompts = expand(text, None, wildcards)
            assert len(expand(text, [1, 1, 2], wildcards)) == 3 and all(map(parts, prompts[:5]))
        except ValueError as error:
            known = "nested more than", "limit is 10000", "there is no", "are all the same", "exceed"
            assert any(words in str(error) for words in known)
            refused += 1
    assert refused < 450


LONG = ["{" * 50_000, "{a}" * 12_000, "{[" * 12_000 + "}" * 25_000, "[" * 12_000 + "]" * 12_000, "{2$$" * 12_000]
LONG += ["__a" * 12_000, "_" * 50_000, "{" + "|" * 22_000 + "}", "{8000$$" + "a|" * 10_000 + "}", "%{" * 12_000]
LONG += ["{" + "[a|" * 8_000 + "]" * 8_000 + "}", "${a=" * 10_000, " " * 50_000, "\n" * 50_000, " #a" * 12_000]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:9])
def test_long_text_takes_linear_time(text):
    start = time.process_time()
    for seeds in (None, [0]):
        with suppress(ValueError):
            expand(text, seeds, lambda name: [name])
    assert time.process_time() - start < 2.5
