"""Samplers on data whose solution is known in closed form."""

import math
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from stable_diffusion.config import ScheduleConfig
from stable_diffusion.samplers import SAMPLERS, find_sampler, options, sampler_for
from stable_diffusion.schedule import Schedule

DATA = 0.5  # standard deviation of the data; then D(x, sigma) = x * DATA^2 / (DATA^2 + sigma^2)
TOP = 10.0


def denoise(x: mx.array, sigma: float) -> mx.array:
    return x * (DATA**2 / (DATA**2 + sigma**2))


def no_noise(step: int, shape: tuple[int, ...]) -> mx.array:
    raise AssertionError("a deterministic sampler asked for noise")


def log_sigmas(count: int, bottom: float) -> list[float]:
    return [TOP * (bottom / TOP) ** (i / count) for i in range(count + 1)]


def last(states) -> mx.array:
    return list(states)[-1]


def error(name: str, count: int) -> float:
    """Distance to the exact solution of the ODE, x(s) = x(S) * sqrt((DATA^2 + s^2) / (DATA^2 + S^2)), relative."""
    sigmas = log_sigmas(count, 0.05)
    x = last(SAMPLERS[name].run(denoise, mx.array([TOP]), sigmas, no_noise))
    exact = TOP * math.sqrt((DATA**2 + sigmas[-1] ** 2) / (DATA**2 + TOP**2))
    return abs(x.item() - exact) / exact


@pytest.mark.parametrize("name, order", [("euler", 1), ("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence(name, order):
    measured = [math.log2(error(name, n) / error(name, 2 * n)) for n in (20, 40)]
    assert measured == pytest.approx([order] * 2, abs=0.3)


@pytest.mark.parametrize("name, options_", [("euler_a", {}), ("euler_a", {"eta": 0.5}), ("ddim", {"eta": 1.0})])
def test_stochastic_samplers_reach_the_variance_of_the_data(name, options_):
    shape, keys = (20_000,), mx.random.split(mx.random.key(0), 201)
    x = math.sqrt(DATA**2 + TOP**2) * mx.random.normal(shape, key=keys[200])
    sigmas = [*log_sigmas(199, 0.01), 0.0]
    x = last(SAMPLERS[name].run(denoise, x, sigmas, lambda i, s: mx.random.normal(s, key=keys[i]), **options_))
    assert float(mx.std(x)) == pytest.approx(DATA, rel=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_yield_a_step_and_the_last_is_the_estimate(name):
    sigmas = [*log_sigmas(4, 0.1), 0.0]
    asked = []

    def remember(x: mx.array, sigma: float) -> mx.array:
        asked.append((sigma, denoise(x, sigma)))
        return asked[-1][1]

    zeros = lambda step, shape: mx.zeros(shape)  # noqa: E731
    states = list(SAMPLERS[name].run(remember, mx.array([TOP]), sigmas, zeros))
    assert len(states) == 5
    assert [sigma for sigma, _ in asked] == sigmas[:-1]
    assert np.array_equal(states[-1], asked[-1][1])  # at sigma 0 nothing but D is left


def test_no_cancellation_where_the_first_sigma_is_infinite():
    """With zero terminal SNR, DDIM's first step is D plus s times the noise, to the last bit of float32."""
    config = ScheduleConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    sigmas = Schedule(config).steps(4, "ddim").sigmas
    noise, x0 = mx.random.normal((1000,), key=mx.random.key(0)), mx.random.normal((1000,), key=mx.random.key(1))
    first = next(SAMPLERS["ddim"].run(lambda x, sigma: x0, sigmas[0] * noise, sigmas, no_noise))
    np.testing.assert_allclose(first, x0 + sigmas[1] * noise, rtol=1e-5, atol=1e-5)


def test_eta_zero_is_the_deterministic_sampler():
    sigmas = [*log_sigmas(6, 0.1), 0.0]
    plain = list(SAMPLERS["euler"].run(denoise, mx.array([TOP]), sigmas, no_noise))
    for name in ("euler_a", "ddim"):
        assert np.array_equal(list(SAMPLERS[name].run(denoise, mx.array([TOP]), sigmas, no_noise, eta=0.0)), plain)


def test_ancestral_noise_restores_the_level():
    from stable_diffusion.samplers import _ancestral

    for sigma, target in pairwise([14.6, 5.0, 1.0, 0.03, 0.0]):
        for eta in (0.0, 0.3, 1.0, 3.0):
            down, up = _ancestral(sigma, target, eta)
            assert down**2 + up**2 == pytest.approx(target**2) and 0 <= up <= target


def test_tables_of_names():
    assert sampler_for("EulerAncestralDiscreteScheduler") == ("euler_a", True)
    assert sampler_for("PNDMScheduler")[1] is False
    assert sampler_for("SomethingNew") == ("euler", False)
    with pytest.raises(ValueError, match="sampler 'best' is unknown; choose one of euler, euler_a"):
        find_sampler("best")
    with pytest.raises(ValueError, match="takes no eta"):
        options(SAMPLERS["euler"], eta=0.5)
    assert options(SAMPLERS["ddim"], eta=0.0) == {"eta": 0.0} and options(SAMPLERS["euler"], eta=None) == {}
