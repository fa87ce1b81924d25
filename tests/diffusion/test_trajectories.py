"""Every step of every sampler against diffusers, for one model function and the same injected noise.

The model is a smooth function of its input and the timestep, so that hundreds of whole runs take seconds. It is asked
through the library's own denoiser, which scales its input and reads its answer, as diffusers' schedulers do theirs.
"""

import inspect
import math
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from unittest import mock

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch

from oracle import normal, relative_error
from stable_diffusion.diffusion.choice import run_options
from stable_diffusion.diffusion.denoiser import Denoiser, for_sampler, to_x0
from stable_diffusion.diffusion.guidance import guidance_batches
from stable_diffusion.diffusion.samplers import SAMPLERS
from stable_diffusion.diffusion.schedule import SPACING_RULES, SPACINGS, Schedule, ScheduleConfig
from stable_diffusion.text.encode import Conditioning

SHAPE, MOST = (2, 4, 4, 4), 25
START, NOISE = normal(*SHAPE, seed=1), normal(2 * MOST, *SHAPE, seed=2)
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COUNTS = (1, 2, 3, 7, 25)  # of which some do not divide 1000
BOUND = 1e-5


class ForNumPy2:
    """These two classes hand tensors to NumPy functions, which NumPy 2 does not take."""

    def _sigma_to_t(self, sigma, log_sigmas):
        return super()._sigma_to_t(np.asarray(sigma), np.asarray(log_sigmas))


CLASSES = {}
for _name, _row in SAMPLERS.items():
    if _row.scheduler:
        _class = getattr(diffusers, f"{_row.scheduler.partition(':')[0]}Scheduler")
        CLASSES[_name] = type(_class.__name__, (ForNumPy2, _class), {}) if _name.startswith("dpm2") else _class
OF_CLASS = {
    "ddim": {"clip_sample": False},
    "ddpm": {"clip_sample": False},
    "pndm": {"skip_prk_steps": True},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
}


def make(name: str, **config) -> diffusers.SchedulerMixin:
    known = inspect.signature(CLASSES[name].__init__).parameters
    placed = {key for key in ("timestep_spacing", "steps_offset") if key not in known}  # one class has only one spacing
    placed |= SCALED.keys() - known  # EDM has no betas
    return CLASSES[name](**{k: v for k, v in (SCALED | OF_CLASS.get(name, {}) | config).items() if k not in placed})


def model(xp, z, t: float):
    """The network: bounded, smooth, and different at every place and time."""
    mirrored = z[..., ::-1].copy() if xp is np else z[..., ::-1]
    return xp.tanh(1.2 * z - 0.3 * mirrored) + 0.3 * math.sin(t / 150)


class UNet:
    """The model with a UNet's interface; its embedded timestep is the timestep."""

    def embed_time(self, t: float, *_) -> float:
        return t

    def __call__(self, x: mx.array, temb: float, context: mx.array, **_) -> mx.array:
        return model(mx, x, temb)


def ours(name: str, config: dict, count: int, start: int = 0, custom: dict | None = None, **chosen) -> list[np.ndarray]:
    """The states after every step, in variance-preserving scale, the initial one first."""
    schedule, sampler = Schedule(ScheduleConfig.from_dict(config)), SAMPLERS[name]
    if custom is None:
        steps = schedule.steps(count, sampler.spacing_rule)
    elif "sigmas" in custom:
        steps = schedule.at_sigmas(custom["sigmas"])
    else:
        steps = schedule.at_timesteps(custom["timesteps"], sampler.spacing_rule)
    scale = schedule.initial_scale(steps, sampler.spacing_rule)
    steps = steps.last(count - start)
    x = scale * mx.array(START) if not start else mx.array(IMAGE) + steps.sigmas[0] * mx.array(START)
    batches = guidance_batches(len(steps), SHAPE[0], Conditioning(mx.zeros((1, 1, 1))), None, 1.0)
    denoise = Denoiser(UNet(), schedule, steps, mx.float32, batches)
    denoise = for_sampler(denoise, sampler, schedule)
    options = run_options(sampler, schedule, steps, **chosen)
    states = [x, *sampler.run(denoise, x, steps.sigmas, lambda i, shape: mx.array(NOISE[i]), **options)]
    return [np.array(x) / math.sqrt(s**2 + 1) for x, s in zip(states, steps.sigmas, strict=True)]


IMAGE = normal(*SHAPE, seed=3)


class Float64:
    """NumPy or torch, but who asks it for float32 gets float64."""

    def __init__(self, library):
        self.library, self.float32 = library, library.float64

    def __getattr__(self, name: str):
        return getattr(self.library, name)


class Brownian:
    """In place of DPMSolverSDE's noise: increments of one motion, to the middle of a step and then over all of it."""

    def __init__(self, dtype: torch.dtype):
        self.draws = (torch.from_numpy(noise).to(dtype) for noise in NOISE)
        self.halves: list[torch.Tensor] = []

    def __call__(self, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if not self.halves:
            self.halves = [next(self.draws), next(self.draws)]
            return self.halves[0]
        (first, second), self.halves = self.halves, []
        middle = (sigma * target) ** 0.5
        return ((sigma - middle) ** 0.5 * first + (middle - target) ** 0.5 * second) / (sigma - target) ** 0.5


@contextmanager
def patched(scheduler, float64: bool):
    """A scheduler's module with our noise for its own, and if asked, with float64 for float32."""
    module = next(c.__module__ for c in type(scheduler).__mro__ if c.__module__.startswith("diffusers."))
    draws = (torch.from_numpy(noise) for noise in NOISE)
    with ExitStack() as stack:
        new = {"randn_tensor": lambda *_, **__: next(draws)}
        if float64:
            new |= {"np": Float64(np), "torch": Float64(torch)}
        for name, value in new.items():
            stack.enter_context(mock.patch(f"{module}.{name}", value, create=True))
        yield


def begin(name: str, scheduler, start: int) -> torch.Tensor:
    """Let the scheduler begin at its step ``start``; returns the timesteps from there."""
    if name == "lms":  # see test_from_the_middle
        scheduler.sigmas, timesteps, start = scheduler.sigmas[start:], scheduler.timesteps[start:], 0
    elif name == "pndm" and start and not scheduler.config.skip_prk_steps:
        left = scheduler._timesteps[::-1][start:]
        half = 1000 // len(scheduler._timesteps) // 2
        scheduler.prk_timesteps = [t for a, b in pairwise(left[:4]) for t in (a, b + half, b + half, b)]
        timesteps = torch.tensor([*scheduler.prk_timesteps, *left[3:]]).long()
    elif name == "pndm" and start:
        left = scheduler.timesteps[1 + start :]
        timesteps = torch.cat([left[:2], left[1:]])
    else:
        timesteps = scheduler.timesteps[start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    return timesteps


def theirs(name, scheduler, count, start=0, custom=None, float64=False, **at_step) -> list[np.ndarray]:
    """The same from a scheduler of diffusers."""
    float64 = float64 or name in IN_FLOAT64
    dtype = torch.float64 if float64 else torch.float32
    noise, states = torch.from_numpy(START).to(dtype), []

    def keep(x: torch.Tensor, index: int) -> None:
        is_exploding = name in EXPLODING or type(scheduler).__name__.startswith("EDM")
        level = float(scheduler.sigmas[index]) if is_exploding else 0.0
        states.append((x / math.sqrt(level**2 + 1)).numpy())

    with patched(scheduler, float64):
        scheduler.set_timesteps(**custom or {"num_inference_steps": count})
        timesteps = begin(name, scheduler, start)
        scheduler.noise_sampler = Brownian(dtype)
        x = noise * scheduler.init_noise_sigma
        if start:
            x = scheduler.add_noise(torch.from_numpy(IMAGE).to(dtype), noise, timesteps[:1].repeat(len(x)))
        keep(x, getattr(scheduler, "begin_index", 0))
        for i, t in enumerate(timesteps):
            z = scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.from_numpy(model(np, z.numpy(), float(t))), t, x, **at_step).prev_sample
            inner = not getattr(scheduler, "state_in_first_order", True) and i < len(timesteps) - 1
            if name == "pndm" and scheduler.config.skip_prk_steps:
                inner = i == 0 and len(timesteps) > 1
            elif name == "pndm":
                inner = i < 12 and i % 4 < 3
            if not inner:
                keep(x, getattr(scheduler, "step_index", 0))
    return states


# Their state is x0 + sigma * noise; that of the others is divided by sqrt(sigma^2 + 1).
EXPLODING = ("euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms", "dpmpp_sde")

# In float32 these lose digits in their coefficients, which are differences of nearly equal numbers: dpm2_a takes
# sqrt(s^2 - up^2) where up is nearly s (7e-5 of the result of two steps), deis t (log t - log c - 1) at both ends of a
# step (2e-5), sa_solver powers of log s. So diffusers computes them in float64 here; ours are float32 latents with
# float64 coefficients always.
IN_FLOAT64 = ("dpm2_a", "deis", "sa_solver")


def compare(name, counts=COUNTS, start=0, custom=None, float64=False, at_step=None, chosen=None, **config) -> None:
    errors = {}
    for count in counts:
        scheduler = make(name, **config)
        want = theirs(name, scheduler, count, start, custom, float64, **at_step or {})
        named = {"_class_name": type(scheduler).__name__}
        have = ours(name, named | dict(scheduler.config), count, start, custom, **chosen or {})
        assert len(have) == len(want) == count - start + 1
        errors[count] = max(relative_error(a, b) for a, b in zip(have, want, strict=True))
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize(
    "prediction, spacing", [*(("epsilon", spacing) for spacing in SPACINGS), ("v_prediction", SPACINGS[0])]
)
@pytest.mark.parametrize("name", CLASSES)
def test_every_step(name, prediction, spacing):
    compare(name, prediction_type=prediction, timestep_spacing=spacing)


# (sampler, spacing) where diffusers has curves; those of the multistep family do not depend on the spacing
CURVE_CASES = [
    (name, spacing)
    for name in CLASSES
    if "use_karras_sigmas" in make(name).config
    for spacing in (SPACINGS[:1] if SPACING_RULES[SAMPLERS[name].spacing_rule].curves_span_training else SPACINGS)
]


@pytest.mark.parametrize("curve", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name, spacing", CURVE_CASES)
def test_every_step_along_a_curve(name, spacing, curve):
    # In a single step along a curve, DEIS and SA-Solver stand still in diffusers: the end is the curve's last level,
    # which is the first one too. Here they go to the first training sigma, as without a curve.
    counts = (2, 7) if name in ("deis", "sa_solver") else (1, 2, 7)
    compare(name, counts, timestep_spacing=spacing, **{f"use_{curve}_sigmas": True})


@pytest.mark.parametrize("start", [1, 9])
@pytest.mark.parametrize("name", CLASSES)
def test_from_the_middle(name, start):
    """Image to image, as its pipelines in diffusers start it, with two exceptions.

    There LMS takes the weights of its full order with a history that is still empty, and PNDM comes one step too late
    to the timesteps that its history stands for. Here both start as they do at the beginning, so here their schedulers
    are handed the rest of the run as a whole one.
    """
    compare(name, [10], start, timestep_spacing="leading", steps_offset=1)


V, ONE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample", "float64": True}
# The first sigma is infinite, or 4096 where diffusers caps it; a model of such noise predicts v.
ZERO_SNR = V | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "float64": True}
KINDS = {
    "sample": (ONE, "euler heun lms ddim ddpm dpmpp_2m dpmpp_2m_sde unipc deis lcm tcd"),
    "zero SNR": (ZERO_SNR, "euler euler_a ddim ddpm dpmpp_2m dpmpp_2m_sde unipc lcm tcd"),
    "zero SNR, karras": (ZERO_SNR | {"use_karras_sigmas": True}, "euler dpmpp_2m unipc"),
    "to the first sigma": ({"final_sigmas_type": "sigma_min"}, "euler dpmpp_2m dpmpp_2m_sde unipc"),
    "as Stable Diffusion ends": ({"set_alpha_to_one": False, "steps_offset": 1}, "ddim pndm"),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2", "float64": True} | V, "euler ddim unipc"),
    "lms, order 1": ({"chosen": {"order": 1}, "at_step": {"order": 1}}, "lms"),
    "lms, order 3": ({"chosen": {"order": 3}, "at_step": {"order": 3}}, "lms"),
    "timesteps": ({"counts": [5], "custom": {"timesteps": [999, 799, 459, 19, 1]}}, "euler heun dpmpp_2m ddpm lcm tcd"),
    "sigmas": ({"counts": [5], "custom": {"sigmas": [14.615, 6.3, 2.2, 0.55, 0.1, 0.0]}}, "euler"),
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, (_, names) in KINDS.items() for name in names.split()])
def test_every_step_of_other_models_and_runs(kind, name):
    compare(name, **KINDS[kind][0])


# Settings of schedulers with several orders, which hold for their samplers. The last step of a curve to the first
# training sigma stands still, which some formulas of diffusers make NaN.
TO_FIRST = {"final_sigmas_type": "sigma_min"}
RUNS = (
    {"counts": (1, 2, 3, 4, 7, 16, 25)},
    {"counts": (1, 2, 3, 4, 7, 16, 25), "prediction_type": "v_prediction", **TO_FIRST},
    {"counts": (3, 4, 24), "lower_order_final": False, **TO_FIRST},
    {"counts": (1, 7, 10), "timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "sample"},
    *({"counts": [10], "start": start, "timestep_spacing": "leading", "steps_offset": 1} for start in (1, 2, 5)),
)
CURVED = (
    {"counts": (2, 16), "use_karras_sigmas": True, "prediction_type": "v_prediction"},
    {"counts": (3, 7), "use_exponential_sigmas": True, "timestep_spacing": "trailing"},
)
ALGORITHMS = {
    "dpmpp_2m": ("dpmsolver++", "dpmsolver"),
    "dpmpp_2m_sde": ("sde-dpmsolver++", "sde-dpmsolver"),
    "dpmpp_2s": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
}
DPM_SOLVERS = [
    (name, algorithm, order, solver)
    for name, algorithms in ALGORITHMS.items()
    for algorithm in algorithms
    for order in (1, 2, 3)
    for solver in ("midpoint", "heun")
    if (algorithm, order) != ("sde-dpmsolver", 3)  # for which diffusers has no formula
]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("name, algorithm, order, solver", DPM_SOLVERS)
def test_every_step_of_dpm_solvers(name, algorithm, order, solver):
    settings = {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver, "float64": True}
    is_on_noise = not algorithm.endswith("++")  # for which diffusers has no step to 0
    for run in RUNS if is_on_noise else RUNS + CURVED:
        compare(name, **settings | run | (TO_FIRST if is_on_noise else {}))
    if name != "dpmpp_2s":
        compare(name, [3, 7, 16], euler_at_final=True, **settings | TO_FIRST)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["unipc", "deis"])
def test_every_step_of_unipc_and_deis(name, order):
    for run in RUNS + CURVED:
        if name == "unipc" or "final_sigmas_type" not in run:
            compare(name, **{"solver_order": order, "float64": True} | run)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_every_step_of_other_forms_of_unipc(order, solver, predict_x0):
    settings = {"solver_order": order, "solver_type": solver, "predict_x0": predict_x0, "float64": True} | TO_FIRST
    for more in ({}, {"disable_corrector": [0, 2, 6]}, {"lower_order_final": False}):
        compare("unipc", (1, 4, 16), **settings | more)
    compare("unipc", [10], 5, disable_corrector=[0, 6], **settings)


# Limits of x0, which change every early step here. In diffusers TCD has the settings and does not read them, and
# DPM-Solver in single steps on the noise does not run with a threshold.
CLIPPED, THRESHOLDED = {"clip_sample": True, "clip_sample_range": 0.8}, {"thresholding": True}
HIGHER = THRESHOLDED | {"dynamic_thresholding_ratio": 0.7, "sample_max_value": 3.0, "clip_sample": True}
ON_NOISE = THRESHOLDED | TO_FIRST | {"solver_order": 2}
LIMITS = [
    *((name, limit) for name in ("ddim", "ddpm", "lcm", "tcd") for limit in (CLIPPED, THRESHOLDED, HIGHER)),
    *(
        (name, limit)
        for name in ("dpmpp_2m", "dpmpp_2s", "unipc", "deis", "sa_solver")
        for limit in (THRESHOLDED, HIGHER)
    ),
    ("heun", CLIPPED),
    ("dpmpp_2m", ON_NOISE | {"algorithm_type": "dpmsolver"}),
    ("dpmpp_2m_sde", ON_NOISE | {"algorithm_type": "sde-dpmsolver"}),
    ("dpmpp_2m_sde", HIGHER),
    ("unipc", ON_NOISE | {"predict_x0": False}),
]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name, limit", LIMITS)
def test_every_step_with_limits_of_x0(name, limit, prediction):
    known = inspect.signature(CLASSES[name].__init__).parameters
    settings = {"prediction_type": prediction, "float64": True} | {k: v for k, v in limit.items() if k in known}
    for spacing in SPACINGS:
        compare(name, COUNTS if spacing == SPACINGS[0] else [7], timestep_spacing=spacing, **settings)
    compare(name, [10], 5, **settings)
    if name in ("ddim", "tcd"):
        compare(name, at_step={"eta": 0.5}, chosen={"eta": 0.5}, **settings)


# Settings of where the steps lie, and of the range in which they do.
CONTINUOUS = V | {"timestep_type": "continuous"}
RANGE = {"sigma_min": 0.05, "sigma_max": 20.0}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "float64": True} | V
PLACEMENTS = {
    "lu": ({"use_lu_lambdas": True}, "dpmpp_2m dpmpp_2m_sde"),
    "lu to the first sigma": ({"use_lu_lambdas": True, **TO_FIRST}, "dpmpp_2m"),
    "lu, not karras": ({"use_lu_lambdas": True, "use_karras_sigmas": True}, "dpmpp_2m"),
    "lu before exponential": ({"use_lu_lambdas": True, "use_exponential_sigmas": True}, "dpmpp_2m"),
    "log_linear": ({"interpolation_type": "log_linear"}, "euler"),
    "log_linear, leading": ({"interpolation_type": "log_linear", "timestep_spacing": "leading", **TO_FIRST}, "euler"),
    "log_linear, karras": ({"interpolation_type": "log_linear", "use_karras_sigmas": True}, "euler"),
    "continuous": (CONTINUOUS, "euler"),
    "continuous, karras": (CONTINUOUS | {"use_karras_sigmas": True} | RANGE, "euler"),
    "continuous, but not v": (CONTINUOUS | {"prediction_type": "epsilon"}, "euler"),
    **{f"range, {c}": ({f"use_{c}_sigmas": True} | RANGE, "euler unipc") for c in ("karras", "exponential", "beta")},
    "range, no curve": (RANGE, "euler unipc"),
    "range to its end": ({"use_karras_sigmas": True, "float64": True} | RANGE | TO_FIRST, "euler unipc"),
    "cosine": (COSINE, "dpmpp_2m dpmpp_2m_sde dpmpp_2s sa_solver"),
    "cosine, leading": (COSINE | {"timestep_spacing": "leading"}, "dpmpp_2m"),
    "cosine, trailing": (COSINE | {"timestep_spacing": "trailing"}, "dpmpp_2m"),
    "clipped": ({"lambda_min_clipped": -2.0, "float64": True}, "dpmpp_2m dpmpp_2s"),
    "not clipped": ({"lambda_min_clipped": -math.inf}, "dpmpp_2m"),
}


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, (_, names) in PLACEMENTS.items() for name in names.split()]
)
def test_every_step_where_the_settings_place_it(kind, name):
    counts = COUNTS[1:] if "to its end" in kind else COUNTS  # a single step of UniPC stands still, as for DEIS above
    compare(name, counts, **PLACEMENTS[kind][0])


@pytest.mark.parametrize("algorithm", ["data_prediction", "noise_prediction"])
@pytest.mark.parametrize("predictor, corrector", [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (3, 4), (4, 3), (4, 4)])
def test_every_step_of_sa_solver(predictor, corrector, algorithm):
    settings = {"predictor_order": predictor, "corrector_order": corrector, "algorithm_type": algorithm}
    # Sixteen steps on the noise, of high order and along Karras' curve, lose digits of float32 (1.07e-5).
    for run in RUNS + (CURVED if algorithm == "data_prediction" else CURVED[1:]):
        if "final_sigmas_type" not in run:
            compare("sa_solver", **settings | run)
    compare("sa_solver", (3, 4, 16), lower_order_final=False, **settings)


@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("algorithm", ["data_prediction", "noise_prediction"])
def test_share_of_fresh_noise_of_sa_solver(eta, algorithm):
    tau = lambda t: eta if 200 <= t <= 800 else 0.0  # noqa: E731
    compare("sa_solver", chosen={"eta": eta}, tau_func=tau, algorithm_type=algorithm, corrector_order=3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small_log", "fixed_large", "fixed_large_log"])
def test_every_step_with_another_variance(variance, prediction):
    """diffusers takes the root of a logarithm for "fixed_large_log", which is NaN; it means "fixed_large"."""
    if variance == "fixed_large_log":
        settings = {"_class_name": "DDPMScheduler", "prediction_type": prediction}
        runs = [ours("ddpm", settings | {"variance_type": kind}, 7) for kind in ("fixed_large", variance)]
        assert all(map(np.array_equal, *runs))
        return
    for spacing in SPACINGS:
        compare("ddpm", timestep_spacing=spacing, variance_type=variance, prediction_type=prediction)
    compare("ddpm", [10], 5, variance_type=variance, prediction_type=prediction, steps_offset=1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_step_from_a_start_of_runge_kutta(spacing, prediction):
    """From four steps on, as in diffusers, also where half of the distance is no whole number (of 8, 25 and 30)."""
    settings = {"skip_prk_steps": False, "timestep_spacing": spacing, "prediction_type": prediction}
    compare("pndm", (4, 5, 7, 8, 25, 30), **settings)
    compare("pndm", (4, 25), set_alpha_to_one=True, steps_offset=1, **settings)
    compare("pndm", [12], 5, **settings)


EDM = dict.fromkeys(("dpmpp_2m", "dpmpp_2m_sde"), diffusers.EDMDPMSolverMultistepScheduler)
EDM |= {"euler": diffusers.EDMEulerScheduler}
EDM_SETTINGS = {
    "Playground 2.5": {},
    "CosXL": V | {"sigma_schedule": "exponential", "sigma_max": 120.0, "sigma_data": 1.0},
    "rho": V | {"sigma_min": 0.01, "sigma_max": 40.0, "rho": 5.0},
    "exponential": {"sigma_schedule": "exponential", "sigma_data": 0.8},
}
EDM_SOLVERS = [("euler", {}), ("dpmpp_2m", THRESHOLDED), ("dpmpp_2m", {"euler_at_final": True})]
EDM_SOLVERS += [
    (name, {"solver_order": order, "solver_type": solver})
    for name in ("dpmpp_2m", "dpmpp_2m_sde")
    for order in (1, 2, 3)
    for solver in ("midpoint", "heun")
    if (name, order) != ("dpmpp_2m_sde", 3)  # for which diffusers has no formula
]


@pytest.mark.parametrize("settings", EDM_SETTINGS.values(), ids=EDM_SETTINGS)
@pytest.mark.parametrize("name, solver", EDM_SOLVERS)
def test_every_step_of_edm(name, solver, settings):
    """A single step along the exponential curve begins at its low end in diffusers.

    The last step to the lowest sigma stands still, which diffusers' formulas of higher order make NaN.
    """
    settings = settings | solver | {"float64": True}
    with mock.patch.dict(CLASSES, EDM):
        compare(name, (2, 3, 7, 16, 25), **settings)
        compare(name, [10], 4, **settings)
        if not solver:
            compare(name, (2, 7), **settings | TO_FIRST)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["ddim", "tcd"])
def test_eta(name, eta):
    compare(name, at_step={"eta": eta}, chosen={"eta": eta}, timestep_spacing="leading")


# Samplers of k-diffusion and ComfyUI that diffusers does not have, in their own variables: t = -log(sigma), in float64.


def k_dpmpp_2s_ancestral(denoise, x, sigmas, noise, eta):
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        up = min(target, eta * math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2))
        down = math.sqrt(target**2 - up**2)
        if down == 0:
            x = x + (x - x0) / sigma * (down - sigma)
        else:
            t, t_next = -math.log(sigma), -math.log(down)
            h, middle = t_next - t, math.exp(-(t + t_next) / 2)
            x0 = denoise(middle / sigma * x - math.expm1(-h / 2) * x0, middle)
            x = down / sigma * x - math.expm1(-h) * x0
        yield (x := x + noise[i] * up)


def k_dpmpp_3m_sde(denoise, x, sigmas, noise, eta):
    old, older, h_1, h_2 = None, None, None, None
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        if target == 0:
            yield x0
            return
        h = math.log(sigma / target)
        h_eta = h * (eta + 1)
        x = math.exp(-h_eta) * x - math.expm1(-h_eta) * x0
        phi_2 = math.expm1(-h_eta) / h_eta + 1
        if h_2 is not None:
            r_0, r_1 = h_1 / h, h_2 / h
            d_0, d_1 = (x0 - old) / r_0, (old - older) / r_1
            d = d_0 + (d_0 - d_1) * r_0 / (r_0 + r_1)
            x = x + phi_2 * d - (phi_2 / h_eta - 0.5) * (d_0 - d_1) / (r_0 + r_1)
        elif h_1 is not None:
            x = x + phi_2 * (x0 - old) / (h_1 / h)
        yield (x := x + noise[i] * target * math.sqrt(-math.expm1(-2 * h * eta)))
        old, older, h_1, h_2 = x0, old, h, h_1


def c_res_multistep_a(denoise, x, sigmas, noise, eta):
    """ComfyUI's res_multistep, with phi functions of the step h in t."""
    old, t_old_down = None, None
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma)
        up = min(target, eta * math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2))
        down = math.sqrt(target**2 - up**2)
        if down == 0:
            yield x0
            return
        t, t_down = -math.log(sigma), -math.log(down)
        if old is None:
            x = x + (x - x0) / sigma * (down - sigma)
        else:
            h = t_down - t
            c_2 = (-math.log(sigmas[i - 1]) - t_old_down) / h
            phi_1 = math.expm1(-h) / -h
            phi_2 = (phi_1 - 1) / -h
            x = math.exp(-h) * x + h * ((phi_1 - phi_2 / c_2) * x0 + phi_2 / c_2 * old)
        yield (x := x + noise[i] * up)
        old, t_old_down = x0, t_down


def c_er_sde(denoise, x, sigmas, noise, order=3):
    """ComfyUI's er_sde, whose ``max_stage`` is the order."""
    phi = lambda s: s * (np.exp(s**0.3) + 10.0)  # noqa: E731
    old, old_slope = None, None
    for i, (s, t) in enumerate(pairwise(map(float, sigmas))):
        x0 = denoise(x, sigmas[i])
        if t == 0:
            yield x0
            return
        r = phi(t) / phi(s)
        x = r * x + (1 - r) * x0
        if i > 0 and order > 1:
            width = (s - t) / 200
            points = t + np.arange(200) * width
            slope = (x0 - old) / (s - sigmas[i - 1])
            x = x + (t - s + phi(t) * np.sum(width / phi(points))) * slope
            if i > 1 and order > 2:
                bend = 2 * (slope - old_slope) / (s - sigmas[i - 2])
                x = x + ((t - s) ** 2 / 2 + phi(t) * np.sum(width * (points - s) / phi(points))) * bend
            old_slope = slope
        yield (x := x + noise[i] * math.sqrt(t**2 - (s * r) ** 2))
        old = x0


ADAMS_BASHFORTH = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


def c_ipndm(denoise, x, sigmas, noise, order=4):
    slopes = []
    for sigma, target in pairwise(sigmas):
        x0 = denoise(x, sigma)
        slopes = [(x - x0) / sigma, *slopes][:order]
        weights = ADAMS_BASHFORTH[len(slopes) - 1]
        yield (x := x + (target - sigma) * sum(w * d for w, d in zip(weights, slopes, strict=True)) if target else x0)


def c_euler_a_cfg_pp(denoise, x, sigmas, noise, eta):
    """ComfyUI's euler_ancestral_cfg_pp for models without flow matching."""
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0, uncond = denoise(x, sigma)
        up = min(target, eta * math.sqrt(target**2 * (sigma**2 - target**2) / sigma**2))
        slope = (x - uncond) / sigma
        yield (x := x0 + math.sqrt(target**2 - up**2) * slope + noise[i] * up)


def p_euler_cfg_pp(denoise, x, sigmas, noise):
    """CFG++ as in the paper: DDIM in variance-preserving scale, with alpha the product of its alphas."""
    for sigma, target in pairwise(sigmas):
        x0, uncond = denoise(x, sigma)
        alpha, next_alpha = 1 / (1 + sigma**2), 1 / (1 + target**2)
        z, guided, free = math.sqrt(alpha) * x, (x - x0) / sigma, (x - uncond) / sigma
        clean = (z - math.sqrt(1 - alpha) * guided) / math.sqrt(alpha)
        z = math.sqrt(next_alpha) * clean + math.sqrt(1 - next_alpha) * free
        yield (x := z / math.sqrt(next_alpha))


def c_dpmpp_2m_cfg_pp(denoise, x, sigmas, noise):
    """ComfyUI's dpmpp_2m_cfg_pp."""
    old = None
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        x0, uncond = denoise(x, sigma)
        if target == 0:
            yield x0
            return
        h = math.log(sigma / target)
        mix = -math.exp(-h) * uncond
        if old is not None:
            r = math.log(sigmas[i - 1] / sigma) / h
            mix = mix - math.expm1(-h) / (2 * r) * (x0 - old)
        yield (x := x0 + mix + math.exp(-h) * x)
        old = uncond


ETAS, ORDERS = [{"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0}], [{}, {"order": 1}, {"order": 2}]
REFERENCES = {
    "dpmpp_2s_a": (k_dpmpp_2s_ancestral, ETAS),
    "dpmpp_3m_sde": (k_dpmpp_3m_sde, ETAS),
    "res_multistep_a": (c_res_multistep_a, ETAS),
    "er_sde": (c_er_sde, ORDERS),
    "ipndm": (c_ipndm, [*ORDERS, {"order": 3}]),
    "euler_cfg_pp": (p_euler_cfg_pp, [{}]),
    "euler_a_cfg_pp": (c_euler_a_cfg_pp, ETAS),
    "dpmpp_2m_cfg_pp": (c_dpmpp_2m_cfg_pp, [{}]),
}


@pytest.mark.parametrize("curve", ["default", "karras"])
@pytest.mark.parametrize("name, given", [(name, given) for name, (_, all) in REFERENCES.items() for given in all])
def test_every_step_of_samplers_of_other_programs(name, given, curve):
    schedule = Schedule(ScheduleConfig(**SCALED))
    for count in COUNTS:
        sigmas = schedule.steps(count, SAMPLERS[name].spacing_rule, schedule=curve).sigmas
        x = sigmas[0] * START

        def denoise(x, sigma):
            z, xp = x / math.sqrt(sigma**2 + 1), mx if isinstance(x, mx.array) else np
            x0 = x - sigma * model(xp, z, schedule.timestep(sigma))
            return xp.stack([x0, 0.9 * x0 + 0.1 * x]) if SAMPLERS[name].cfg_pp else x0

        draw = lambda i, shape: mx.array(NOISE[i])  # noqa: E731
        have = list(SAMPLERS[name].run(denoise, mx.array(x), sigmas, draw, **given))
        want = list(REFERENCES[name][0](denoise, x.astype(np.float64), sigmas, NOISE, **given))
        assert len(have) == len(want) == count
        assert max(relative_error(a, b) for a, b in zip(have, want, strict=True)) <= BOUND


# Churn: Karras et al. 2022, algorithm 2, as k-diffusion has it.


def k_churn(name, denoise, x, sigmas, noise, s_churn, s_tmin=0.0, s_tmax=math.inf):
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        level = sigma * (gamma + 1) if gamma else sigma  # which knows its timestep
        x = x + noise[i] * (level**2 - sigma**2) ** 0.5
        d = (x - denoise(x, level)) / level
        ahead = x + d * (target - level)
        if name == "heun" and target > 0:
            ahead = x + (d + (ahead - denoise(ahead, target)) / target) / 2 * (target - level)
        yield (x := ahead)


CHURNS = ({"s_churn": 0.0}, {"s_churn": 2.0}, {"s_churn": 99.0}, {"s_churn": 8.0, "s_tmin": 0.3, "s_tmax": 8.0})


@pytest.mark.parametrize("churn", CHURNS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("curve", ["default", "karras"])
@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn(name, curve, prediction, churn):
    schedule = Schedule(ScheduleConfig(**SCALED, prediction_type=prediction))

    def denoise(x, sigma):
        z = x / math.sqrt(sigma**2 + 1)
        output = model(mx if isinstance(x, mx.array) else np, z, schedule.timestep(sigma))
        return to_x0(schedule.config, output, x, sigma)

    for count in COUNTS:
        for spacing in SPACINGS[: None if curve == "default" else 1]:
            sigmas = schedule.steps(count, spacing=spacing, schedule=curve).sigmas
            x, draws = sigmas[0] * START, []
            draw = lambda i, shape: draws.append(i) or mx.array(NOISE[i])  # noqa: B023, E731
            have = list(SAMPLERS[name].run(denoise, mx.array(x, dtype=mx.float64), sigmas, draw, **churn))
            want = list(k_churn(name, denoise, x.astype(np.float64), sigmas, NOISE, **churn))
            assert len(have) == len(want) == count
            assert max(relative_error(a, b) for a, b in zip(have, want, strict=True)) <= BOUND
            low, high = churn.get("s_tmin", 0.0), churn.get("s_tmax", math.inf)
            assert draws == [i for i in range(count) if churn["s_churn"] and low <= sigmas[i] <= high]


@pytest.mark.parametrize("churn", CHURNS[1:])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_churn_in_diffusers(spacing, churn):
    """Its pipelines run the network before the noise is added; here it is given the output for the noisier latents."""
    for count in COUNTS:
        scheduler = make("euler", timestep_spacing=spacing)
        schedule = Schedule(ScheduleConfig.from_dict(dict(scheduler.config)))
        have = ours("euler", dict(scheduler.config), count, **churn)
        scheduler.set_timesteps(count)
        x = torch.from_numpy(START) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            sigma, after = map(float, scheduler.sigmas[i : i + 2])
            is_churned = churn.get("s_tmin", 0.0) <= sigma <= churn.get("s_tmax", math.inf)
            level = sigma * (1 + min(churn["s_churn"] / count, 2**0.5 - 1) * is_churned)
            noisier = x.numpy() + math.sqrt(level**2 - sigma**2) * NOISE[i]
            timestep = schedule.timestep(level) if is_churned else float(t)
            output = torch.from_numpy(model(np, noisier / math.sqrt(level**2 + 1), timestep))
            scheduler.scale_model_input(x, t)
            drawn = mock.Mock(return_value=torch.from_numpy(NOISE[i]))
            with mock.patch("diffusers.schedulers.scheduling_euler_discrete.randn_tensor", drawn):
                x = scheduler.step(output, t, x, **churn).prev_sample
            assert drawn.called == is_churned
            assert relative_error(have[i + 1], x.numpy() / math.sqrt(after**2 + 1)) <= BOUND
