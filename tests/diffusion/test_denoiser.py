"""D(x, sigma): rows in parts, the step and timestep of a level, and the wrappers for masks."""

import math

import mlx.core as mx
import numpy as np
import pytest

from oracle import normal, relative_error
from peaks import peaks
from stable_diffusion.diffusion.denoiser import Denoiser, InpaintMask, inpainting
from stable_diffusion.diffusion.guidance import guidance_batches
from stable_diffusion.text.encode import Conditioning, PromptRow


def table(prompts: int, rows_each: int, seed: int) -> Conditioning:
    rows = tuple(PromptRow(prompt, 0.5 + part) for prompt in range(prompts) for part in range(rows_each))
    return Conditioning(mx.array(normal(len(rows), 77, 32, seed=seed)), rows=rows)


@pytest.mark.parametrize("rows_at_once, with_negative", [(1, True), (4, True), (9, False)])
def test_a_batch_in_parts_gives_the_same(sd, unet, rows_at_once, with_negative):
    """Two images, prompts of two parts: up to six rows a step."""
    steps = sd.schedule.steps(3)
    negative, total = (table(1, 1, seed=1), 6) if with_negative else (None, 4)
    batches = guidance_batches(3, 2, table(2, 2, seed=0), negative, 5.0)
    x = mx.array(normal(2, 6, 8, 4, seed=2))
    together = Denoiser(unet, sd.schedule, steps, mx.float32, batches)(x, steps.sigmas[0])
    parts = Denoiser(unet, sd.schedule, steps, mx.float32, batches, rows_at_once=rows_at_once)(x, steps.sigmas[0])
    assert relative_error(parts, together) <= 1e-4
    first, *counts = [call.rows for call in unet.calls]
    assert first == sum(counts) == total and max(counts) == min(rows_at_once, total)


def test_parts_are_computed_one_after_the_other(sd):
    """Rows one by one peak at about the memory of one. There are 64, or the pieces of attention would count most."""
    steps = sd.schedule.steps(3)
    batches = guidance_batches(3, 32, table(32, 1, seed=0), table(32, 1, seed=1), 5.0)
    x = mx.array(normal(32, 24, 24, 4, seed=2))
    mx.eval(sd.unet.parameters())

    def peak(rows_at_once: int | None) -> int:
        denoise = Denoiser(sd.unet, sd.schedule, steps, mx.float32, batches, rows_at_once=rows_at_once)
        return max(peaks(denoise, x, steps.sigmas[0], runs=3))

    assert peak(1) < 0.4 * peak(None)


def test_the_timestep_of_a_level_and_the_rows_of_a_step(sd, unet):
    """A level of the run brings its timestep; a plain float gets the one that it has in the schedule."""
    steps = sd.schedule.steps(4, "multistep", schedule="karras")  # its timesteps are rounded
    batches = guidance_batches(4, 1, table(1, 1, seed=0), table(1, 1, seed=1), 5.0, interval=(0.5, 1.0))
    denoise = Denoiser(unet, sd.schedule, steps, mx.float32, batches)
    x = mx.array(normal(1, 6, 8, 4, seed=2))
    second, third = steps.sigmas[1:3]
    levels = [second, float(second), math.sqrt(second * third), third, float(third)]
    for level, step in zip(levels, [1, 1, 1, 2, 1], strict=True):
        denoise(x, level, step)
    assert [call.rows for call in unet.calls] == [1, 1, 1, 2, 1]
    timesteps = [second.timestep, *(sd.schedule.timestep(level) for level in levels[1:3])]
    timesteps += [third.timestep, sd.schedule.timestep(float(third))]
    assert len(set(timesteps)) == 5
    for call, t in zip(unet.calls, timesteps, strict=True):
        assert mx.array_equal(call.temb, unet.embed_time(t, mx.float32))


def test_a_mask_keeps_its_part_under_noise(sd):
    """The first latents of a run are left as they are, and no computed level is taken for its first."""
    steps = sd.schedule.steps(3)
    x0, noise, x, estimate = (mx.array(normal(1, 2, 2, 4, seed=seed)) for seed in range(4))
    mask = mx.array([[1.0, 0.0], [0.5, 1.0]])[None, ..., None]
    inputs = []

    def denoise(x: mx.array, sigma: float, step: int) -> mx.array:
        inputs.append(x)
        return estimate

    kept = inpainting(denoise, InpaintMask(x0, mask, noise))
    first, second, *_ = steps.sigmas
    for sigma in (first, second, float(first)):
        assert relative_error(kept(x, sigma), mask * estimate + (1 - mask) * x0) <= 1e-6
    noised = [mask * x + (1 - mask) * (x0 + sigma * noise) for sigma in (second, float(first))]
    for have, want in zip(inputs, [x, *noised], strict=True):
        assert np.array_equal(have, want)
