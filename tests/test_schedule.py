"""Timesteps and noise levels against diffusers, for every spacing and number of steps."""

import diffusers
import numpy as np
import pytest

from stable_diffusion.config import ScheduleConfig
from stable_diffusion.schedule import GRIDS, Schedule

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    "scaled_linear": SCALED,
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.001 * (i + 1) for i in range(50)], "num_train_timesteps": 50},
    "short": SCALED | {"num_train_timesteps": 7},
}
FAMILIES = {
    "euler": diffusers.EulerDiscreteScheduler,
    "ddim": diffusers.DDIMScheduler,
    "multistep": diffusers.DPMSolverMultistepScheduler,
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


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("family", FAMILIES)
def test_timesteps_and_sigmas_of_every_number_of_steps(family, spacing, offset):
    options = SCALED | {"timestep_spacing": spacing, "steps_offset": offset}
    oracle, ours = FAMILIES[family](**options), schedule(**options)
    compared = 0
    for count in range(1, 1001):
        oracle.set_timesteps(count)
        want = oracle.timesteps.double().numpy()
        steps = ours.steps(count, family)
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


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("family", GRIDS)
def test_sigmas_descend_to_the_end(family, spacing):
    ours = schedule(**SCALED)
    for count in (*range(1, 60), 333, 500, 999, 1000):
        steps = ours.steps(count, family, spacing)
        assert len(steps) == count and steps.sigmas[-1] == 0
        assert all(a > b for a, b in zip(steps.sigmas, steps.sigmas[1:], strict=False))


def test_ddim_ends_where_the_checkpoint_says():
    last = schedule(**SCALED, set_alpha_to_one=False)
    assert last.steps(10, "ddim").sigmas[-1] == last.sigmas[0]
    assert last.steps(10, "euler").sigmas[-1] == 0


def test_sigma_and_timestep_are_inverse():
    ours = schedule(**SCALED)
    for t in (0.0, 0.5, 1.0, 333.3, 998.9, 999.0):
        low, high = int(t), min(int(t) + 1, 999)
        sigma = ours.sigmas[low] ** (1 - t % 1) * ours.sigmas[high] ** (t % 1)
        assert ours.timestep(sigma) == pytest.approx(t, abs=1e-6)
    assert ours.timestep(0.0) == 0 and ours.timestep(1e9) == 999


def test_the_last_steps_of_a_run():
    steps = schedule(**SCALED).steps(10, "ddim")
    assert steps.last(3).timesteps == steps.timesteps[7:] and steps.last(3).sigmas == steps.sigmas[7:]
    assert len(steps.last(0)) == 0


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_numbers_of_steps(count):
    with pytest.raises(ValueError, match=rf"{count} steps: the model was trained on 1000 timesteps; choose 1 to 1000"):
        schedule(**SCALED).steps(count)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'sideways' is unknown"):
        schedule(**SCALED).steps(3, "euler", "sideways")
    for key in ("beta_schedule", "prediction_type", "timestep_spacing"):
        with pytest.raises(ValueError, match=f"{key}='nonsense' is not supported"):
            schedule(**{key: "nonsense"})
