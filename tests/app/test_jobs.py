"""Jobs and batches: which images the arguments ask for, in which order, with which seeds, and what is made at once."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import PROMPT, pixels
from stable_diffusion.app.batches import batches
from stable_diffusion.app.jobs import jobs
from stable_diffusion.cli import arguments
from stable_diffusion.cli import main as cli
from stable_diffusion.pipeline import StableDiffusion


def asked(*words, script: str = "txt2image") -> list[argparse.Namespace]:
    """The jobs of a command line, whose random seed is 100."""
    parser, args = arguments.read(script == "image2image", [str(word) for word in words])
    args.seed = 100 if args.seed is None else args.seed
    return jobs(parser, args)


def rows(found: list[argparse.Namespace], *names: str) -> list[tuple]:
    return [tuple(getattr(job, name) for name in names) for job in found]


@pytest.fixture
def prompts(tmp_path):
    """Write a file of prompts and return its path."""

    def write(*lines: str) -> Path:
        path = tmp_path / "prompts.txt"
        path.write_text("\n".join(lines))
        return path

    return write


# --- how many images, and their seeds --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, seeds",
    [
        ([], [(100, 101, 102, 103)]),
        (["--n_images", 2], [(100, 101)]),
        (["--seed", 7], [(7, 8, 9, 10)]),
        (["--seed", 0, "--n_images", 1], [(0,)]),
        (["--seed", 3, 1, 2], [(3, 1, 2)]),
        (["--seed", "5-7", "--n_images", 3], [(5, 6, 7)]),
        (["--steps", 10, 20], [(100,), (100,)]),
        (["--steps", 10, 20, "--n_images", 2, "--seed", 5], [(5, 6), (5, 6)]),
        (["--steps", 10, 20, "--seed", 5, 9], [(5, 9), (5, 9)]),
        (["--steps", 10], [(100, 101, 102, 103)]),
    ],
)
def test_how_many_images(words, seeds):
    found = asked("a", *words)
    assert rows(found, "seeds") == [(each,) for each in seeds]
    assert rows(found, "seed", "n_images") == [(each[0], len(each)) for each in seeds]


def test_each_job_has_one_value_of_each_flag():
    (job,) = asked(
        "in.png", "a", "--steps", 5, "--cfg", 3, "--sampler", "heun", "--strength", 0.5, script="image2image"
    )
    assert (job.steps, job.cfg, job.sampler, job.strength, job.lists) == (5, 3.0, "heun", 0.5, ())
    (job,) = asked("a")
    assert (job.steps, job.cfg, job.sampler, "strength" in job) == (None, None, None, False)


def test_the_first_list_changes_slowest_and_seeds_fastest():
    words = ["--sampler", "euler", "heun", "--seed", 1, 2, "--cfg", "3,5", "--steps", 4]
    found = asked("a", *words)
    assert rows(found, "sampler", "cfg") == [("euler", 3.0), ("euler", 5.0), ("heun", 3.0), ("heun", 5.0)]
    assert all(job.seeds == (1, 2) and job.lists == ("sampler", "seed", "cfg") and job.steps == 4 for job in found)
    assert rows(asked("a", "--cfg", "3,5", "--sampler", "euler", "heun"), "sampler", "cfg") == [
        ("euler", 3.0),
        ("heun", 3.0),
        ("euler", 5.0),
        ("heun", 5.0),
    ]
    words = ["in.png", "a", "--strength", 0.2, 0.4, "--steps", 1, 2]
    assert rows(asked(*words, script="image2image"), "strength", "steps") == [(0.2, 1), (0.2, 2), (0.4, 1), (0.4, 2)]


def test_prompts_stand_together_in_each_setting():
    found = asked("{red|blue} cat", "--steps", 1, 2, "--seed", 5, "--n_images", 2)
    assert rows(found, "steps", "prompt", "number", "seeds") == [
        (1, "red cat", 0, (5, 6)),
        (1, "blue cat", 1, (7, 8)),
        (2, "red cat", 0, (5, 6)),
        (2, "blue cat", 1, (7, 8)),
    ]
    found = asked("{red|blue} cat", "--steps", 1, 2, "--seed", 5, 9)
    assert rows(found, "prompt", "seeds") == [("red cat", (5, 9)), ("blue cat", (5, 9))] * 2


# --- lines of a file -------------------------------------------------------------------------------------------------


def test_lines_have_lists_of_their_own(prompts):
    file = prompts("one", "two --steps 3 4", "three --seed 7 --n_images 2", "four", "five --seed 1-2 --cfg 5", "six")
    found = asked("--prompt_file", file, "--seed", 20)
    assert rows(found, "prompt", "steps", "cfg", "seeds") == [
        ("one", None, None, (20, 21, 22, 23)),
        ("two", 3, None, (24,)),
        ("three", None, None, (7, 8)),
        ("four", None, None, (9, 10, 11, 12)),
        ("five", None, 5.0, (1, 2)),
        ("six", None, None, (3, 4, 5, 6)),
        ("two", 4, None, (24,)),
    ]
    assert [job.number for job in found] == [0, 1, 2, 3, 4, 5, 1]
    assert [job.lists for job in found] == [(), ("steps",), (), (), ("seed",), (), ("steps",)]


def test_lists_of_the_command_line_hold_for_each_line(prompts):
    file = prompts("one", "two --steps 9", "three --seed 7", "four --sampler heun --cfg 1,2")
    found = asked("--prompt_file", file, "--steps", 1, 2, "--seed", 3, 4)
    assert rows(found, "prompt", "steps", "cfg", "seeds", "lists") == [
        ("one", 1, None, (3, 4), ("steps", "seed")),
        ("two", 9, None, (3, 4), ("seed",)),
        ("three", 1, None, (7,), ("steps",)),
        ("four", 1, 1.0, (3, 4), ("steps", "seed", "cfg")),
        ("one", 2, None, (3, 4), ("steps", "seed")),
        ("three", 2, None, (7,), ("steps",)),
        ("four", 1, 2.0, (3, 4), ("steps", "seed", "cfg")),
        ("four", 2, 1.0, (3, 4), ("steps", "seed", "cfg")),
        ("four", 2, 2.0, (3, 4), ("steps", "seed", "cfg")),
    ]


def test_lines_that_are_refused(run, no_model, prompts):
    run("txt2image", "--prompt_file", prompts("a", "b --steps 3 x")).refused("line 2", "--steps", "'x'")
    run("txt2image", "--prompt_file", prompts("a --seed 1 2 --n_images 3")).refused("--n_images 3", "2 seeds")


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        ("a --seed 1 2 3 --n_images 2", ["--n_images 2 is not the number of the 3 seeds", "leave it out"]),
        ("a --seed 0-9998 --steps 1 2", ["more than 9999 images", "fewer values"]),
        ("a --n_images 5000 --steps 1 2", ["more than 9999 images"]),
        ("{a|b} --n_images 5000", ["more than 9999 images"]),
        ("a --sampler euler_a euler --eta 0.5", ["euler", "eta", "leave it out"]),
    ],
)
def test_what_is_refused(run, no_model, words, said):
    run("txt2image", *words.split(" ")).refused(*said)


def test_the_most_images():
    assert asked("a", "--seed", "0-9998")[0].n_images == 9999
    assert len(asked("a", "--steps", *range(1, 102), "--cfg", *range(99))) == 9999


# --- what is made at once --------------------------------------------------------------------------------------------


def made_at_once(found: list[argparse.Namespace], size: int | None) -> list[list[tuple]]:
    return [
        [(job.prompt, seed, job.steps) for job, seed in zip(batch.jobs, batch.seeds, strict=True)]
        for batch in batches(found, size)
    ]


def test_seeds_of_a_batch_need_not_count_on():
    assert made_at_once(asked("a", "--seed", 9, 1, 4, "--steps", 5), 2) == [[("a", 9, 5), ("a", 1, 5)], [("a", 4, 5)]]


def test_images_of_one_setting_fill_batches():
    found = asked("{a|b|c}", "--steps", 5, 6, "--seed", 1)
    assert made_at_once(found, 8) == [[("a", 1, s), ("b", 2, s), ("c", 3, s)] for s in (5, 6)]
    assert made_at_once(found, 2)[:2] == [[("a", 1, 5), ("b", 2, 5)], [("c", 3, 5)]]


# --- images ----------------------------------------------------------------------------------------------------------


def test_images_of_lists_are_those_of_single_runs(run, sd1_folder, tmp_path):
    """Bit for bit, each with a batch of its own."""
    common = ["--model", sd1_folder, "--width", 64, "--height", 64, "--batch_size", 1]
    lists = ["--sampler", "euler", "DPM++ 2M Karras", "--steps", 1, 2, "--seed", 8, 3]
    done = run("txt2image", PROMPT, *common, *lists, "--output", tmp_path / "all.png").succeeded()
    together = [tuple(line.split(" seed ")) for line in done.out if " seed " in line]
    singles = [(s, n, seed) for s in ("euler", "DPM++ 2M Karras") for n in (1, 2) for seed in (8, 3)]
    assert [int(seed) for _, seed in together] == [seed for *_, seed in singles]
    for (path, _), (sampler, steps, seed) in zip(together, singles, strict=True):
        one = ["--sampler", sampler, "--steps", steps, "--seed", seed, "--n_images", 1]
        single = run("txt2image", PROMPT, *common, *one, "--output", tmp_path / "one.png").succeeded().out[0]
        assert np.array_equal(pixels(Path(single.split(" seed ")[0])), pixels(Path(path)))


def test_strengths_are_those_of_single_runs(run, sd1_folder, tmp_path):
    Image.effect_noise((64, 64), 60).save(tmp_path / "in.png")
    common = [tmp_path / "in.png", PROMPT, "--model", sd1_folder, "--steps", 4, "--seed", 1]
    out = run("image2image", *common, "--strength", 0.5, 1, "--output", tmp_path / "all.png").succeeded().out
    together = [pixels(Path(line.split(" seed ")[0])) for line in out if " seed " in line]
    assert len(together) == 2 and not np.array_equal(*together)
    for image, strength in zip(together, (0.5, 1), strict=True):
        one = ["--strength", strength, "--n_images", 1, "--output", tmp_path / "one.png"]
        single = run("image2image", *common, *one).succeeded().out[0]
        assert np.array_equal(pixels(Path(single.split(" seed ")[0])), image)


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
    "options, most, wanted",
    [
        ([], 3, [3, 3, 1]),
        ([], 7, [7]),
        (["--batch_size", 4], 3, [4, 3]),  # what is asked for is not asked of the memory
        (["--steps", 1, 2, "--n_images", 3], 5, [5, 1, 5, 1]),
    ],
)
def test_as_many_at_once_as_memory_allows(run, sd1_folder, sizes, monkeypatch, tmp_path, options, most, wanted):
    monkeypatch.setattr(cli, "images_at_once", lambda sd, allowed, n_images, **more: min(most, n_images))
    monkeypatch.setattr(cli, "_plan_memory", lambda *args: True)
    options = [*([] if "--n_images" in options else ["--seed", "1-7"]), *options]
    prompt = "the {red|blue} cat" if "--n_images" in options else PROMPT
    run("txt2image", prompt, "--model", sd1_folder, "--steps", 1, *options, "--output", tmp_path / "a.png").succeeded()
    assert sizes == wanted


def test_a_memory_limit_makes_fewer_images_at_once(run, sd1_folder, sizes, tmp_path):
    """And they are the same; the first run has room for all of them."""
    common = ["--model", sd1_folder, "--steps", 1, "--seed", 1, "--cfg", 1]
    run("txt2image", "the {red|blue} cat", *common, "--output", tmp_path / "a.png").succeeded()
    limit = ["--memory_limit", 0.015, "--output", tmp_path / "b.png"]
    run("txt2image", "the {red|blue} cat", *common, *limit).succeeded()
    assert sizes[0] == 8 and len(sizes) > 2 and sum(sizes[1:]) == 8 and max(sizes[1:]) < 8
    for i in range(1, 9):
        assert np.abs(pixels(tmp_path / f"a_{i}.png") - pixels(tmp_path / f"b_{i}.png")).max() <= 1


def test_images_at_once_where_nothing_can_be_said_of_memory(run, sd1_folder, sizes, monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise TypeError("the graph has changed")

    monkeypatch.setattr(cli, "images_at_once", fails)
    run("txt2image", PROMPT, "--model", sd1_folder, "--steps", 1, "--n_images", 6, "--output", tmp_path / "a.png")
    assert sizes == [4, 2]


def test_what_holds_for_many_batches_is_said_once(run, sd1_folder, tmp_path):
    options = ["--model", sd1_folder, "--steps", 1, 2, 3, "--cfg", 1, "--negative_prompt", "blue"]
    done = run("txt2image", PROMPT, *options, "--output", tmp_path / "a.png").succeeded()
    assert len(done.remarks) == 1 and "the negative prompt has no effect" in done.remarks[0]
