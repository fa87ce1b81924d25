"""Samplers, schedules and custom steps as arguments of a pipeline."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest

from checkpoints import SCALED, Recorder, both, make
from oracle import nchw, normal, picture, relative_error
from stable_diffusion import SAMPLERS, StableDiffusion
from stable_diffusion.diffusion.samplers import dpmpp_2m, euler

PROMPT = "the red cat"
SMALL = {"latent_size": (4, 6), "seed": 1, "cfg_weight": 3.0}


def states(sd: StableDiffusion, **given) -> np.ndarray:
    return np.array(list(sd.generate_latents(PROMPT, **SMALL | given)))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_yield_a_step_whatever_the_evaluations(sd, sampler):
    assert len(states(sd, num_steps=3, sampler=sampler)) == sd.number_of_steps(3) == 3
    given = {"num_steps": 5, "strength": 0.7, "seed": 1, "sampler": sampler}
    latents = np.array(list(sd.generate_latents_from_image(picture(32, 48), PROMPT, **given)))
    assert len(latents) == sd.number_of_steps(5, 0.7) == 3 and np.isfinite(latents).all()


def test_a_name_can_say_the_schedule(sd):
    want = states(sd, num_steps=4, sampler="dpmpp_2m", schedule="karras")
    assert np.array_equal(states(sd, num_steps=4, sampler="DPM++ 2M Karras"), want)
    plain = states(sd, num_steps=4, sampler="DPM++ 2M")
    assert np.array_equal(states(sd, num_steps=4, sampler="DPM++ 2M Karras", schedule="default"), plain)
    assert not np.array_equal(want, plain)


def test_align_your_steps_has_a_table_for_xl(sd, xl):
    for model, name in ((sd, "align_your_steps"), (xl, "align_your_steps_xl")):
        want = states(model, num_steps=3, sampler="euler", schedule=name)
        for given in ({"sampler": "euler", "schedule": "align_your_steps"}, {"sampler": "Euler Align Your Steps"}):
            assert np.array_equal(states(model, num_steps=3, **given), want)


def test_given_timesteps_and_sigmas(sd):
    steps = sd.schedule.steps(4, "euler")
    want = states(sd, num_steps=4, sampler="euler")
    assert np.array_equal(states(sd, sampler="euler", timesteps=steps.timesteps), want)
    assert np.array_equal(states(sd, sampler="euler", sigmas=steps.sigmas, num_steps=4), want)
    plain = [float(sigma) for sigma in steps.sigmas]
    assert relative_error(states(sd, sampler="euler", sigmas=plain), want) <= 1e-5


@pytest.mark.parametrize(
    "given, message",
    [
        ({"timesteps": [900, 1], "sigmas": [1.0, 0.0]}, "timesteps, sigmas each say where the steps lie"),
        ({"sigmas": [1.0, 0.0], "schedule": "karras"}, "schedule, sigmas each say"),
        ({"sigmas": [1.0, 0.0], "num_steps": 2}, "num_steps 2 does not fit the 1 steps"),
        ({"timesteps": [1, 900]}, "must descend"),
        ({"schedule": "curly"}, "schedule 'curly' is unknown"),
        ({"sampler": "euler", "s_noise": 0.5}, "euler takes no s_noise"),
        ({"sampler": "lcm", "num_steps": 51}, "distilled for 50"),
    ],
)
def test_arguments_that_do_not_fit(sd, given, message):
    with pytest.raises(ValueError, match=message):
        sd.generate_latents(PROMPT, **given)


def test_a_function_is_a_sampler_and_gets_the_options_of_the_run(sd):
    assert np.array_equal(states(sd, num_steps=3, sampler=euler), states(sd, num_steps=3, sampler="euler"))
    options = {}

    def mine(denoise, x, sigmas, noise, *, velocity, target_sigmas, eta=1.0):
        options.update(velocity=velocity, target_sigmas=target_sigmas, eta=eta)
        yield from dpmpp_2m(denoise, x, sigmas, noise)

    states(sd, num_steps=3, sampler=mine, eta=0.25)
    assert options == {"velocity": False, "target_sigmas": list(sd.schedule.steps(3).sigmas[1:]), "eta": 0.25}


def test_every_image_and_step_draws_noise_of_its_own(sd):
    """It depends on the image's seed and the step alone, and none of it is the first latents' again."""
    draws = []

    def mine(denoise, x, sigmas, noise):
        draws.append([x, noise(0, x.shape), noise(1, x.shape)])
        yield from [x, x]

    for seed in (3, 4):
        states(sd, sampler=mine, n_images=2, num_steps=2, seed=seed)
    ours, next_seed = np.array(draws)
    assert np.array_equal(ours[:, 1], next_seed[:, 0])
    assert np.allclose(np.corrcoef(ours.reshape(6, -1)), np.eye(6), atol=0.5)


# --- the samplers that checkpoints ask for, in whole pipelines -------------------------------------------------------


def test_pndm(tmp_path):
    """Stable Diffusion 1's own scheduler; it shows both halves of the first step, and we yield the second."""
    scheduler = diffusers.PNDMScheduler(**SCALED, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    recorder, noise = Recorder(make(tmp_path / "sd", "sd1", scheduler)), normal(1, 8, 8, 4, seed=1)
    run = {"height": 64, "width": 64, "num_inference_steps": 6, "guidance_scale": 5.0}
    recorder(prompt=PROMPT, latents=nchw(noise), **run)
    sd = StableDiffusion(tmp_path / "sd")
    assert sd.sampler == "pndm"
    ours = sd.generate_latents(PROMPT, num_steps=6, cfg_weight=5.0, latent_size=(8, 8), latents=mx.array(noise))
    for x, want in zip(ours, recorder.steps[1:], strict=True):
        assert relative_error(x, want) <= 1e-3


KARRAS = diffusers.DPMSolverMultistepScheduler(**SCALED, use_karras_sigmas=True, algorithm_type="sde-dpmsolver++")


@pytest.mark.parametrize(
    "family, scheduler, sampler",
    [("lcm", diffusers.LCMScheduler(**SCALED), "lcm"), ("sd1", KARRAS, "dpmpp_2m_sde")],
    ids=["lcm", "karras"],
)
def test_stochastic(tmp_path, family, scheduler, sampler):
    pipe = make(tmp_path / "sd", family, scheduler)
    sd = StableDiffusion(tmp_path / "sd")
    assert sd.sampler == sampler
    both(pipe, sd, steps=4, negative_text="", added=True)
