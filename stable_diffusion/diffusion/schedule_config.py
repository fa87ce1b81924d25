"""The settings of a checkpoint's noise schedule and preferred sampler, from its scheduler_config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from ..models.config import Config, short

_CURVE_FLAGS = {f"use_{curve}_sigmas": curve for curve in ("karras", "exponential", "beta")}
SPACINGS = ("leading", "trailing", "linspace")  # Lin et al. 2024, table 2

# Settings of every model's noise and timesteps, with the supported values.
_NOISE_SETTINGS: Mapping[str, tuple] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_type": ("discrete", "continuous"),
    "use_flow_sigmas": (False,),
}

# Further settings of each class, with the supported values. For some values of other classes, diffusers uses the
# class's only one. An absent setting has the first value, or one of _CLASS_DEFAULTS.
_THRESHOLDED: Mapping[str, tuple] = {"thresholding": (False, True)}
_CLIPPED = _THRESHOLDED | {"clip_sample": (False, True)}
_SOLVER = _THRESHOLDED | {"solver_order": (1, 2, 3), "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2")}
_VARIANCES = {"variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")}
_ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++", "deis", "dpmsolver", "sde-dpmsolver")
_EDM: Mapping[str, tuple] = {"sigma_schedule": ("karras", "exponential")}
_CLASS_SETTINGS: Mapping[str, Mapping[str, tuple]] = {
    "DDIMScheduler": _CLIPPED,
    "DDPMScheduler": _CLIPPED | _VARIANCES,
    "DEISMultistepScheduler": _SOLVER,
    "DPMSolverMultistepScheduler": _SOLVER | _VARIANCES | {"algorithm_type": _ALGORITHMS},
    "DPMSolverSinglestepScheduler": _SOLVER | _VARIANCES | {"algorithm_type": _ALGORITHMS[:4]},
    "EDMDPMSolverMultistepScheduler": _SOLVER | _EDM | {"algorithm_type": _ALGORITHMS[:3]},
    "EDMEulerScheduler": _EDM,
    "EulerDiscreteScheduler": {"interpolation_type": ("linear", "log_linear")},
    "HeunDiscreteScheduler": {"clip_sample": (False, True)},
    "LCMScheduler": _CLIPPED,
    "SASolverScheduler": _THRESHOLDED
    | _VARIANCES
    | dict.fromkeys(("predictor_order", "corrector_order"), (1, 2, 3, 4))
    | {"tau_func": (), "algorithm_type": ("data_prediction", "noise_prediction")},
    "UniPCMultistepScheduler": _SOLVER | {"solver_order": (1, 2, 3, 4), "solver_p": ()},
}

# Settings of the spacing of steps, and the classes that read them.
_DPM = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")
_OF_EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
_PLACEMENT: Mapping[str, tuple[str, ...]] = {
    "lambda_min_clipped": (*_DPM, "SASolverScheduler"),
    "use_lu_lambdas": _DPM[:1],
    **dict.fromkeys(("interpolation_type", "timestep_type"), ("EulerDiscreteScheduler",)),
    **dict.fromkeys(("sigma_max", "sigma_min"), ("EulerDiscreteScheduler", "UniPCMultistepScheduler", *_OF_EDM)),
    **dict.fromkeys(("rho", "sigma_data", "sigma_schedule"), _OF_EDM),
}

# Defaults of classes that differ from the first value above or from the default of the field below.
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
_CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    **dict.fromkeys(("HeunDiscreteScheduler", "DPMSolverSDEScheduler"), _STABLE_DIFFUSION),
    **dict.fromkeys(("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), _STABLE_DIFFUSION),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), _STABLE_DIFFUSION | {"beta_schedule": "scaled_linear"}),
    "DPMSolverSinglestepScheduler": {"lower_order_final": False},
    **{n: {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras"} for n in _OF_EDM},
    "PNDMScheduler": {"skip_prk_steps": False},
}

# Classes of the same method as another one.
_SAME_CLASSES = {"DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler"}

# Settings without effect on a run: a generator's seed, flow matching, settings of unsupported classes and of the first
# versions of diffusers.
_WITHOUT_EFFECT = {"noise_sampler_seed", "flow_shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"}
_WITHOUT_EFFECT |= {"tensor_format", "timestep_values", "predict_epsilon", "dtype"}

# In these pipelines diffusers corrects missing or wrong settings of old files.
_OLD_FILES = {"steps_offset": 1, "clip_sample": False}
_PIPELINE_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": _OLD_FILES,
    "StableDiffusionImg2ImgPipeline": _OLD_FILES,
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """Describe the noise that a model was trained on and its preferred sampler, from ``scheduler_config.json``.

    ``timestep_spacing`` and ``set_alpha_to_one`` are None if the file does not set them: the default then depends on
    the sampler. ``sigma_schedule`` combines the flags ``use_karras_sigmas``, ``use_exponential_sigmas``,
    ``use_beta_sigmas`` and ``use_lu_lambdas``. ``sigma_max`` and ``sigma_min`` are the ends of curves, by default the
    training's. ``lambda_min_clipped`` is a lower limit of -log(sigma). With ``timestep_type`` "continuous" the
    network's input is log(sigma) / 4. ``sigma_data`` is the standard deviation of the data of an EDM model (Karras et
    al. 2022); None means a model of Ho et al. 2020. An EDM model uses the curve ``sigma_schedule``, with the exponent
    ``rho`` for "karras". ``missing`` lists unsupported settings of the preferred sampler, such as "solver_order=4", and
    unknown ones.
    """

    kind: ClassVar[str] = "scheduler"

    class_name: str = "DDIMScheduler"
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    rescale_betas_zero_snr: bool = False
    sigma_schedule: str = "default"
    sigma_max: float | None = None
    sigma_min: float | None = None
    sigma_data: float | None = None
    rho: float = 7.0
    lambda_min_clipped: float | None = None
    interpolation_type: str = "linear"
    timestep_type: str = "discrete"
    final_sigmas_type: str = "zero"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    algorithm_type: str | None = None
    lower_order_final: bool = True
    euler_at_final: bool = False
    solver_order: int | None = None
    solver_type: str | None = None
    predictor_order: int | None = None
    corrector_order: int | None = None
    predict_x0: bool = True
    disable_corrector: tuple[int, ...] = ()
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    variance_type: str = "fixed_small"
    skip_prk_steps: bool = True
    missing: tuple[str, ...] = ()

    @property
    def data_variance(self) -> float:
        """Return the variance of the clean latents in c_in and c_skip of Karras et al. 2022, table 1."""
        return 1.0 if self.sigma_data is None else self.sigma_data**2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], pipeline: str = "") -> Self:
        """Read a scheduler's JSON; ValueError names an unsupported setting of the noise.

        ``pipeline`` is the checkpoint's pipeline class in diffusers.
        """
        name = str(raw.get("_class_name", cls.class_name)).removeprefix("Flax")
        name = _SAME_CLASSES.get(name, name)
        given = {key: value for key, value in raw.items() if value not in (None, -math.inf)}
        raw = _CLASS_DEFAULTS.get(name, {}) | given | _PIPELINE_SETTINGS.get(pipeline, {})
        curves = [curve for flag, curve in _CURVE_FLAGS.items() if raw.get(flag)]
        if len(curves) > 1:
            raise ValueError(f"scheduler config: only one of use_{'_sigmas, use_'.join(curves)}_sigmas can be true")
        for key, supported in _NOISE_SETTINGS.items():
            if raw.get(key) not in (None, *supported):
                names = f" (supported: {', '.join(map(repr, supported))})"
                raise ValueError(f"scheduler config: {key}={short(raw[key])} is not supported{names}")
        raw = {key: value for key, value in raw.items() if name in _PLACEMENT.get(key, (name,))}
        if raw.get("prediction_type") != "v_prediction":  # as in diffusers
            raw.pop("timestep_type", None)
        curves += ["lu"] if raw.get("use_lu_lambdas") and curves != ["karras"] else []
        chosen = {"class_name": name, "sigma_schedule": curves[-1] if curves else "default"}
        if name in _OF_EDM:
            chosen |= {"sigma_schedule": raw["sigma_schedule"], "timestep_type": "continuous"}
        chosen |= dict.fromkeys({"clip_sample", "thresholding"} - _CLASS_SETTINGS.get(name, {}).keys(), False)
        config = super().from_dict({**raw, **chosen, "missing": cls._unsupported(name, raw)})
        low, high = config.sigma_min, config.sigma_max
        if not 0 < (1e-12 if low is None else low) < (math.inf if high is None else high):
            raise ValueError(f"scheduler config: sigma_min={low} must lie between 0 and sigma_max={high}")
        if min(config.rho, 1.0 if config.sigma_data is None else config.sigma_data) <= 0:
            raise ValueError(f"scheduler config: sigma_data={config.sigma_data} and rho={config.rho} must be above 0")
        betas = (config.beta_start, config.beta_end, *(config.trained_betas or ()))
        if wrong := [beta for beta in betas if not 0 <= beta <= 1]:
            raise ValueError(f"scheduler config: beta {wrong[0]} must lie in 0 ... 1; download it again")
        ratio, highest = config.dynamic_thresholding_ratio, config.sample_max_value
        if config.thresholding and (not 0 <= ratio <= 1 or highest <= 0):
            text = f"dynamic_thresholding_ratio={ratio} must lie in 0 ... 1, sample_max_value={highest} above 0"
            raise ValueError(f"scheduler config: {text}; download it again")
        return config

    @classmethod
    def _unsupported(cls, name: str, raw: Mapping[str, Any]) -> tuple[str, ...]:
        """Return unsupported and unknown settings of the sampler."""
        own, missing = _CLASS_SETTINGS.get(name, {}), []
        others = [field.name for field in fields(cls)] + [key for keys in _CLASS_SETTINGS.values() for key in keys]
        others += [*_NOISE_SETTINGS, *_WITHOUT_EFFECT, *_CURVE_FLAGS, *_PLACEMENT]
        for key, value in raw.items():
            if key in own:
                if value not in own[key]:
                    missing.append(f"{key}={short(value)}")
            elif not (key in others or key.startswith("_") or value in (False, [], {})):
                missing.append(f"{key}={short(value)}")
        if raw.get("timestep_type") == "continuous" and raw.get("interpolation_type") == "log_linear":
            missing.append("interpolation_type='log_linear'")  # diffusers runs an extra step for it
        return tuple(missing)
