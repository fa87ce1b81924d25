"""Timesteps and noise levels against diffusers, for every spacing and number of steps."""

import math
from itertools import islice

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch

from stable_diffusion.diffusion.choice import run_options
from stable_diffusion.diffusion.samplers import SAMPLERS
from stable_diffusion.diffusion.schedule import SCHEDULES, SPACING_RULES, SPACINGS, Schedule, ScheduleConfig
from stable_diffusion.models.config import readable

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": SCALED,
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.001 * (i + 1) for i in range(50)], "num_train_timesteps": 50},
    "short": SCALED | {"num_train_timesteps": 7},
}


def schedule(**options) -> Schedule:
    return Schedule(ScheduleConfig.from_dict(options))


@pytest.mark.parametrize("name", BETAS)
def test_training_table(name):
    oracle = diffusers.DDIMScheduler(**BETAS[name]).alphas_cumprod.double().numpy()
    ours = schedule(**BETAS[name])
    np.testing.assert_allclose(ours.alphas_cumprod, oracle, rtol=1e-6)
    np.testing.assert_allclose(ours.sigmas, np.sqrt((1 - oracle) / oracle), rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_terminal_snr(name):
    """The product is compared, not sigma: it ends in 0, where the last bit of a root is worth 1e-4 of sigma."""
    oracle = diffusers.DDIMScheduler(**BETAS[name], rescale_betas_zero_snr=True).alphas_cumprod.double().numpy()
    ours = schedule(**BETAS[name], rescale_betas_zero_snr=True)
    assert ours.alphas_cumprod[-1] == oracle[-1] == 0
    np.testing.assert_allclose(ours.alphas_cumprod, oracle, rtol=0, atol=1e-6)
    assert ours.steps(3, "ddim", "trailing").sigmas[0] == 2.0**32
    euler = diffusers.EulerDiscreteScheduler(**BETAS[name], rescale_betas_zero_snr=True)
    assert ours.steps(3, "euler", "trailing").sigmas[0] == pytest.approx(float(euler.sigmas[0]), rel=1e-6)


FAMILIES = {
    "euler": diffusers.EulerDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "multistep": diffusers.DPMSolverMultistepScheduler,
}


@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 1), ("linspace", 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_timesteps_and_sigmas_of_every_number_of_steps(family, spacing, offset):
    options = SCALED | {"timestep_spacing": spacing, "steps_offset": offset}
    oracle, ours = FAMILIES[family](**options), schedule(**options)
    compared = 0
    for count in range(1, 1001):
        oracle.set_timesteps(count)
        want = oracle.timesteps.double().numpy()
        steps = ours.steps(count, family)
        if want[0] > 999 and count + (family == "multistep") == 1000:  # of a timestep beyond the last; here none is
            assert np.array_equal(steps.timesteps, want - 1), count
            continue
        if count == 1000 and len(set(want)) < 1000:  # diffusers repeats timesteps here; a repeated sigma has no step
            assert family == "multistep" and spacing != "trailing"
            continue
        if len(want) == count + 1:  # a rounding error gives diffusers one step more here, at timestep -1
            assert want[-1] == -1
            want = want[:-1]
        assert np.array_equal(steps.timesteps, want), count
        if hasattr(oracle, "sigmas") and len(oracle.sigmas) == count + 1:
            np.testing.assert_allclose(steps.sigmas, oracle.sigmas.double().numpy(), rtol=1e-6)
            compared += 1
            scale = ours.initial_scale(steps, family)
            if family == "euler":
                assert scale == pytest.approx(float(oracle.init_noise_sigma), rel=1e-6)
            else:  # its latents start with variance 1 in variance-preserving scale
                assert scale / np.sqrt(steps.sigmas[0] ** 2 + 1) == pytest.approx(1.0)
    assert compared > 900 or family == "ddim"


@pytest.mark.parametrize("family", SPACING_RULES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_sigmas_descend_to_the_end(name, family):
    """Strictly, to 0. DEIS, PNDM and TCD end at the first training sigma; where their grid has it they stand still."""
    ours, is_distilled = schedule(**SCALED), family in ("lcm", "tcd")
    counts = range(1, 51) if is_distilled else (*range(1, 30), 50, 100, 333, 500, 999, 1000)
    for spacing in (None,) if is_distilled else SPACINGS:
        for count in counts:
            steps = ours.steps(count, family, spacing, name)
            assert len(steps) == count and len(steps.sigmas) == count + 1 and steps.total == count
            assert all(a > b for a, b in zip(steps.sigmas[:-1], steps.sigmas[1:-1], strict=False)), count
            assert all(0 <= t <= 999 for t in steps.timesteps)
            assert all(a >= b for a, b in zip(steps.timesteps, steps.timesteps[1:], strict=False))
            if SPACING_RULES[family].final_sigma == "first" or not SPACING_RULES[family].set_alpha_to_one:
                assert steps.sigmas[-1] == ours.sigmas[0] <= steps.sigmas[-2] * (1 + 1e-6) or name.startswith("align")
            else:
                assert 0 == steps.sigmas[-1] < steps.sigmas[-2]


CURVED = {"euler": diffusers.EulerDiscreteScheduler, "multistep": diffusers.UniPCMultistepScheduler}


@pytest.mark.parametrize("curve", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("family", CURVED)
def test_curves(family, curve):
    options = SCALED | {f"use_{curve}_sigmas": True}
    oracle, ours = CURVED[family](**options), schedule(**options)
    for count in (*range(1, 60), 100, 400):
        oracle.set_timesteps(count)
        steps = ours.steps(count, family)
        np.testing.assert_allclose(steps.sigmas, oracle.sigmas.double().numpy(), rtol=1e-6)
        np.testing.assert_allclose(steps.timesteps, oracle.timesteps.double().numpy(), rtol=0, atol=2e-3)
        assert steps == schedule(**SCALED).steps(count, family, None, curve)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("curve", ["scaled_linear", "squaredcos_cap_v2"])
def test_timesteps_of_a_clipped_lambda(curve, spacing):
    """With "trailing" spacing the steps that the clipped noise would take are not made."""
    options = {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": spacing, "lambda_min_clipped": -2.0}
    options |= SCALED | {"beta_schedule": curve}
    oracle, ours = diffusers.DPMSolverMultistepScheduler(**options), schedule(**options)
    for count in range(1, 60):
        oracle.set_timesteps(count)
        steps = ours.steps(count, "multistep")
        assert np.array_equal(steps.timesteps, oracle.timesteps.numpy()) and steps.total == len(steps) <= count
    assert len(steps) < count or spacing != "trailing"
    with pytest.raises(ValueError, match=r"choose 1 to (8|9)\d\d$"):
        ours.steps(1000, "multistep")


def test_sgm_uniform_is_even_in_time_and_stops_one_short():
    ours = schedule(**SCALED)
    steps = ours.steps(4, schedule="sgm_uniform")
    assert steps.timesteps == pytest.approx([999, 749.25, 499.5, 249.75])
    logs = np.log(ours.sigmas)
    np.testing.assert_allclose(steps.sigmas[:-1], np.exp(np.interp(steps.timesteps, range(1000), logs)), rtol=1e-6)


@pytest.mark.parametrize("offset", [0, 1, 9])
@pytest.mark.parametrize("name", SAMPLERS)
def test_leading_steps_on_every_timestep(name, offset):
    """An offset gives way where it has no room: all levels differ, and nothing is divided by 0."""
    ours, sampler = schedule(**SCALED, steps_offset=offset, timestep_spacing="leading"), SAMPLERS[name]
    for count in (499, 500, 999, 1000):
        steps = ours.steps(count, sampler.spacing_rule, "leading")
        assert max(steps.timesteps) <= 999 and len(set(steps.sigmas[:-1])) == count
        options = run_options(sampler, ours, steps)
        states = sampler.run(lambda x, sigma: 0.1 * x, mx.ones(1), steps.sigmas, lambda *_: mx.zeros(1), **options)
        assert all(math.isfinite(x.item()) for x in islice(states, 3))


@pytest.mark.parametrize("count", [2, 3, 7, 20, 25, 50])
def test_schedules_of_comfyui(count):
    """Its formulas (``comfy/samplers.py``), for models of 1000 timesteps."""
    ours, table = schedule(**SCALED), np.array(schedule(**SCALED).sigmas)
    half, rest = count // 2, count - count // 2
    diff = half - 0.025 * count
    square = diff / (half * rest**2) if half else 0
    line = 0.025 / half - 2 * diff / rest**2 if half else 0
    parabola = [square * i**2 + line * i + square * half**2 for i in range(half, count)]
    ramp = np.linspace(0, 1, count)
    wanted = {
        "simple": [table[-(1 + int(i * (1000 / count)))] for i in range(count)],
        "ddim_uniform": table[1 :: 1000 // count][:count][::-1],
        "kl_optimal": np.tan(ramp * np.arctan(table[0]) + (1 - ramp) * np.arctan(table[-1])),
        "linear_quadratic": (1 - np.array([i * 0.025 / half for i in range(half)] + parabola)) * table[-1],
    }
    for name, levels in wanted.items():
        np.testing.assert_allclose(ours.steps(count, spacing="linspace", schedule=name).sigmas, [*levels, 0], rtol=1e-6)


@pytest.mark.parametrize("name, key", [("", "StableDiffusion"), ("_xl", "StableDiffusionXL")])
def test_align_your_steps(name, key):
    tables = diffusers.schedulers.AysSchedules
    ours = schedule(**SCALED)
    steps = ours.steps(10, schedule=f"align_your_steps{name}")
    assert steps.sigmas == pytest.approx(tables[f"{key}Sigmas"])
    assert steps.timesteps == pytest.approx(tables[f"{key}Timesteps"], abs=1.5)
    double = ours.steps(20, schedule=f"align_your_steps{name}").sigmas
    assert double[:-1:2] == pytest.approx(steps.sigmas[:-1])
    assert double[1] == pytest.approx((steps.sigmas[0] * steps.sigmas[1]) ** 0.5)


@pytest.mark.parametrize("original", [50, 20])
def test_distilled_timesteps(original):
    oracle = diffusers.LCMScheduler(original_inference_steps=original)
    ours = schedule(**SCALED, original_inference_steps=original)
    for count in range(1, original + 1):
        oracle.set_timesteps(count)
        assert np.array_equal(ours.steps(count, "lcm").timesteps, oracle.timesteps.numpy())
    with pytest.raises(ValueError, match=f"the model was distilled for {original}; choose 1 to {original}"):
        ours.steps(original + 1, "lcm")
    assert ours.steps(original + 1, "lcm", "trailing").timesteps[0] == 999


def test_leaps_of_tcd():
    """The product with 1 - gamma is rounded down; in float32 at diffusers, where 0.7 * 500 is 350 and not below."""
    ours = schedule(**SCALED)
    for gamma in (0.0, 0.3, 0.7, 1.0):
        t = torch.arange(999, -1, -1)
        want = torch.floor((1 - gamma) * t).long().tolist()[1:]
        steps = ours.at_timesteps(t.tolist())
        assert ours.tcd_sigmas(steps, gamma)[:-1] == [ours.sigmas[t] for t in want], gamma


@pytest.mark.parametrize("bad", [[], [1000, 1], [5, 5], [1, 5], [5, -1]])
def test_timesteps_descend_within_the_training(bad):
    with pytest.raises(ValueError, match="must descend and lie in 0"):
        schedule(**SCALED).at_timesteps(bad)


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, 1.0], [1.0, -0.1]])
def test_sigmas_descend_to_an_end(bad):
    with pytest.raises(ValueError, match="must descend and have at least two"):
        schedule(**SCALED).at_sigmas(bad)


# --- what a checkpoint says of its scheduler -------------------------------------------------------------------------

NONSENSE = ("timestep_type", "final_sigmas_type", "beta_schedule", "prediction_type")
REFUSED = [
    *(({key: "nonsense"}, f"{key}='nonsense' is not supported") for key in (*NONSENSE, "timestep_spacing")),
    (
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        "only one of use_karras_sigmas, use_beta_sigmas can be",
    ),
    ({"use_flow_sigmas": True}, "use_flow_sigmas=True is not supported"),
    ({"beta_start": "x"}, "beta_start='x' must be a finite number"),
    (
        {"num_train_timesteps": 2**63},
        "num_train_timesteps=9223372036854775808 must be a whole number from 1 to 100,000",
    ),
    ({"num_train_timesteps": [1000]}, "num_train_timesteps=.*must be a whole number"),
    ({"beta_start": 5}, "beta 5 must lie in 0"),
    ({"_class_name": "EulerDiscreteScheduler", "sigma_min": 0}, "sigma_min=0 must lie between 0 and sigma_max=None"),
    (
        {"_class_name": "UniPCMultistepScheduler", "sigma_min": 2.5, "sigma_max": 2},
        "sigma_min=2.5 must lie between 0 and sigma_max=2",
    ),
    ({"beta_schedule": "x" * 9**6}, "beta_schedule='x{56}... is not supported"),
    ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio=1.5 must lie in 0"),
    ({"trained_betas": []}, "invalid value"),
]


@pytest.mark.parametrize("raw, message", REFUSED)
def test_what_is_not_computed_is_refused_in_one_line(raw, message):
    with pytest.raises(ValueError, match=message) as error, readable("scheduler config"):
        schedule(**raw).steps(1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "raw, missing",
    [
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "solver_type": "heun"}, 0),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4, "solver_type": "heun"}, 1),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, 1),
        ({"_class_name": "EulerDiscreteScheduler", "solver_order": 3, "skip_prk_steps": False}, 0),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, 0),
        ({"use_beta_sigmas": True, "use_karras_sigmas": False}, 0),
    ],
)
def test_settings_that_are_not_computed(raw, missing):
    config = ScheduleConfig.from_dict(raw)
    settings = [f"{key}={value!r}" for key, value in raw.items() if key != "_class_name"]
    assert config.missing == tuple(settings[:missing])
    assert config.sigma_schedule == ("beta" if "use_beta_sigmas" in raw else "default")


# --- a level of a run and a computed one -----------------------------------------------------------------------------


def test_sigma_and_timestep_are_inverse():
    ours = schedule(**SCALED)
    for t in (0.0, 0.5, 333.3, 999.0):
        low, high = int(t), min(int(t) + 1, 999)
        sigma = ours.sigmas[low] ** (1 - t % 1) * ours.sigmas[high] ** (t % 1)
        assert ours.timestep(sigma) == pytest.approx(t, abs=1e-5)
    assert ours.timestep(0.0) == 0 and ours.timestep(1e9) == 999


def test_the_last_steps_of_a_run():
    steps = schedule(**SCALED).steps(10, "ddim")
    last = steps.last(3)
    assert last.timesteps == steps.timesteps[7:] and last.sigmas == steps.sigmas[7:] and last.total == 10
    assert [sigma.step for sigma in last.sigmas[:-1]] == [0, 1, 2]
    assert len(steps.last(0)) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        *(([n], f"{n} steps: the model was trained on 1000 timesteps; choose 1 to 1000") for n in (0, 1001)),
        ([3, "euler", None, "sideways"], "schedule 'sideways' is unknown; choose one of default, karras"),
        ([3, "euler", "sideways"], "'sideways' is unknown"),
    ],
)
def test_impossible_runs(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(**SCALED).steps(*arguments)
