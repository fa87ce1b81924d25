"""Guidance only where it acts: outside its interval the UNet is asked for the prompt alone; and it in parts."""

import mlx.core as mx
import numpy as np
import pytest

from oracle import normal, relative_error
from peaks import peaks
from stable_diffusion import StableDiffusion
from stable_diffusion.diffusion.denoiser import denoiser
from stable_diffusion.diffusion.guidance import in_parts, stages
from stable_diffusion.text.encode import Conditioning, Row

PROMPT = "the red cat"
SMALL = {"num_steps": 4, "latent_size": (6, 8), "seed": 3}
GUIDED = {"cfg_weight": 7.0, "negative_text": "blue"}


@pytest.fixture(scope="module")
def sd(sd1_folder) -> StableDiffusion:
    return StableDiffusion(sd1_folder)


@pytest.fixture
def asked(sd):
    """How many rows the UNet is asked, call by call."""
    rows = []
    unet, sd.unet = sd.unet, lambda x, *a, **k: rows.append(len(x)) or unet(x, *a, **k)
    yield rows
    sd.unet = unet


def last(latents) -> np.ndarray:
    return np.array(list(latents)[-1])


def test_an_interval_of_all_steps_is_ordinary_guidance(sd, asked):
    plain = last(sd.generate_latents(PROMPT, **GUIDED, **SMALL))
    whole = last(sd.generate_latents(PROMPT, guidance_interval=(0, 1), **GUIDED, **SMALL))
    assert np.array_equal(plain, whole) and asked == [2] * 8


@pytest.mark.parametrize("interval", [(0, 0), (0.5, 0.5), (1, 1)])
def test_an_empty_interval_is_no_guidance(sd, asked, interval):
    none = last(sd.generate_latents(PROMPT, guidance_interval=interval, **GUIDED, **SMALL))
    plain = last(sd.generate_latents(PROMPT, cfg_weight=1.0, **SMALL))
    assert np.array_equal(none, plain) and asked == [1] * 8


@pytest.mark.parametrize(
    "interval, rows",
    [((0.25, 0.75), [1, 2, 2, 1]), ((0, 0.5), [2, 2, 1, 1]), ((0.3, 1), [1, 1, 2, 2]), ((0.2, 0.3), [1, 2, 1, 1])],
)
def test_steps_outside_the_interval_ask_for_the_prompt_alone(sd, asked, interval, rows):
    made = [np.array(x) for x in sd.generate_latents(PROMPT, guidance_interval=interval, **GUIDED, **SMALL)]
    assert asked == rows
    # Up to the first step that differs from a run's, the latents are that run's.
    other = {"cfg_weight": 1.0} if rows[0] == 1 else GUIDED
    want = [np.array(x) for x in sd.generate_latents(PROMPT, **other, **SMALL)]
    same = next(i for i, count in enumerate(rows) if count != rows[0])
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(made[:same], want[:same], strict=True))
    assert relative_error(made[same], want[same]) > 1e-2


def test_the_interval_is_of_the_steps_that_an_image_takes(sd, asked):
    image = mx.array(np.clip(normal(48, 64, 3, seed=0, scale=0.3), -1, 1))
    run = {"strength": 0.5, "num_steps": 8, "seed": 1, "guidance_interval": (0.5, 1)}
    last(sd.generate_latents_from_image(image, PROMPT, **GUIDED, **run))
    assert asked == [1, 1, 2, 2]


@pytest.mark.parametrize("interval", [(-0.1, 1), (0, 1.1), (0.6, 0.5), (0.5,), (float("nan"), 1)])
def test_intervals_that_make_no_sense(sd, interval):
    with pytest.raises(ValueError, match=r"guidance_interval .* 0 <= start <= end <= 1"):
        sd.generate_latents(PROMPT, guidance_interval=interval, **SMALL)


# --- in parts --------------------------------------------------------------------------------------------------------


def conditioning(prompts: int, rows_each: int, seed: int) -> Conditioning:
    rows = tuple(Row(prompt, 0.5 + part) for prompt in range(prompts) for part in range(rows_each))
    return Conditioning(mx.array(normal(len(rows), 77, 32, seed=seed)), rows=rows)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("with_negative", [True, False])
def test_a_stage_in_parts_gives_the_same(sd, at_once, with_negative):
    """Two images, prompts of two parts: up to six questions a step, whose answers are mixed."""
    negative = conditioning(1, 1, seed=1) if with_negative else None
    steps = sd.schedule.steps(3)
    asked = stages(3, 2, conditioning(2, 2, seed=0), negative, 5.0)
    total = 6 if with_negative else 4
    counts = []

    def unet(x, *args, **options):
        counts.append(len(x))
        return sd.unet(x, *args, **options)

    x = mx.array(normal(2, 6, 8, 4, seed=2))
    together = denoiser(unet, sd.schedule, steps, mx.float32, asked)(x, steps.sigmas[0])
    parts = denoiser(unet, sd.schedule, steps, mx.float32, asked, rows_at_once=at_once)(x, steps.sigmas[0])
    assert relative_error(parts, together) <= 1e-5
    assert counts[0] == total and sum(counts[1:]) == total and max(counts[1:]) == min(at_once, total)
    assert [len(part.images) for part in in_parts(asked[0], None)] == [total]


def test_parts_are_computed_one_after_the_other(sd):
    """Four questions one by one peak at about the memory of one."""
    steps = sd.schedule.steps(3)
    asked = stages(3, 2, conditioning(2, 1, seed=0), conditioning(2, 1, seed=1), 5.0)
    x = mx.array(normal(2, 24, 24, 4, seed=2))
    mx.eval(sd.unet.parameters())

    def peak(rows: int | None) -> int:
        predict = denoiser(sd.unet, sd.schedule, steps, mx.float32, asked, rows_at_once=rows)
        return max(peaks(predict, x, steps.sigmas[0], runs=10))

    assert peak(1) < 0.4 * peak(None)
