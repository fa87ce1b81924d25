"""Lists on the command line: what belongs to a flag, what is the prompt, and what is refused."""

import argparse

import pytest
from PIL import Image

from stable_diffusion.cli import arguments


def read(*words: str, script: str = "txt2image") -> argparse.Namespace:
    """What a script reads from these words."""
    return arguments.read(script == "image2image", words)[1]


@pytest.mark.parametrize(
    "words, prompt, seeds",
    [
        # As in mlx-examples: one value, and the prompt anywhere.
        (["--seed", "42", "a cat"], "a cat", (42,)),
        (["a cat", "--seed", "42"], "a cat", (42,)),
        (["--seed", "42", "7"], "7", (42,)),
        (["--seed", "42", "-q", "7"], "7", (42,)),
        (["--seed=42", "7"], "7", (42,)),
        (["--seed", "42", "--", "7"], "7", (42,)),
        (["--seed", "42", "--", "--seed"], "--seed", (42,)),
        (["--seed", "42", ""], "", (42,)),
        (["--seed", "42", "- a - dash"], "- a - dash", (42,)),
        # Lists, with blanks and commas and ranges.
        (["a", "--seed", "1", "2", "3"], "a", (1, 2, 3)),
        (["--seed", "1", "2", "3", "a"], "a", (1, 2, 3)),
        (["-q", "--seed", "1", "2", "--verbose", "a"], "a", (1, 2)),
        (["a", "--seed", "1,2,3"], "a", (1, 2, 3)),
        (["--seed", "1,2,3", "7"], "7", (1, 2, 3)),
        (["a", "--seed=1,2,3"], "a", (1, 2, 3)),
        (["a", "--seed", "1, 2"], "a", (1, 2)),
        (["--seed", "1,", "2,", "3", "a"], "a", (1, 2, 3)),
        (["--seed", "42", "7,"], "7,", (42,)),
        (["a", "--seed", "3-6"], "a", (3, 4, 5, 6)),
        (["a", "--seed", "3-3"], "a", (3,)),
        (["a", "--seed", "1,2,5-8", "9"], "a", (1, 2, 5, 6, 7, 8, 9)),
        (["a", "--seed", "9", "1-2"], "a", (9, 1, 2)),
        (["a", "--seed", "5", "4-6", "5"], "a", (5, 4, 6)),  # once each
        (["a", "--seed", "1", "--seed", "2", "3"], "a", (2, 3)),  # the last one counts, as ever
        (["a", "--see", "1", "2"], "a", (1, 2)),
        (["7", "--seed", "1", "2"], "7", (1, 2)),
        (["a", f"--seed={2**63 - 1},0"], "a", (2**63 - 1, 0)),
    ],
)
def test_seeds_and_the_prompt(words, prompt, seeds):
    args = read(*words)
    assert (args.prompt, args.seed) == (prompt, seeds)


@pytest.mark.parametrize(
    "words, name, values",
    [
        (["--steps", "10", "20", "30"], "steps", (10, 20, 30)),
        (["--steps", "10,20", "30"], "steps", (10, 20, 30)),
        (["--steps", "2"], "steps", (2,)),
        (["--cfg", "3,5,7.5"], "cfg", (3.0, 5.0, 7.5)),
        (["--cfg", "3", "-1", "0"], "cfg", (3.0, -1.0, 0.0)),
        (["--cfg", "-1", "3"], "cfg", (-1.0, 3.0)),
        (["--cfg", "-1,3"], "cfg", (-1.0, 3.0)),
        (["--cfg", "7", "7.0", "3"], "cfg", (7.0, 3.0)),
        (["--sampler", "euler", "DPM++ 2M Karras"], "sampler", ("euler", "DPM++ 2M Karras")),
        (["--sampler", "euler,DPM++ 2M Karras,heun"], "sampler", ("euler", "DPM++ 2M Karras", "heun")),
        (["--strength", "0.3", "0.6"], "strength", (0.3, 0.6)),
    ],
)
def test_lists_of_every_kind(words, name, values):
    script, image = ("image2image", ["in.png"]) if name == "strength" else ("txt2image", [])
    for argv in ([*image, "a cat", *words], [*words, *image, "a cat"], [*image, *words, "a cat"]):
        args = read(*argv, script=script)
        assert (args.prompt, getattr(args, name)) == ("a cat", values)


@pytest.mark.parametrize(
    "words, image, prompt, strength",
    [
        (["--strength", "0.5", "in.png", "x"], "in.png", "x", (0.5,)),
        (["in.png", "--strength", "0.5", "x"], "in.png", "x", (0.5,)),
        (["in.png", "x", "--strength", "0.5"], "in.png", "x", (0.5,)),
        (["--strength", "0.5", "0.7", "x"], "0.7", "x", (0.5,)),  # each flag one value: as without lists
        (["--strength", "0.5", "0.7", "1"], "0.7", "1", (0.5,)),
        (["--strength", "0.5", "0.7", "in.png", "x"], "in.png", "x", (0.5, 0.7)),
        (["--strength", "0.5", "0.7", "in.png", "1"], "in.png", "1", (0.5, 0.7)),
    ],
)
def test_an_image_and_a_prompt_are_left(words, image, prompt, strength):
    args = read(*words, script="image2image")
    assert (args.image, args.prompt, args.strength) == (image, prompt, strength)


def test_a_file_of_prompts_needs_no_prompt():
    assert read("--prompt_file", "x.txt", "--steps", "10", "20").steps == (10, 20)
    assert read("--steps", "10", "20", "--prompt-file=x.txt").steps == (10, 20)


@pytest.mark.parametrize("script", ["txt2image", "image2image"])
@pytest.mark.parametrize(
    "words, prompt, steps",
    [
        ("--from_image x.png --steps 10 20", None, (10, 20)),
        ("--steps 10 20 --from_image x.png", None, (10, 20)),
        ("--from_image x.png --steps 10 cat", "cat", (10,)),
        ("--from_image x.png --steps 10 20 cat", "cat", (10, 20)),
        ("cat --steps 10 20 --from_image=x.png", "cat", (10, 20)),
    ],
)
def test_a_picture_that_is_made_again_needs_no_prompt(script, words, prompt, steps):
    args = arguments.script_parser(script == "image2image").parse_args(words.split())
    assert (args.image if "image" in args else args.prompt, args.steps) == (prompt, steps)


def test_values_with_blanks_behind_an_equals_sign():
    args = read("--negative_prompt=a, --b c", "--seed=1,2", "a cat", "--output=my cat.png")
    assert (args.negative_prompt, args.seed, args.prompt, args.output) == ("a, --b c", (1, 2), "a cat", "my cat.png")


def test_the_order_of_lists_is_kept():
    assert read("a", "--steps", "1", "2", "--cfg", "3", "--seed", "4").lists == ("steps", "cfg", "seed")
    assert read("a", "--seed=4", "--steps=1", "--seed=5,6").lists == ("seed", "steps")


@pytest.mark.parametrize(
    "words, said",
    [
        ("--seed 1 2 3", ["give a prompt", "--seed 1,2"]),  # which one would be the prompt?
        ("--seed 1 2 --steps 10 20", ["give a prompt"]),
        ("--seed 1,2", ["give a prompt"]),
        ("a --seed", ["--seed", "expected one argument"]),
        ("a --seed --steps 2", ["--seed", "expected one argument"]),
        ("a --seed 1 b", ["--seed", "'b' is not a whole number"]),
        ("--seed 42 a --steps 10 b", ["--steps", "'b' is not a whole number from 1 to 9999"]),
        ("a --seed 1,,2", ["--seed", "'' is not a whole number"]),
        ("a --seed ,", ["--seed", "'' is not a whole number"]),
        ("a --output", ["--output", "expected one argument"]),
        ("a --seed 1;2", ["--seed", "'1;2'"]),
        ("a --seed 1-", ["--seed", "'1-'"]),
        ("a --seed 1..3", ["--seed", "'1..3'"]),
        ("a --seed -3", ["--seed", "'-3'"]),
        ("a --seed 20-1", ["--seed", "'20-1' goes down", "1-20"]),
        ("a --seed 1-99999999999", ["--seed", "'1-99999999999' is more than 9999 values", "fewer"]),
        (f"a --seed 1-{2**63}", ["--seed", f"'{2**63}' is not a whole number"]),
        ("a --steps 1-20", ["--steps", "'1-20' is not a whole number"]),
        ("a --steps 10 0", ["--steps", "'0' is not a whole number"]),
        ("a --cfg 3 nan", ["--cfg", "'nan' is not a number"]),
        ("a --sampler euler eulr", ["--sampler", "'eulr' is unknown", "euler, euler_a"]),
        ("a b --steps 10 20", ["unrecognized arguments: b"]),
    ],
)
def test_what_is_refused(run, no_model, words, said):
    run("txt2image", *words.split(" ")).refused(*said)


def test_what_is_refused_beside_an_image(run, no_model, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    image = tmp_path / "in.png"
    run("image2image", image, "--strength", 0.5, 0.7, 0.9).refused("give a prompt")
    run("image2image", image, "a", "--strength", 0.5, 2).refused("--strength", "'2' is not above 0 and at most 1")
