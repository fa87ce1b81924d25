"""Every scheduler class of diffusers: what an absent setting is, and which are followed or refused by name."""

import inspect
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

import stable_diffusion
from diffusion.test_trajectories import BOUND, SCALED, ForNumPy2, ours, theirs
from oracle import relative_error
from stable_diffusion import StableDiffusion
from stable_diffusion.diffusion import schedule_config
from stable_diffusion.diffusion.choice import describe, sampler_for
from stable_diffusion.diffusion.samplers import SAMPLERS
from stable_diffusion.diffusion.schedule import SPACING_RULES, Schedule, ScheduleConfig
from stable_diffusion.options import SettingError
from stable_diffusion.weights.catalog import SCHEDULERS
from stable_diffusion.weights.files import open_checkpoint, with_few_steps
from stable_diffusion.weights.layout import check_noise

TINY = Path(stable_diffusion.__file__).parent / "tiny"
DOCS = (Path(__file__).parents[2] / "docs/samplers.md").read_text(encoding="utf-8")
DOCUMENTED = dict(re.findall(r"^\| `(\w+Scheduler)` \| ([^|]+?) +\|", DOCS, re.MULTILINE))
CLASSES = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))
FOLLOWED = [name for name in CLASSES if "`" in DOCUMENTED.get(name, "")]

LEFT_OVER = {"use_karras_sigmas": True, "predictor_order": 2, "noise_sampler_seed": 3, "flow_shift": 3.0}


def defaults(name: str) -> dict:
    """The settings of a class in diffusers, but those that must be given."""
    parameters = inspect.signature(getattr(diffusers.schedulers, name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def result(raw: dict) -> str:
    """What becomes of a checkpoint with these settings, in the words of the documentation."""
    try:
        check_noise(raw, "checkpoint")
        config = ScheduleConfig.from_dict(raw)
    except ValueError:
        return "refused at opening"
    sampler = sampler_for(config)
    return f"`{sampler}`" if sampler else "refused"


def test_the_documentation_has_a_row_for_every_class():
    assert sorted(DOCUMENTED) == CLASSES and len(CLASSES) == 51
    for name in CLASSES:
        assert result(defaults(name) | {"_class_name": name}) == DOCUMENTED[name], name


@pytest.mark.parametrize("name", FOLLOWED)
def test_an_absent_setting_is_the_default_of_its_class(name):
    bare, full = {"_class_name": name}, {"_class_name": name} | defaults(name)
    configs = [ScheduleConfig.from_dict(raw) for raw in (bare, full)]
    of_sampler = {"timestep_spacing": None, "set_alpha_to_one": None, "algorithm_type": None}
    of_sampler |= {"solver_order": None, "solver_type": None, "predictor_order": None, "corrector_order": None}
    assert configs[0] == replace(configs[1], **of_sampler)
    assert result(bare) == result(full)
    rule = SAMPLERS[re.search(r"`(\w+)`", DOCUMENTED[name])[1]].spacing_rule
    steps = [Schedule(config).steps(7, rule) for config in configs]
    assert steps[0] == steps[1]
    if "timestep_spacing" in full:
        assert SPACING_RULES[rule].spacing == full["timestep_spacing"]
    if "beta_start" not in full:  # EDM
        return
    oracle = diffusers.DDIMScheduler(**{key: full[key] for key in ("beta_start", "beta_end", "beta_schedule")})
    assert Schedule(configs[0]).alphas_cumprod == pytest.approx(oracle.alphas_cumprod.double().tolist(), rel=1e-6)


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_setting_of_another_class_changes_nothing(name):
    """As in diffusers, which keeps such settings when the scheduler of a pipeline is exchanged."""
    rule = SAMPLERS[re.search(r"`(\w+)`", DOCUMENTED[name])[1]].spacing_rule
    usual, left = (Schedule(ScheduleConfig.from_dict({"_class_name": name} | more)) for more in ({}, LEFT_OVER))
    is_read = "use_karras_sigmas" in defaults(name)
    assert (usual.steps(7, rule) == left.steps(7, rule)) == (not is_read)
    assert result({"_class_name": name} | LEFT_OVER) == result({"_class_name": name})


def test_every_setting_of_the_tables_is_one_of_its_class():
    for name, settings in schedule_config._CLASS_SETTINGS.items():
        assert settings.keys() <= defaults(name).keys(), name
    for key, names in schedule_config._PLACEMENT.items():
        assert set(names) == {name for name in FOLLOWED if key in defaults(name)}, key
    for name, settings in schedule_config._CLASS_DEFAULTS.items():
        assert settings.items() <= defaults(name).items(), name


@pytest.mark.parametrize("name", [name for name in FOLLOWED if DOCUMENTED[name].startswith("`")])
def test_no_setting_of_a_followed_class_is_overlooked(name):
    """Of each class the settings are read as fields, in its own table or named as being without effect."""
    fields = schedule_config.ScheduleConfig.__dataclass_fields__
    known = fields.keys() | schedule_config._CLASS_SETTINGS.get(name, {}).keys() | schedule_config._CURVE_FLAGS.keys()
    known |= schedule_config._NOISE_SETTINGS.keys() | schedule_config._WITHOUT_EFFECT
    known |= schedule_config._PLACEMENT.keys()
    same = schedule_config._SAME_CLASSES.get(name)
    known |= schedule_config._CLASS_SETTINGS.get(same, {}).keys()
    assert defaults(name).keys() <= known


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_sampler_of_a_model_for_few_steps_is_followed(sampler):
    """Whatever scheduler the checkpoint had before, with few settings."""
    checkpoint = replace(open_checkpoint(TINY), scheduler={"_class_name": "LMSDiscreteScheduler"}, pipeline="")
    settings = {"sampler": sampler, "num_steps": 4, "cfg_weight": 0.0, "spacing": "trailing"}
    config = ScheduleConfig.from_dict(with_few_steps(checkpoint, settings).scheduler)
    assert sampler_for(config) == sampler and config.timestep_spacing == "trailing"


ORDER_4 = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}


@pytest.mark.parametrize("setting", [{"_class_name": "IPNDMScheduler"}, ORDER_4, {"novel": 0.5}])
def test_a_run_with_a_scheduler_that_is_not_computed_needs_a_sampler(tmp_path, setting):
    """The checkpoint opens and its noise is read; each way to choose a sampler is one."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "scheduler/scheduler_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | setting))
    sd, usual = StableDiffusion(tmp_path), StableDiffusion(TINY)
    assert sd.sampler is None and "no sampler" in repr(sd) and sd.schedule.sigmas == usual.schedule.sigmas
    missing = " ".join(f"{key}={value}" for key, value in setting.items() if key != "_class_name")
    needed = re.escape(f"{setting.get('_class_name', raw['_class_name'])}{missing and ', ' + missing}")
    with pytest.raises(SettingError, match=f"scheduler is not supported, {needed}; choose one: sampler NAME$"):
        sd.generate_latents("a fox", num_steps=2)
    want = next(usual.generate_latents("a fox", num_steps=2, seed=1))
    assert mx.array_equal(next(sd.generate_latents("a fox", num_steps=2, seed=1, sampler="ddim")), want)
    sd.sampler = "ddim"
    assert mx.array_equal(next(sd.generate_latents("a fox", num_steps=2, seed=1)), want)


# --- products of settings ---------------------------------------------------------------------------------------------

LISTED = {scheduler.name for scheduler in KarrasDiffusionSchedulers}  # by the pipelines of Stable Diffusion
COMPATIBLE = [n for n in CLASSES if LISTED & {n, *getattr(getattr(diffusers.schedulers, n), "_compatibles", ())}]
COUNTS = (1, 2, 3, 7, 16, 25)
VALUES = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "steps_offset": (0, 1),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "rescale_betas_zero_snr": (False, False, True),
    "set_alpha_to_one": (True, False),
    "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
    "predictor_order": (1, 2, 3),
    "corrector_order": (1, 2, 3, 4),
    "final_sigmas_type": ("zero", "sigma_min", "sigma_min"),
    "lower_order_final": (True, False),
    "euler_at_final": (False, True),
    "predict_x0": (True, True, False),
    "clip_sample": (False, True),
    "clip_sample_range": (0.7, 1.0),
    "thresholding": (False, True),
    "sample_max_value": (1.0, 2.5),
    "dynamic_thresholding_ratio": (0.8, 0.995),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    "interpolation_type": ("linear", "linear", "log_linear"),
    "skip_prk_steps": (True, False),
}
SOLVERS = {"UniPCMultistepScheduler": ("bh1", "bh2"), "DEISMultistepScheduler": ("logrho",)}
CURVES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def drawn(name: str, rng: random.Random) -> tuple[dict, int]:
    """A combination of the settings that a class knows, and a number of steps."""
    known = inspect.signature(getattr(diffusers, name).__init__).parameters
    settings = {key: rng.choice(values) for key, values in VALUES.items() if key in known}
    if "solver_type" in known:
        settings["solver_type"] = rng.choice(SOLVERS.get(name, ("midpoint", "heun")))
    if name == "DEISMultistepScheduler":
        settings["algorithm_type"] = "deis"
    if name == "HeunDiscreteScheduler":  # in two steps along a curve it rounds clipped values in float32
        settings["clip_sample"] = False
    if name == "SASolverScheduler":
        settings["algorithm_type"] = rng.choice(("data_prediction", "noise_prediction"))
    if name.startswith("EDM"):  # whose class has no other values
        settings["prediction_type"] = rng.choice(("epsilon", "v_prediction"))
        settings |= {"algorithm_type": rng.choice(("dpmsolver++", "sde-dpmsolver++"))} if "DPM" in name else {}
    if not name.startswith("DDPM"):
        settings.pop("variance_type", None)
    if settings.get("rescale_betas_zero_snr"):  # which models that predict v have, and no method on the noise resolves
        settings |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
        settings |= {"algorithm_type": "dpmsolver++"} if "algorithm_type" in known else {}
        settings |= {"predict_x0": True} if "predict_x0" in known else {}
    curve, count = rng.choice([None, None, *(curve for curve in CURVES if curve in known)]), rng.choice(COUNTS)
    settings |= {curve: True} if curve else {}
    settings = {key: value for key, value in SCALED.items() if key in known} | settings  # EDM has no betas
    is_curved = curve or name.startswith("EDM")
    return settings, max(count, 2) if is_curved else count  # a single step along a curve may stand still there


def oracle(name: str, sampler: str, settings: dict, count: int) -> list[np.ndarray] | None:
    """The steps of diffusers' scheduler, or None where it fails itself."""
    cls = getattr(diffusers, name)
    cls = type(name, (ForNumPy2, cls), {}) if sampler.startswith("dpm2") else cls
    try:
        steps = theirs(sampler, cls(**settings), count, float64=True)
    except (ValueError, RuntimeError, NameError):
        return None
    return steps if all(np.isfinite(x).all() for x in steps) else None


@pytest.mark.filterwarnings("ignore")  # of what is deprecated, and of divisions by zero, in diffusers
@pytest.mark.parametrize("name", sorted({*COMPATIBLE, *FOLLOWED}))
def test_products_of_settings_are_followed_or_refused_by_name(name):
    rng, followed = random.Random(name), 0
    for settings, count in (drawn(name, rng) for _ in range(16)):
        raw = {"_class_name": name} | settings
        config = ScheduleConfig.from_dict(raw)
        sampler = sampler_for(config)
        if sampler is None:
            assert name.replace("Parallel", "") in describe(config)
        elif want := oracle(name, sampler, settings, count):
            have = ours(sampler, raw, count)
            errors = [relative_error(a, b) for a, b in zip(have, want, strict=True)]
            assert max(errors) <= BOUND, (settings, count)
            followed += 1
    assert (followed >= 3) == (name in FOLLOWED)
