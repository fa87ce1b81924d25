"""Samplers on data whose solution is known in closed form."""

import math
import re
from functools import partial
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from oracle import last
from stable_diffusion.diffusion.choice import find_sampler, read_name, read_schedule, run_options, sampler_for, table
from stable_diffusion.diffusion.multistep import singlestep_orders
from stable_diffusion.diffusion.samplers import SAMPLERS, lms
from stable_diffusion.diffusion.schedule import SCHEDULES, Schedule, ScheduleConfig
from stable_diffusion.options import Options
from stable_diffusion.planning import RunDefaults, plan_run

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DPM = {"_class_name": "DPMSolverMultistepScheduler"}
DATA = 0.5  # standard deviation of the data; then D(x, sigma) = x * DATA^2 / (DATA^2 + sigma^2)
TOP = 10.0


def denoise(x: mx.array, sigma: float) -> mx.array:
    return x * (DATA**2 / (DATA**2 + sigma**2))


def zeros(draw: int, shape: tuple[int, ...]) -> mx.array:
    return mx.zeros(shape)


def no_noise(step: int, shape: tuple[int, ...]) -> mx.array:
    raise AssertionError("a deterministic sampler asked for noise")


def log_sigmas(count: int, bottom: float) -> list[float]:
    return [TOP * (bottom / TOP) ** (i / count) for i in range(count + 1)]


def error(name: str, count: int, **given) -> float:
    """Distance to the exact solution of the ODE, x(s) = x(S) * sqrt((DATA^2 + s^2) / (DATA^2 + S^2)), relative."""
    sigmas = log_sigmas(count, 0.5)
    x = last(SAMPLERS[name].run(denoise, mx.array([TOP], dtype=mx.float64), sigmas, zeros, **given))
    exact = TOP * math.sqrt((DATA**2 + sigmas[-1] ** 2) / (DATA**2 + TOP**2))
    return abs(x.item() - exact) / exact


ODE = {"eta": 0.0}
ORDERS = [(name, {}, 1) for name in ("euler", "ddim")] + [(name, ODE, 1) for name in ("euler_a", "tcd")]
ORDERS += [(name, {}, 2) for name in ("heun", "dpm2", "dpmpp_2m", "unipc", "deis")]
ORDERS += [(name, ODE, 2) for name in ("dpm2_a", "dpmpp_2m_sde", "dpmpp_2s_a", "dpmpp_sde")]
ORDERS += [("deis", {"order": 1}, 1), ("deis", {"order": 3}, 3), ("lms", {"order": 1}, 1), ("lms", {"order": 2}, 2)]
ORDERS += [("dpmpp_2m", {"order": 1}, 1), ("dpmpp_2m", {"predict_x0": False, "solver_type": "heun"}, 2)]
ORDERS += [("dpmpp_2s", {"order": 1}, 1), ("dpmpp_2s", {"solver_type": "heun"}, 2), ("dpmpp_2s", {}, 2)]
ORDERS += [
    ("dpmpp_2m", {"order": 3}, 2),  # as it is defined, like dpmpp_3m_sde
    ("unipc", {"order": 1}, 2),  # a corrected step of first order
    ("unipc", {"order": 3}, 2),  # for its last step is of first order, and is not corrected
    ("unipc", {"order": 2, "lower_order_final": False, "predict_x0": False}, 3),
    ("unipc", {"order": 3, "lower_order_final": False}, 4),
    ("unipc", {"order": 4, "lower_order_final": False, "predict_x0": False}, 3),  # that of its first steps
    ("dpmpp_3m_sde", ODE, 2),  # so it is defined: the second difference of D has half of its weight
    ("pndm", {}, 2),  # its weights take all steps for equally long
    ("ipndm", {}, 2),  # likewise
    ("res_multistep", {}, 2),
    ("dpmpp_2m_cfg_pp", {}, 2),  # where there is no guidance
    ("res_multistep_a", ODE, 2),
    *(("er_sde", {"order": order, "noise_scaler": float}, min(order, 2)) for order in (1, 2, 3)),
    *(("sa_solver", ODE | {"order": p, "corrector_order": c}, min(c, 2)) for p, c in ((1, 1), (2, 1), (1, 2), (2, 2))),
    ("sa_solver", ODE | {"order": 3, "corrector_order": 4}, 2),  # for its last step is of first order
    ("sa_solver", ODE | {"order": 3, "corrector_order": 4, "lower_order_final": False}, 4),
]
# In many steps lower orders show: of the sums over 200 points in er_sde, and of the first steps of deis.
STEPS = {"er_sde": (10, 20, 40), "deis": (20, 40, 80)}


@pytest.mark.parametrize("name, given, order", ORDERS)
def test_order_of_convergence(name, given, order):
    errors = [error(name, n, **given) for n in STEPS.get(name, (80, 160, 320))]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order] * 2, abs=0.25)


def variance_error(name: str, count: int, **given) -> float:
    """Distance of the variance to that of the data's at the last sigma, relative.

    As D is linear, each state is a sum of the first noise and those of the steps; x holds their coefficients.
    """
    sigmas, units = log_sigmas(count, 0.5), mx.eye(2 * count + 1, dtype=mx.float64)
    start = math.sqrt(DATA**2 + TOP**2) * units[0]
    x = last(SAMPLERS[name].run(denoise, start, sigmas, lambda draw, shape: units[draw + 1], **given))
    exact = DATA**2 + sigmas[-1] ** 2
    return abs((x**2).sum().item() - exact) / exact


WEAK_ORDERS = [(name, {}, 1) for name in ("euler_a", "ddpm")] + [("dpmpp_2m_sde", {"order": 1}, 1)]
WEAK_ORDERS += [(name, {}, 2) for name in ("dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "res_multistep_a")]
WEAK_ORDERS += [("er_sde", {"order": order}, min(order, 2)) for order in (1, 2, 3)]
WEAK_ORDERS += [("sa_solver", {}, 2), ("sa_solver", {"order": 3, "corrector_order": 4}, 2)]


@pytest.mark.parametrize("name, given, order", WEAK_ORDERS)
def test_order_of_convergence_of_the_variance(name, given, order):
    errors = [variance_error(name, n, **given) for n in STEPS.get(name, (40, 80, 160))]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order] * 2, abs=0.25)


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [2, 3])
def test_order_of_convergence_of_whole_groups(order, solver_type, predict_x0):
    given = {"order": order, "solver_type": solver_type, "predict_x0": predict_x0}
    errors = [error("dpmpp_2s", n, orders=singlestep_orders(order, n, False, False), **given) for n in (60, 120, 240)]
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([order] * 2, abs=0.25)


STOCHASTIC = ["euler_a", "ddpm", "dpm2_a", "dpmpp_2s_a", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"]
STOCHASTIC += ["res_multistep_a", "er_sde", "sa_solver"]
STOCHASTIC = [
    *((name, {}) for name in STOCHASTIC),
    ("ddim", {"eta": 1.0}),
    ("dpmpp_2m_sde", {"predict_x0": False}),
    ("dpmpp_sde", {"eta": 0.5}),
]


@pytest.mark.parametrize("name, given", STOCHASTIC)
def test_stochastic_samplers_reach_the_variance_of_the_data(name, given):
    shape, keys = (20_000,), mx.random.split(mx.random.key(0), 401)
    x = math.sqrt(DATA**2 + TOP**2) * mx.random.normal(shape, key=keys[400])
    sigmas = [*log_sigmas(199, 0.01), 0.0]
    x = last(SAMPLERS[name].run(denoise, x, sigmas, lambda i, s: mx.random.normal(s, key=keys[i]), **given))
    assert float(np.std(x)) == pytest.approx(DATA, rel=0.03)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_yield_a_step_and_the_last_is_the_estimate(name):
    sigmas = [*log_sigmas(4, 0.1), 0.0]
    asked = []

    def remember(x: mx.array, sigma: float) -> mx.array:
        asked.append((sigma, denoise(x, sigma)))
        return asked[-1][1]

    noise = zeros if SAMPLERS[name].stochastic else no_noise
    states = list(SAMPLERS[name].run(remember, mx.array([TOP]), sigmas, noise))
    assert len(states) == 5
    levels = [sigma for sigma, _ in asked]
    evaluations = SAMPLERS[name].evaluations
    assert len(levels) == (6 if name == "pndm" else evaluations * 5 - (evaluations - 1))
    assert [sigma for sigma in levels if sigma in sigmas[:-1]][:1] == sigmas[:1] and set(sigmas[:-1]) <= set(levels)
    if name not in ("lms", "pndm"):  # which extrapolate
        assert np.array_equal(states[-1], asked[-1][1])  # at sigma 0 nothing but D is left


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_step_that_stands_still(name):
    """Some checkpoints end where their last step starts."""
    states = list(SAMPLERS[name].run(denoise, mx.array([TOP]), [2.0, 1.0, 0.5, 0.5], zeros))
    if name not in ("lcm", "tcd", "unipc", "sa_solver"):  # they leap, or correct the step before
        assert states[2].item() == pytest.approx(states[1].item(), rel=1e-6)
    assert all(math.isfinite(x.item()) for x in states)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("curve", SCHEDULES)
def test_a_run_that_ends_at_the_first_training_sigma(name, curve):
    """There the last level of a curve is an ulp off the end, and the last of a table just below it."""
    schedule, sampler = Schedule(ScheduleConfig.from_dict(SCALED | {"final_sigmas_type": "sigma_min"})), SAMPLERS[name]
    for count in (1, 20):
        steps = schedule.steps(count, sampler.spacing_rule, schedule=curve)
        options = run_options(sampler, schedule, steps)
        states = list(sampler.run(denoise, mx.array([TOP]), steps.sigmas, zeros, **options))
        assert len(states) == count and all(math.isfinite(x.item()) for x in states)


def test_no_cancellation_where_the_first_sigma_is_infinite():
    """With zero terminal SNR, DDIM's first step is D plus s times the noise, to the last bit of float32."""
    config = ScheduleConfig(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    sigmas = Schedule(config).steps(4, "ddim").sigmas
    noise, x0 = mx.random.normal((1000,), key=mx.random.key(0)), mx.random.normal((1000,), key=mx.random.key(1))
    first = next(SAMPLERS["ddim"].run(lambda x, sigma: x0, sigmas[0] * noise, sigmas, no_noise))
    np.testing.assert_allclose(first, x0 + sigmas[1] * noise, rtol=1e-5, atol=1e-5)


NAMES = {
    "Euler a": ("euler_a", None),
    "DPM++ 2M": ("dpmpp_2m", None),
    "dpm++ 2m sde karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 3M SDE Polyexponential": ("dpmpp_3m_sde", "polyexponential"),
    "PLMS": ("pndm", None),
    "k_lms": ("lms", None),
    "Euler Align Your Steps": ("euler", "align_your_steps"),
    "k_dpm_2_a_ka": ("dpm2_a", "karras"),  # A1111's aliases
    "euler_ancestral": ("euler_a", None),  # ComfyUI
    "dpmpp_2m_sde_gpu": ("dpmpp_2m_sde", None),
    "uni_pc_bh2": ("unipc", None),
    "euler_normal": ("euler", "default"),
    "EulerDiscreteScheduler": ("euler", None),  # diffusers
    "KDPM2AncestralDiscreteScheduler": ("dpm2_a", None),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", None),
    "DPMSolverSinglestepScheduler": ("dpmpp_2s", None),
    "dpm++2s_a": ("dpmpp_2s_a", None),  # stable-diffusion.cpp
    "res_multistep_ancestral": ("res_multistep_a", None),
    "Res Multistep": ("res_multistep", None),
    "ER SDE Karras": ("er_sde", "karras"),
    "SASolverScheduler": ("sa_solver", None),
    "euler_ancestral_cfg_pp": ("euler_a_cfg_pp", None),
    "DPM++ 2M CFG++ Karras": ("dpmpp_2m_cfg_pp", "karras"),
    "kdpm_2_k": ("dpm2", "karras"),  # InvokeAI
}
SIMILAR = {
    "DPM++ 2M Karas": "dpmpp_2m karras",
    "eulr": "euler",
    "ipdm": "ipndm",
    "dpm++2mv2": "dpmpp_2m",
}
SCHEDULE_NAMES = {"Karras": "karras", "SGM Uniform": "sgm_uniform", "SGMUniform": "sgm_uniform", "normal": "default"}
SCHEDULE_NAMES |= {"discrete": "default", "Align Your Steps": "align_your_steps", "ays": "align_your_steps"}
SCHEDULE_NAMES |= {"Simple": "simple", "DDIM": "ddim_uniform", "KL Optimal": "kl_optimal"}
SIMILAR_SCHEDULES = {"karas": "karras", "exponental": "exponential"}


def test_names_as_people_write_them():
    for written, (name, schedule) in NAMES.items():
        assert read_name(written) == (name, schedule) and find_sampler(written) == (SAMPLERS[name], schedule)


def test_similar_names_are_offered():
    for read, similar in ((read_name, SIMILAR), (read_schedule, SIMILAR_SCHEDULES)):
        for written, offered in similar.items():
            with pytest.raises(ValueError, match=rf"'{re.escape(written)}' is unknown; did you mean {offered}\?$"):
                read(written)
            read(offered)


def test_schedules_as_people_write_them():
    schedule, defaults = Schedule(ScheduleConfig()), RunDefaults("euler", 5, 1.0)
    for written, name in SCHEDULE_NAMES.items():
        assert read_schedule(written) == name
        runs = [plan_run(schedule, Options(schedule=n), defaults, num_steps=5, seeds=()) for n in (written, name)]
        assert runs[0].steps.sigmas == runs[1].steps.sigmas
    with pytest.raises(ValueError, match="schedule 'gits' is unknown; choose one of default, karras"):
        Options(schedule="gits")


@pytest.mark.parametrize("name", ["best", "", "karras", "DPM++ 2M Fast", "kk_lms"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"sampler '{re.escape(name)}' is unknown; choose one of euler, euler_a"):
        find_sampler(name)


@pytest.mark.parametrize(
    "config, wanted",
    [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "pndm"),
        ({"_class_name": "FlaxPNDMScheduler"}, "pndm"),
        ({"_class_name": "DDIMParallelScheduler", "clip_sample": False}, "ddim"),
        ({"_class_name": "DDPMParallelScheduler", "clip_sample": False}, "ddpm"),
        (DPM | {"algorithm_type": "dpmsolver++"}, "dpmpp_2m"),
        (DPM | {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        (DPM | {"algorithm_type": "sde-dpmsolver"}, "dpmpp_2m_sde"),
        (DPM | {"solver_order": 3}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverSinglestepScheduler"}, "dpmpp_2s"),
        ({"_class_name": "SASolverScheduler", "predictor_order": 3}, "sa_solver"),
        ({"_class_name": "SomethingNew"}, None),
        (DPM | {"solver_order": 4}, None),
        (DPM | {"thresholding": True}, "dpmpp_2m"),
        ({"_class_name": "DDIMScheduler"}, "ddim"),
        (DPM | {"unheard_of": 0.5}, None),
        (DPM | {"unheard_of": False, "clip_sample": True, "tensor_format": "pt"}, "dpmpp_2m"),
    ],
)
def test_the_sampler_of_a_checkpoint(config, wanted):
    assert sampler_for(ScheduleConfig.from_dict(config)) == wanted


def test_options():
    for name, option in (("euler", "eta"), ("dpm2", "s_noise"), ("ddpm", "s_churn"), ("DPM++ 2M Karras", "eta")):
        with pytest.raises(ValueError, match=f"sampler {read_name(name)[0]} takes no {option}; omit it"):
            find_sampler(name, **{option: 0.5})
    for name, order, highest in (("dpmpp_2m", 4, 3), ("deis", 9, 3), ("lms", 5, 4)):
        with pytest.raises(ValueError, match=f"sampler {name} has no order {order}; choose 1 to {highest}$"):
            find_sampler(name, order=order)
    assert find_sampler("ddim", eta=0.0) == find_sampler("ddim") == (SAMPLERS["ddim"], None)
    assert find_sampler("euler", eta=None) == (SAMPLERS["euler"], None)


def test_the_end_of_a_long_run_is_of_full_order():
    schedule = Schedule(ScheduleConfig())
    long, short = (schedule.steps(count, "multistep").last(10) for count in (15, 10))
    assert run_options(SAMPLERS["deis"], schedule, long) == {"lower_order_final": False}
    assert run_options(SAMPLERS["deis"], schedule, short) == {"lower_order_final": True}
    assert run_options(SAMPLERS["pndm"], schedule, short.last(0)) == {}


def test_the_settings_of_a_scheduler_hold_for_its_sampler():
    config = DPM | {"solver_order": 3, "solver_type": "heun", "algorithm_type": "sde-dpmsolver++"}
    schedule = Schedule(ScheduleConfig.from_dict(config))
    steps = schedule.steps(20, "multistep")
    options = run_options(SAMPLERS["dpmpp_2m_sde"], schedule, steps)
    assert (options["order"], options["solver_type"], options["predict_x0"]) == (3, "heun", True)
    assert run_options(SAMPLERS["dpmpp_2m_sde"], schedule, steps, order=1)["order"] == 1
    assert run_options(SAMPLERS["dpmpp_2m"], schedule, steps) == {"lower_order_final": False}
    assert run_options(SAMPLERS["dpmpp_2s"], schedule, steps.last(3)) == {"orders": [2, 1, 1]}
    for name, other in (("UniPCMultistep", {"algorithm_type": "dpmsolver"}), ("SASolver", {"predict_x0": False})):
        schedule = Schedule(ScheduleConfig.from_dict({"_class_name": f"{name}Scheduler"} | other))
        sampler = find_sampler(name)[0]
        assert run_options(sampler, schedule, schedule.steps(20, sampler.spacing_rule))["predict_x0"]


def test_a_partial_of_a_sampler_is_one_without_the_bound_option():
    assert find_sampler(partial(lms, order=2))[0].option_names == {"s_noise"}
    with pytest.raises(ValueError, match="takes no order"):
        find_sampler(partial(lms, order=2), order=3)


def test_the_table_for_people():
    lines = table().splitlines()
    assert lines[0].split() == ["sampler", "order", "evaluations", "stochastic", "reference"]
    assert [line.split()[0] for line in lines[1:]] == list(SAMPLERS)
    assert lines[3].split() == ["heun", "2", "2", "no", "Karras", "et", "al.", "2022,", "arXiv:2206.00364"]
