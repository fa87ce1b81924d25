"""Choose the sampler of a run, by name, by the checkpoint's scheduler or as a function, and its options."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import mlx.core as mx

from ..models.config import listed
from .multistep import singlestep_orders
from .samplers import SAMPLERS, Sampler, States
from .schedule import SCHEDULES, Schedule, Steps
from .schedule_config import ScheduleConfig
from .transitions import threshold

# Names in other programs (A1111's web UI, ComfyUI, InvokeAI, stable-diffusion.cpp), as `_key` writes them.
_SAMPLER_ALIASES = {"plms": "pndm", "unipcbh2": "unipc", "dpmsolverpp": "dpmpp_2m"}
_SCHEDULE_ALIASES = {"normal": "default", "uniform": "default", "discrete": "default", "ays": "align_your_steps"}
_SCHEDULE_ALIASES |= {"ddim": "ddim_uniform"}
_SAME_METHODS = {"EDMEuler": "EulerDiscrete", "EDMDPMSolverMultistep": "DPMSolverMultistep"}  # in sigma space
_CLOSE = 0.85  # difflib's ratio; a name at or above it counts as a misspelling


def read_name(name: str) -> tuple[str, str | None]:
    """Read (sampler, schedule) from any usual spelling: "dpmpp_2m", "DPM++ 2M Karras", "k_euler_a".

    The schedule is None if the name has none. ValueError names a similar sampler, or lists all.
    """
    if name in SAMPLERS:
        return name, None
    key, samplers = _key(name).removesuffix("scheduler").removesuffix("gpu"), _sampler_names()
    endings = {"": None, "k": "karras", "ka": "karras"} | _schedule_names()
    known = {sampler + ending: (samplers[sampler], endings[ending]) for sampler in samplers for ending in endings}
    for candidate in (key, key.removeprefix("k"), key.removeprefix("sample")):
        if candidate in known:
            return known[candidate]
    similar = {_key(text): text for sampler in SAMPLERS for text in (sampler, *(f"{sampler} {s}" for s in SCHEDULES))}
    raise _unknown("sampler", name, SAMPLERS, _closest(key, similar))


def read_schedule(name: str) -> str:
    """Return the schedule for any usual spelling: "karras", "Karras", "SGM Uniform", "ays", "normal".

    ValueError names a similar schedule, or lists all.
    """
    key, known = _key(name), _schedule_names()
    if key in known:
        return known[key]
    raise _unknown("schedule", name, SCHEDULES, _closest(key, known))


def _sampler_names() -> dict[str, str]:
    classes = {_key(row.scheduler): name for name, row in SAMPLERS.items() if row.scheduler}
    return {_key(name): name for name in SAMPLERS} | classes | _SAMPLER_ALIASES


def _schedule_names() -> dict[str, str]:
    return {_key(name): name for name in SCHEDULES} | _SCHEDULE_ALIASES


def _closest(key: str, known: Mapping[str, str]) -> str | None:
    return next((known[match] for match in get_close_matches(key, known, 1, _CLOSE)), None)


def _unknown(kind: str, name: str, known: Iterable[str], nearest: str | None) -> ValueError:
    remedy = f"did you mean {nearest}?" if nearest else f"choose one of {', '.join(known)}"
    return ValueError(f"{kind} {name!r} is unknown; {remedy}")


def _key(name: str) -> str:
    letters = "".join(c for c in name.lower().replace("+", "p") if c.isalnum())
    return letters.replace("ancestral", "a")


def find_sampler(sampler: str | Callable[..., States], **chosen: Any) -> tuple[Sampler, str | None]:
    """Return the row of a sampler's name with the schedule in the name, or a row for a sampler function.

    Raises ValueError for an unknown name, for a ``chosen`` option that the sampler does not have, and for an order that
    is too high. Options that are None are ignored.
    """
    if callable(sampler):
        name, schedule, row = getattr(sampler, "__name__", repr(sampler)), None, Sampler(sampler, stochastic=True)
    else:
        name, schedule = read_name(sampler)
        row = SAMPLERS[name]
    if unknown := {option for option, value in chosen.items() if value is not None} - row.option_names:
        raise ValueError(f"sampler {name} takes no {', '.join(sorted(unknown))}; omit it")
    if (chosen.get("order") or 1) > row.highest_order:
        raise ValueError(f"sampler {name} has no order {chosen['order']}; choose 1 to {row.highest_order}")
    return row, schedule


def is_cfg_pp(sampler: str | Callable[..., States] | None) -> bool:
    """Return whether a sampler uses CFG++, which needs the negative prompt at every guidance scale."""
    return sampler is not None and find_sampler(sampler)[0].cfg_pp


def guidance_scale(sampler: str | Callable[..., States] | None, cfg_weight: float | None, of_model: float) -> float:
    """Return a run's guidance scale, by default the model's; CFG++: 0.6 (Chung et al. 2024), or 1 without guidance."""
    if cfg_weight is not None:
        return cfg_weight
    if not is_cfg_pp(sampler):
        return of_model
    return 0.6 if of_model > 1 else 1.0


def sampler_for(config: ScheduleConfig) -> str | None:
    """Return the sampler that computes a checkpoint's scheduler, or None."""
    return None if config.missing else _scheduler_sampler(config)


def _scheduler_sampler(config: ScheduleConfig) -> str | None:
    names = {row.scheduler: name for name, row in SAMPLERS.items() if row.scheduler}
    scheduler, algorithm = config.class_name.removesuffix("Scheduler"), config.algorithm_type or ""
    scheduler = _SAME_METHODS.get(scheduler, scheduler)
    return names.get(f"{scheduler}:{algorithm.partition('-')[0]}", names.get(scheduler))


def _scheduler_options(config: ScheduleConfig) -> dict[str, Any]:
    algorithm, is_unipc = config.algorithm_type or "", config.class_name.startswith("UniPC")
    variant = "bh1" if is_unipc else "heun"  # any other name means the default one
    is_on_noise = algorithm in ("dpmsolver", "sde-dpmsolver", "noise_prediction")
    options = {
        "order": config.predictor_order if config.class_name.startswith("SASolver") else config.solver_order,
        "corrector_order": config.corrector_order,
        "solver_type": variant if config.solver_type == variant else None,
        "predict_x0": config.predict_x0 if is_unipc else not is_on_noise,
        "eta": 1.0 if algorithm.startswith("sde-") else None,
        "euler_at_final": config.euler_at_final,
        "bend_offset": float(algorithm == "sde-dpmsolver++"),
    }
    return {name: value for name, value in options.items() if value is not None}


def describe(config: ScheduleConfig) -> str:
    """Name a checkpoint's scheduler, with its unsupported settings."""
    return listed((config.class_name, *config.missing), most=4)


def clip_for(sampler: Sampler, config: ScheduleConfig) -> Callable[[mx.array], mx.array] | None:
    """Return the clipping of x0 in a checkpoint's scheduler, for the matching sampler; thresholding has priority.

    Both are meant for pixels in [-1, 1]. UniPC uses thresholding only if it predicts x0, as in diffusers.
    """
    if not _is_own(sampler, config):
        return None
    if config.thresholding and config.predict_x0:
        return partial(threshold, ratio=config.dynamic_thresholding_ratio, highest=config.sample_max_value)
    highest = config.clip_sample_range
    return partial(mx.clip, a_min=-highest, a_max=highest) if config.clip_sample else None


def _is_own(sampler: Sampler, config: ScheduleConfig) -> bool:
    return SAMPLERS.get(_scheduler_sampler(config) or "") is sampler


def run_options(sampler: Sampler, schedule: Schedule, steps: Steps, **chosen: Any) -> dict[str, Any]:
    """Return the keyword arguments of a sampler for one run: the ``chosen`` ones that are not None, and the run's.

    The settings of a checkpoint's scheduler apply only to the matching sampler.
    """
    config, names, is_own = schedule.config, sampler.option_names, _is_own(sampler, schedule.config)
    options = _scheduler_options(config) if is_own else {}
    options = {name: value for name, value in options.items() if name in names}
    options |= {name: value for name, value in chosen.items() if value is not None}
    if not len(steps):
        return options
    skipped, is_short = steps.total - len(steps), steps.total < 15  # as in diffusers
    lowered = (SAMPLERS["unipc"], SAMPLERS["sa_solver"])  # in runs of any length
    of_run = {
        "velocity": lambda: config.prediction_type == "v_prediction",
        "target_sigmas": lambda: schedule.target_sigmas(steps),
        "repeat_sigma": lambda: schedule.repeat_sigma(steps),
        "tcd_sigmas": lambda: schedule.tcd_sigmas(steps, options.get("eta", 0.3)),
        "lower_order_final": lambda: config.lower_order_final and (is_short or sampler in lowered),
        "orders": lambda: singlestep_orders(
            options.get("order", 2), steps.total, steps.sigmas[-1] == 0, config.lower_order_final
        )[skipped:],
        "clip": lambda: clip_for(sampler, config),
        "taus": lambda: [options.get("eta", 1.0) * (200 <= t <= 800) for t in steps.timesteps],  # as in diffusers
        "noise_sigmas": lambda: schedule.beta_sigmas(steps) if is_own and "large" in config.variance_type else None,
        "half_sigmas": lambda: schedule.half_sigmas(steps) if is_own and not config.skip_prk_steps else (),
        "disable_corrector": lambda: [step - skipped for step in config.disable_corrector],
    }
    return {name: of_run[name]() for name in names & of_run.keys()} | options


def table() -> str:
    """Format all samplers as text, one a line: name, order, evaluations in a step, stochastic or not, reference."""
    rows = [("sampler", "order", "evaluations", "stochastic", "reference")]
    for name, s in SAMPLERS.items():
        rows.append((name, str(s.order), str(s.evaluations), "yes" if s.stochastic else "no", s.reference))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
