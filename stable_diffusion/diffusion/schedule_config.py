"""The settings of a noise schedule and of the sampler that a checkpoint prefers, from its scheduler_config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..models.config import Config, short

SPACINGS = ("leading", "trailing", "linspace")  # Lin et al. 2024, table 2

# Settings that change the noise levels or the timesteps, with the values that are computed here.
_NOISE_SETTINGS: Mapping[str, tuple] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "sigma_min": (),
    "sigma_max": (),
}

# Settings of a checkpoint's preferred sampler, with the values that the sampler here has; then those of its class.
_SAMPLER_SETTINGS: Mapping[str, tuple] = {
    "thresholding": (False,),
    "clip_sample": (False,),
    "disable_corrector": ([],),
    "solver_p": (),
    "predict_x0": (True,),
}
_CLASS_SETTINGS: Mapping[str, Mapping[str, tuple]] = {
    "DPMSolverMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),
        "lower_order_final": (True,),
    },
    "DEISMultistepScheduler": {"solver_order": (2,)},
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    "DDPMScheduler": {"variance_type": ("fixed_small",)},
}

# The pipelines in which diffusers reads any steps_offset as 1: old files lack it, and were trained with 1.
_OFFSET_ONE = {f"StableDiffusion{mode}Pipeline" for mode in ("", "Img2Img", "Inpaint")}


@dataclass(frozen=True)
class ScheduleConfig(Config):
    """Describe the noise that a model was trained on and its preferred sampler, from ``scheduler_config.json``.

    ``timestep_spacing`` is None where the file has none: the default then depends on the sampler. ``sigma_schedule``
    gathers the flags ``use_karras_sigmas``, ``use_exponential_sigmas`` and ``use_beta_sigmas``. ``not_followed`` lists
    settings of the preferred sampler, such as "solver_order=3", that the samplers here do not have.
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
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    sigma_schedule: str = "default"
    final_sigmas_type: str = "zero"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    algorithm_type: str | None = None
    lower_order_final: bool = True
    not_followed: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], pipeline: str = "") -> Self:
        """Read a scheduler's JSON; ValueError names a setting of the noise that is not computed here.

        ``pipeline`` is the class of diffusers that the checkpoint is for.
        """
        fields = {**raw, "class_name": raw.get("_class_name", "DDIMScheduler")}
        if pipeline in _OFFSET_ONE:
            fields["steps_offset"] = 1
        curves = [name for name in ("karras", "exponential", "beta") if raw.get(f"use_{name}_sigmas")]
        if len(curves) > 1:
            raise ValueError(f"scheduler config: only one of use_{'_sigmas, use_'.join(curves)}_sigmas can hold")
        fields["sigma_schedule"] = curves[0] if curves else "default"
        for key, supported in _NOISE_SETTINGS.items():
            if raw.get(key) not in (None, *supported):
                names = f" (supported: {', '.join(map(repr, supported))})" if supported else ""
                raise ValueError(f"scheduler config: {key}={short(raw[key])} is not supported{names}")
        followed = _SAMPLER_SETTINGS | _CLASS_SETTINGS.get(fields["class_name"], {})
        fields["not_followed"] = tuple(
            f"{key}={short(raw[key])}" for key, supported in followed.items() if raw.get(key) not in (None, *supported)
        )
        config = super().from_dict(fields)
        betas = (config.beta_start, config.beta_end, *(config.trained_betas or ()))
        if wrong := [beta for beta in betas if not 0 <= beta <= 1]:
            raise ValueError(f"scheduler config: a beta of {wrong[0]} is no share of noise; take it from its source")
        return config
