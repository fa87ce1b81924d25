"""Samplers, schedules and custom steps as arguments of a pipeline."""

import diffusers
import mlx.core as mx
import numpy as np
import pytest

from checkpoints import SCALED, both, make
from oracle import picture, relative_error
from stable_diffusion import SAMPLERS, StableDiffusion
from stable_diffusion.diffusion.samplers import dpmpp_2m, euler
from stable_diffusion.options import Options
from stable_diffusion.planning import RunDefaults, plan_run

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


DMD2 = {"sampler": "lcm", "cfg_weight": 0.0}
ONE, FOUR = DMD2 | {"num_steps": 1, "timesteps": (399,)}, DMD2 | {"num_steps": 4, "spacing": "trailing"}
TCD = {"sampler": "tcd", "cfg_weight": 0.0, "num_steps": 1, "eta": 1.0}


@pytest.mark.parametrize(
    "defaults, num_steps, given, expected",
    [
        (ONE, None, {}, (399,)),
        (ONE, None, {"sampler": "LCM"}, (399,)),
        (ONE, 2, {}, (999, 499)),  # all that is chosen wins
        (ONE, None, {"sampler": "euler"}, (1,)),
        (ONE, None, {"timesteps": (800,)}, (800,)),
        (FOUR, None, {}, (999, 749, 499, 249)),
        (FOUR, 2, {"sampler": "lcm"}, (999, 499)),
        (FOUR, None, {"timesteps": (800, 200)}, (800, 200)),
        (TCD, None, {"sampler": "euler", "spacing": "trailing"}, (999,)),  # which takes no eta
    ],
)
def test_defaults_of_models_for_few_steps(sd, defaults, num_steps, given, expected):
    settings = {"num_steps": num_steps, "seeds": (1,)}
    run = plan_run(sd.schedule, Options(**given), RunDefaults(**defaults), **settings)
    assert run.steps.timesteps == expected


@pytest.mark.parametrize(
    "given, message",
    [
        ({"timesteps": [900, 1], "sigmas": [1.0, 0.0]}, "timesteps, sigmas each define the steps"),
        ({"sigmas": [1.0, 0.0], "schedule": "karras"}, "schedule, sigmas each define"),
        ({"sigmas": [1.0, 0.0], "num_steps": 2}, "num_steps 2 does not fit the 1 steps"),
        ({"timesteps": [1, 900]}, "must descend"),
        ({"schedule": "curly"}, "schedule 'curly' is unknown"),
        ({"sampler": "lms", "s_noise": 0.5}, "lms takes no s_noise"),
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


@pytest.mark.parametrize("sampler", [name for name, row in SAMPLERS.items() if "s_noise" in row.option_names])
def test_s_noise_is_a_factor_on_the_noise(sd, sampler):
    given = {name: 0.7 for name in ("eta", "s_churn") if name in SAMPLERS[sampler].option_names}
    half, of_half, quarter = (
        states(sd, num_steps=3, sampler=sampler, noise=lambda i, s, c=c: c * mx.ones(s), s_noise=f, **given)
        for c, f in ((1.0, 0.5), (0.5, 1.0), (0.5, 0.5))
    )
    assert np.array_equal(half, of_half) and relative_error(quarter, half) > 1e-3


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


def test_a_consistency_model(tmp_path):
    pipe = make(tmp_path / "sd", "lcm", diffusers.LCMScheduler(**SCALED))
    sd = StableDiffusion(tmp_path / "sd")
    assert sd.sampler == "lcm"
    both(pipe, sd, steps=4, negative_text="", added=True)
