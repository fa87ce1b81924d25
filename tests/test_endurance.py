"""A program that makes images all day: what is in use after many runs is what was after the second."""

import gc

import mlx.core as mx
import pytest

from command_line import PROMPT
from stable_diffusion import StableDiffusion


@pytest.fixture(autouse=True)
def only_what_is_new():
    """Python's collector looks at nothing that was there before the test: at no library, which takes it long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def held() -> tuple[int, int]:
    """(bytes of MLX's arrays, objects of Python) that something holds on to."""
    gc.collect()
    return mx.get_active_memory(), len(gc.get_objects())


def assert_steady(counts: list[tuple[int, int]]) -> None:
    """What the first run leaves (tables, caches of functions) may stay; after the second nothing is added."""
    memory, objects = zip(*counts[1:], strict=True)
    print("bytes", memory[0], max(memory), "objects", objects[0], objects[-1])
    assert max(memory) <= 1.01 * memory[0]
    assert objects[-1] - objects[0] < 2 * (len(objects) - 1)  # two in a run would be a leak


def test_runs_of_the_api(sd1_folder):
    sd = StableDiffusion(sd1_folder)
    counts = []
    for seed in range(40):
        *_, x = sd.generate_latents(PROMPT, num_steps=1, latent_size=(8, 8), seed=seed)
        mx.eval(sd.decode(x))
        del x
        counts.append(held())
    assert_steady(counts)


def test_models_that_come_and_go(sd1_folder):
    counts, (before, _) = [], held()
    for _ in range(6):
        sd = StableDiffusion(sd1_folder)
        sd.ensure_models_are_loaded()
        del sd
        counts.append(held())
    assert_steady(counts)
    assert counts[-1][0] - before < 1e6  # their weights are gone with them


@pytest.mark.parametrize(
    "count, options",
    [(6, ()), (6, ("--low_memory", "--hires", 1.25)), (5, ("--steps", 2000))],
    ids=["plain", "two passes", "refused"],
)
def test_runs_of_the_script(run, sd1_folder, tmp_path, count, options):
    given = ["--model", sd1_folder, "--width", 64, "--height", 64, "--steps", 1, "--n_images", 1]
    counts = []
    for seed in range(count):
        done = run("txt2image", PROMPT, *given, "--seed", seed, *options, "--overwrite", "--output", tmp_path / "o.png")
        done.refused("2000") if 2000 in options else done.succeeded()
        counts.append(held())
    assert_steady(counts)
