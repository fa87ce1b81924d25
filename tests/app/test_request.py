"""Requests: what a command line or a record asks for, image by image, and which images are generated together."""

import dataclasses
import json
import typing
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import PROMPT, pixels
from stable_diffusion import Options, SizeConditioning, StableDiffusion
from stable_diffusion.app import memory
from stable_diffusion.app.batches import group
from stable_diffusion.app.request import KINDS, Request, expand
from stable_diffusion.cli import arguments
from stable_diffusion.options import OptionKeywords, SettingError


def expanded(*words, script: str = "txt2image", first_seed: int = 100) -> list[Request]:
    """Return the images of a command line, whose random seed is 100."""
    lines = list(arguments.read(script, [str(word) for word in words]).lines)
    if lines[0][0].seed is None:
        lines[0] = (lines[0][0].with_values(seed=first_seed), lines[0][1])
    return expand(lines)


def rows(requests: list[Request], *names: str) -> list[tuple]:
    """Return values of the images of a prompt and setting, which differ in their seeds alone, and these."""
    groups: dict[tuple, list[int]] = {}
    for request in requests:
        values = (request.text, *(request.value(name) for name in names))
        groups.setdefault((request.variant.prompt, *values), []).append(request.seed)
    return [(*values, tuple(seeds)) for (_, *values), seeds in groups.items()]


@pytest.fixture
def prompts(tmp_path):
    """Write a file of prompts and return its path."""

    def write(*lines: str) -> Path:
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(lines))
        return path

    return write


# --- a record of plain values ----------------------------------------------------------------------------------------


def test_the_keywords_of_options_are_its_fields():
    own, keywords = typing.get_type_hints(Options), typing.get_type_hints(OptionKeywords)
    assert {field.name: own[field.name] for field in dataclasses.fields(Options)} == keywords


def test_every_field_comes_back_from_plain_values():
    """A field or an option of a kind that is new must be readable from JSON."""
    lists = {"lora": (("a", 0.5),), "controlnet": (("n", 1.0),), "control_image": ("i",), "control_start": (0.1,)}
    options = Options(
        sampler="Euler a", eta=0.5, guidance_interval=(0.25, 1.0), guidance_rescale=0.7, pag_layers=("mid", "up.1")
    )
    options = dataclasses.replace(options, size_conditioning=SizeConditioning((5, 6), negative_crop=(1, 2)))
    request = Request(prompt="a cat", seed=3, steps=4, expand=(8, 0, 16, 0), options=options, **lists)
    record = request.to_dict()
    assert Request.from_dict(json.loads(json.dumps(record))) == (request, [])
    own = "prompt seed steps expand sampler eta guidance_interval guidance_rescale pag_layers"
    assert record.keys() == {*own.split(), *lists, "original_size", "negative_crop"}
    assert not {"controls", "latents", "noise", "variant", "options"} & KINDS.keys()


def test_unknown_names_are_returned_and_others_kept():
    request, unknown = Request.from_dict({"steps": 3, "aura": 1, "image_prompts": [1]})
    assert (request, unknown) == (Request(steps=3), ["aura", "image_prompts"])


WRONG_KINDS = {"steps": True, "cfg": "7", "canny": "yes", "lora": [["a"]], "expand": [1, 2, 3], "prompt": None}


@pytest.mark.parametrize(
    "record, message",
    [
        *(({name: value}, "has the wrong type") for name, value in WRONG_KINDS.items()),
        ({"steps": 0}, "0 is not a whole number from 1 to 9999"),
        ({"seed": 10**400}, "is not a whole number from -1"),
        ({"cfg": 10**400}, "has the wrong type"),
        ({"sampler": "best"}, "'best' is unknown"),
        ({"crop": [1, -2]}, "-2 is not a whole number from 0"),
        ({"original_size": [64]}, "has the wrong type"),
        ({"resize": "zoom"}, "'zoom' is unknown; choose one of crop, pad, stretch"),
        ({"guidance_rescale": 2}, "2.* is not a number from 0 to 1"),
    ],
)
def test_values_that_are_refused(record, message):
    with pytest.raises(ValueError, match=f"{next(iter(record))} .*{message}"):
        Request.from_dict(record)


def test_fields_that_exclude_each_other():
    with pytest.raises(SettingError, match="invert_mask needs mask") as error:
        Request(invert_mask=True)
    assert error.value.names == ("invert_mask", "mask")


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how, count", [("all", 4), ("one", 1)])
def test_prompts_of_the_second_encoder_have_alternatives(how, count):
    options = Options(prompt_2="{red|blue} <lora:ink>", negative_prompt_2="{a|b}")
    images = expand([(Request(prompt="cat", seed=1, n_images=1, options=options, alternatives=how), {})])
    texts = {image.texts[2:] for image in images}
    assert len(images) == len(texts) == count and texts <= set(product(("red", "blue"), ("a", "b")))
    assert {image.prompt_loras for image in images} == {(("ink", 1.0),)}


def test_prompts_are_kept_as_they_were_typed():
    typed = r"[small] ((big)) {red|blue} :) <lora:paint:0.5> <lora:ink>"
    first, second = expand([(Request(prompt=typed, seed=1, n_images=1), {})])
    assert first.prompt == second.prompt == typed
    assert "red" in first.text and "blue" in second.text and "lora" not in first.text
    assert first.prompt_loras == (("paint", 0.5), ("ink", 1.0))
    (plain,) = expand([(Request(prompt="[small] :)", seed=1, n_images=1), {})])
    assert (plain.text, plain.resolved_prompt) == ("[small] :)", None)


def test_a_resolved_prompt_is_not_resolved_again():
    request = Request(prompt="{red|blue} cat", resolved_prompt="blue cat", seed=1, n_images=1)
    assert [image.text for image in expand([(request, {})])] == ["blue cat"]
    assert arguments.line_of(request, {"prompt": "green cat"})[0].text == "green cat"  # another takes its place


@pytest.fixture
def words(tmp_path):
    """A folder of wildcards."""
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "colour.txt").write_text("\n".join(f"colour{i}" for i in range(50)))
    return tmp_path / "words"


DRAWN = ["{a|b|c|d|e|f|g|h}", "__colour__ {cat|dog}", "{2$$a|b|c|d|e}", "{9::a|b|c} __col*__", "a <lora:{x|y|z}:1>"]


@pytest.mark.parametrize("prompt", DRAWN)
def test_each_image_draws_its_own_alternatives(words, prompt):
    """As if it were made alone, also of a list of seeds and beside other settings."""
    one = [prompt, "--alternatives", "one", "--wildcards", words]
    images = expanded(*one, "--seed", 5, "--n_images", 12)
    alone = [expanded(*one, "--seed", seed, "--n_images", 1)[0] for seed in range(5, 17)]
    assert [(i.seed, i.text, i.prompt_loras) for i in images] == [(i.seed, i.text, i.prompt_loras) for i in alone]
    assert len({image.resolved_prompt for image in images}) >= 3 and {image.prompt for image in images} == {prompt}
    assert [i.text for i in expanded(*one, "--seed", "9,6,9")] == [images[place].text for place in (4, 1, 4)]
    swept = expanded(*one, "--seed", "5-16", "--cfg", "1,2")
    assert [image.text for image in swept] == 2 * [image.text for image in images]


def test_lines_of_a_file_draw_their_own_alternatives(words, prompts):
    file = prompts("a {b|c|d|e} __colour__", "{b|c|d|e} f --seed 3", "{b|c|d|e} g")
    images = expanded("--prompt_file", file, "--alternatives", "one", "--wildcards", words, "--seed", 7)
    assert [image.seed for image in images] == [7, 8, 9, 10, 3, 4, 5, 6, 7, 8, 9, 10]
    for image in images:
        more = "--alternatives", "one", "--wildcards", words, "--seed", image.seed, "--n_images", 1
        assert expanded(image.prompt, *more)[0].text == image.text
    assert len({image.text for image in images}) > 6


def test_alternatives_of_the_negative_prompt():
    request = Request(prompt="{a|b}", negative_prompt="{c|d} # e", seed=1, n_images=1)
    pairs = [(image.text, image.negative_prompt) for image in expand([(request, {})])]
    assert pairs == list(product("ab", "cd"))
    (image,) = expand([(request.with_values(prompt="a", alternatives="one"), {})])
    assert image.negative_prompt in ("c", "d") and image.resolved_prompt == "a"
    assert expand([(image, {})])[0].negative_prompt == image.negative_prompt
    for values in ({"resolved_prompt": "b"}, {"weight_blocks": True}, {"emphasis": "none"}):
        (image,) = expand([(request.with_values(**values), {})])
        assert (image.negative_prompt, image.resolved_prompt) == ("{c|d} # e", values.get("resolved_prompt"))


# --- how many images, and their seeds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, seeds",
    [
        ([], [(100, 101, 102, 103)]),
        (["--seed", 7, "--n_images", 2], [(7, 8)]),
        (["--seed", "5-7", "--n_images", 3], [(5, 6, 7)]),
        (["--seed", "1,5-7"], [(1, 5, 6, 7)]),
        (["--steps", "10,20"], [(100,), (100,)]),
        (["--steps", "10,20", "--n_images", 2, "--seed", 0], [(0, 1), (0, 1)]),
    ],
)
def test_how_many_images(words, seeds):
    assert [row[-1] for row in rows(expanded("a", *words), "steps")] == seeds


def test_a_seed_of_minus_one_is_random(prompts):
    """On the command line, in lists, in lines of a file and in records."""
    (alone,) = expand(arguments.read("txt2image", ["a", "--seed", "-1", "--n_images", "1"]).lines)
    first, five, last = expand(arguments.read("txt2image", ["a", "--seed", "-1,5,-1"]).lines)
    line, *_ = expand(arguments.read("txt2image", ["--prompt_file", str(prompts("a --seed -1")), "--seed", "7"]).lines)
    (recorded,) = expand([(Request.from_dict({"prompt": "a", "seed": -1, "n_images": 1})[0], {})])
    seeds = [image.seed for image in (alone, first, last, line, recorded)]
    assert min(seeds) >= 0 and len(set(seeds)) == 5 and five.seed == 5 and 7 not in seeds


def test_the_first_sweep_changes_slowest_and_seeds_fastest():
    words = ["--sampler", "euler,heun", "--seed", "1,2", "--cfg", "3,5", "--steps", 4]
    images = expanded("a", *words)
    wanted = [("a", s, c, (1, 2)) for s in ("euler", "heun") for c in (3.0, 5.0)]
    assert rows(images, "sampler", "cfg") == wanted
    assert all(image.variant.swept == ("sampler", "seed", "cfg") and image.steps == 4 for image in images)
    settings = [row[1:3] for row in rows(expanded("a", "--cfg", "3,5", "--sampler", "euler,heun"), "sampler", "cfg")]
    assert settings == [("euler", 3.0), ("heun", 3.0), ("euler", 5.0), ("heun", 5.0)]


def test_prompts_stand_together_in_each_setting():
    images = expanded("{red|blue} cat", "--steps", "1,2", "--seed", 5, "--n_images", 2)
    assert rows(images, "steps") == [(f"{c} cat", s, (5, 6)) for s in (1, 2) for c in ("red", "blue")]
    images = expanded("{red|blue} cat", "--steps", "1,2", "--seed", "5,9")
    assert rows(images, "steps") == [(f"{c} cat", s, (5, 9)) for s in (1, 2) for c in ("red", "blue")]


SEEDS = {
    "{red|blue} cat --seed 5 --n_images 2": [("red cat", (5, 6)), ("blue cat", (7, 8))],
    "{red|blue} cat --seed 5 --n_images 2 --fixed_seed": [("red cat", (5, 6)), ("blue cat", (5, 6))],
    "{red|blue} cat --n_images 1 --fixed_seed": [("red cat", (100,)), ("blue cat", (100,))],
    "{red|blue} star --cfg 1,4 --seed 3": [("red star", (3, 3)), ("blue star", (3, 3))],
    "{red|blue} star --sampler euler,heun --n_images 2": [("red star", (100, 101) * 2), ("blue star", (100, 101) * 2)],
    "cat --seed 7,7": [("cat", (7, 7))],
    "cat --seed 7,7 --fixed_seed": [("cat", (7, 7))],
    "cat --seed 7 --n_images 2 --fixed_seed": [("cat", (7, 8))],
}


@pytest.mark.parametrize("command", SEEDS)
def test_seeds_of_prompts_that_are_compared(command):
    prompt, _, flags = command.partition(" --")
    images = expanded(prompt, *f"--{flags}".split())
    assert rows(images) == SEEDS[command] and not any(image.fixed_seed for image in images)


# --- lines of a file -------------------------------------------------------------------------------------------------


def test_lines_have_sweeps_of_their_own(prompts):
    file = prompts("one", "two --steps 3,4", "three --seed 7 --n_images 2", "four", "five --seed 1-2 --cfg 5", "six")
    images = expanded("--prompt_file", file, "--seed", 20)
    assert rows(images, "steps", "cfg") == [
        ("one", None, None, (20, 21, 22, 23)),
        ("two", 3, None, (24,)),
        ("three", None, None, (7, 8)),
        ("four", None, None, (9, 10, 11, 12)),
        ("five", None, 5.0, (1, 2)),
        ("six", None, None, (3, 4, 5, 6)),
        ("two", 4, None, (24,)),
    ]


def test_sweeps_of_the_command_line_hold_for_each_line(prompts):
    file = prompts("one", "two --steps 9", "three --seed 7", "four --sampler heun --cfg 1,2")
    images = expanded("--prompt_file", file, "--steps", "1,2", "--seed", "3,4")
    seeds = {"three": (7,)}
    settings = [("one", 1, None), ("two", 9, None), ("three", 1, None), ("four", 1, 1.0), ("one", 2, None)]
    settings += [("three", 2, None), ("four", 1, 2.0), ("four", 2, 1.0), ("four", 2, 2.0)]
    assert rows(images, "steps", "cfg") == [(*setting, seeds.get(setting[0], (3, 4))) for setting in settings]
    assert images[-1].variant.swept == ("steps", "seed", "cfg")


@pytest.mark.parametrize(
    "flags, seeds",
    [
        ("--seed 3 --n_images 1", [3, 7, 8, 8]),
        ("--seed 3 --n_images 1 --fixed_seed", [3, 7, 3, 3]),
        ("--n_images 1 --fixed_seed", [100, 7, 7, 7]),
        ("--seed 3 --n_images 1 --steps 1,2", [3, 7, 7, 7]),
    ],
)
def test_seeds_of_lines_that_are_compared(prompts, flags, seeds):
    images = expanded("--prompt_file", prompts("one", "two --seed 7", "three --cfg 1,2", "four"), *flags.split())
    settings = rows(images, "steps", "cfg")
    assert {(text, *seeds) for text, *_, seeds in settings} == {
        *zip(("one", "two", "three", "four"), seeds, strict=True)
    }


VARIATIONS = {  # strength, seed and variation seed of each image
    "cat --seed 7 --n_images 3": [(0.5, 7, 20), (0.5, 7, 21), (0.5, 7, 22)],
    "{red|blue} cat --seed 7 --n_images 2": [(0.5, 7, 20), (0.5, 7, 21), (0.5, 7, 22), (0.5, 7, 23)],
    "{red|blue} cat --seed 7 --n_images 2 --fixed_seed": [(0.5, 7, 20), (0.5, 7, 21)] * 2,
    "cat --seed 7,9": [(0.5, 7, 20), (0.5, 9, 21)],
    "cat --seed 7 --variation_seed 30,4": [(0.5, 7, 30), (0.5, 7, 4)],
    "cat --seed 7 --n_images 2 --variation_seed 30,40": [(0.5, 7, n) for n in (30, 31, 40, 41)],
    "cat --seed 7 --n_images 2 --variation_strength 0,1": [(0, 7, 20), (0, 7, 20), (1, 7, 20), (1, 7, 21)],
    "cat --seed 7 --n_images 2 --variation_strength 0": [(0, 7, 20), (0, 8, 20)],
}


@pytest.mark.parametrize("command", VARIATIONS)
def test_variations_of_a_seed(command):
    prompt, _, flags = command.partition(" --")
    images = expanded(prompt, "--variation_strength", 0.5, "--variation_seed", 20, *f"--{flags}".split())
    names = "variation_strength", "seed", "variation_seed"
    assert [tuple(map(image.value, names)) for image in images] == VARIATIONS[command]
    for image in images:  # each is made again alone
        (again,) = expand([(Request.from_dict(image.to_dict())[0], {})])
        assert [again.value(name) for name in names] == [image.value(name) for name in names]


def test_a_variation_seed_is_drawn():
    images = expanded("cat", "--seed", 7, "--n_images", 2, "--variation_strength", 0.1)
    first, second = (image.value("variation_seed") for image in images)
    assert second == first + 1
    assert first != expanded("cat", "--seed", 7, "--variation_strength", 0.1)[0].value("variation_seed")


def test_lines_that_are_refused(run, no_model, prompts):
    run("txt2image", "--prompt_file", prompts("a", "b --steps 3,x")).refused("line 2", "--steps", "'x'")
    run("txt2image", "--prompt_file", prompts("a --seed 1,2 --n_images 3")).refused("n_images 3", "number of seeds, 2")


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        ("a --seed 1,2,3 --n_images 2", ["--n_images 2 differs from the number of seeds, 3", "omit it"]),
        ("a --seed 0-9998 --steps 1,2", ["too many images, the limit is 9999", "fewer values"]),
        ("{a|b} --n_images 5000", ["too many images, the limit is 9999"]),
        ("a --seed 1,,2", ["--seed", "'' is not a whole number"]),
        ("a --seed 20-1", ["--seed", "'20-1' counts down", "1-20"]),
        ("a --seed 1-99999999999", ["--seed", "'1-99999999999' has too many values, the limit is 9999"]),
        ("a --variation_seed 3", ["--variation_seed has no effect without --variation_strength"]),
        ("a --steps 1-20", ["--steps", "'1-20' is not a whole number"]),
        ("a --sampler euler,eulr", ["--sampler", "'eulr' is unknown", "did you mean euler?"]),
    ],
)
def test_what_is_refused(run, no_model, words, said):
    run("txt2image", *words.split(" ")).refused(*said)


def test_the_most_images():
    assert len(expanded("a", "--seed", "0-9998")) == 9999


# --- what is generated together --------------------------------------------------------------------------------------


def test_images_of_one_setting_are_grouped(sd1_folder):
    sd = StableDiffusion(sd1_folder)

    def groups(*words) -> list[list[tuple]]:
        return [[(r.text, r.seed, r.steps) for r in images] for images in group(sd, expanded(*words))]

    assert groups("a", "--seed", "9,1,4", "--steps", 5) == [[("a", 9, 5), ("a", 1, 5), ("a", 4, 5)]]
    together = [[(word, 1, steps) for word in ("red", "cat", "blue")] for steps in (5, 6)]
    assert groups("{red|cat|blue}", "--steps", "5,6", "--seed", 1) == together
    assert [len(images) for images in groups("a", "--seed", 1, "--n_images", 3, "--variation_strength", 0.5)] == [3]
    long = " ".join(["cat"] * 80)
    assert [len(images) for images in groups(f"{{a|{long}|b}}", "--n_images", 1)] == [1, 1, 1]


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_of_lists_are_those_of_single_runs(run, sd1_folder, tmp_path):
    """Bit for bit, each with a batch of its own."""
    Image.effect_noise((64, 64), 60).save(tmp_path / "in.png")
    words = [tmp_path / "in.png", PROMPT, "--model", sd1_folder, "--steps", 2, "--batch_size", 1]
    words += ["--output", tmp_path / "a.png", "--overwrite"]

    def images(sampler: str, strength: str, seed: str, *options) -> list[np.ndarray]:
        given = ["--sampler", sampler, "--strength", strength, "--seed", seed, *options]
        out = run("image2image", *words, *given).succeeded().out
        return [pixels(Path(path)) for path, _, seed in (line.partition(" seed ") for line in out) if seed]

    together = images("euler,DPM++ 2M Karras", "0.5,1", "8,3")
    choices = product(("euler", "DPM++ 2M Karras"), ("0.5", "1"), ("8", "3"))
    singles = [image for chosen in choices for image in images(*chosen, "--n_images", 1)]
    assert len(singles) == 8 and all(np.array_equal(*pair) for pair in zip(together, singles, strict=True))
    assert not np.array_equal(together[0], together[1])


def test_variations_are_those_of_single_runs(run, sd1_folder, tmp_path):
    """In one batch, and with a second pass."""
    words = [PROMPT, "--model", sd1_folder, "--steps", 2, "--seed", 3, "--variation_strength", 0.5, "--hires", 1.5]
    words += ["--width", 64, "--height", 64, "--output", tmp_path / "a.png", "--overwrite", "--no_grid"]

    def images(count: int, variation_seed: int) -> list[np.ndarray]:
        run("txt2image", *words, "--n_images", count, "--variation_seed", variation_seed).succeeded()
        return [pixels(path) for path in sorted(tmp_path.glob("a*.png"))]

    (alone,) = images(1, 9)
    (tmp_path / "a.png").unlink()
    together = images(3, 8)
    assert np.abs(together[1] - alone).max() <= 1 and np.abs(together[0] - alone).max() > 1


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """How many images the runs of a script make at once."""
    seen, generate = [], StableDiffusion.generate_latents

    def spied(self, *args, **kwargs):
        seen.append(len(kwargs["seed"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(StableDiffusion, "generate_latents", spied)
    return seen


@pytest.mark.parametrize(
    "prompt, options, most, wanted",
    [
        (PROMPT, ["--seed", "1-7"], 3, [3, 3, 1]),
        (PROMPT, ["--seed", "1-7", "--batch_size", 4], 3, [4, 3]),  # what is asked for is not asked of the memory
        ("the {red|blue} cat", ["--steps", "1,2", "--n_images", 3], 5, [5, 1, 5, 1]),
    ],
)
def test_as_many_at_once_as_memory_allows(run, sd1_folder, sizes, monkeypatch, tmp_path, prompt, options, most, wanted):
    monkeypatch.setattr(memory, "images_that_fit", lambda sd, shape, *args: min(most, shape.n_images))
    monkeypatch.setattr(memory, "fit", lambda *args, **kwargs: True)
    run("txt2image", prompt, "--model", sd1_folder, "--steps", 1, *options, "--output", tmp_path / "a.png").succeeded()
    assert sizes == wanted


def test_a_memory_limit_makes_fewer_images_at_once(run, sd1_folder, sizes, tmp_path):
    """And they are the same; the first run has room for all of them."""
    common = ["the {red|blue} cat", "--model", sd1_folder, "--steps", 1, "--seed", 1, "--cfg", 1, "--output"]
    run("txt2image", *common, tmp_path / "a.png").succeeded()
    run("txt2image", *common, tmp_path / "b.png", "--memory_limit", 0.015).succeeded()
    assert sizes[0] == 8 and len(sizes) > 2 and sum(sizes[1:]) == 8 and max(sizes[1:]) < 8
    for i in range(1, 9):
        assert np.abs(pixels(tmp_path / f"a_{i}.png") - pixels(tmp_path / f"b_{i}.png")).max() <= 1


def test_what_holds_for_many_batches_is_said_once(run, sd1_folder, tmp_path):
    options = ["--model", sd1_folder, "--steps", "1,2,3", "--cfg", 1, "--negative_prompt", "blue"]
    done = run("txt2image", PROMPT, *options, "--output", tmp_path / "a.png").succeeded()
    assert len(done.remarks) == 1 and "the negative prompt has no effect" in done.remarks[0]
