"""Plan a run before anything is computed: its steps, its sampler, its random numbers, and the model's defaults."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .diffusion.choice import describe, find_sampler, read_name, read_schedule, run_options
from .diffusion.sample import Run
from .diffusion.samplers import Sampler
from .diffusion.schedule import Schedule, Steps
from .diffusion.schedule_config import ScheduleConfig
from .models.config import readable
from .options import Number, Options, SettingError
from .weights.files import Checkpoint


@dataclass(frozen=True)
class RunDefaults:
    """Hold the default settings of a run, of a checkpoint or of a few-step LoRA."""

    sampler: str | None  # None: the checkpoint's scheduler is not supported
    num_steps: int
    cfg_weight: float
    spacing: str | None = None
    eta: float | None = None
    timesteps: tuple[float, ...] | None = None

    def with_sampler(self, name: str) -> "RunDefaults":
        """Return the defaults with another sampler, without eta and timesteps, which belong to the old one."""
        return self if name == self.sampler else replace(self, sampler=name, eta=None, timesteps=None)

    def fill(self, options: Options, num_steps: int | None) -> Options:
        """Fill in the sampler, eta and the spacing or timesteps that ``options`` do not set.

        Eta, spacing and timesteps apply only to the default sampler: with another one ``options`` are unchanged.
        """
        chosen = options.sampler
        standard = None if self.sampler is None else read_name(self.sampler)[0]
        if callable(chosen) or (chosen is not None and read_name(chosen)[0] != standard):
            return options
        values: dict[str, Any] = {"sampler": self.sampler if chosen is None else chosen}
        values["eta"] = self.eta if options.eta is None else options.eta
        if options.spacing is options.timesteps is options.sigmas is None:
            if self.timesteps is None or options.schedule is not None or num_steps not in (None, self.num_steps):
                values["spacing"] = self.spacing
            else:
                values["timesteps"] = self.timesteps
        return replace(options, **values)


def schedule_of(checkpoint: Checkpoint) -> Schedule:
    """Read the noise schedule of a checkpoint; ValueError, with its name, for an unsupported one."""
    try:
        with readable("scheduler config"):
            return Schedule(ScheduleConfig.from_dict(checkpoint.scheduler, checkpoint.pipeline))
    except ValueError as error:
        raise ValueError(f"{checkpoint.name}: {error}") from error


_NOISE_OPTIONS = (
    "latents",
    "noise",
    "noise_source",
    "eta_noise_seed_delta",
    "variation_strength",
)  # as they are


def plan_run(
    schedule: Schedule,
    options: Options,
    defaults: RunDefaults,
    *,
    num_steps: int | None,
    seeds: tuple[int, ...],
    strength: float = 1.0,
    is_xl: bool = False,
) -> Run:
    """Plan the steps, the sampler and the random numbers of a run before anything is computed.

    Args:
        num_steps: number of denoising steps. Default: the model's.
        strength: fraction of the steps to run, rounded down as in diffusers, but at least one step above 0.
        is_xl: use SDXL's variant of a noise schedule that has one.

    Raises ValueError for an unsupported number of steps, or an option that the sampler does not have.
    """
    Number(int, 1).check("num_steps", num_steps)
    Number(float, 0, 1).check("strength", strength)
    options = defaults.fill(options, num_steps)
    sampler, curve = _find_sampler(options, schedule)
    curve = "align_your_steps_xl" if curve == "align_your_steps" and is_xl else curve
    steps = _lay_steps(schedule, options, num_steps, defaults.num_steps, sampler.spacing_rule, curve)
    after_end = schedule.remaining(steps, options.denoising_end) if options.denoising_end < 1 else 0
    count = max(math.floor(len(steps) * strength + 1e-9), int(strength > 0))  # 50 * 0.58 = 28.999999999999996
    if options.denoising_start > 0:
        count = min(count, schedule.remaining(steps, options.denoising_start))
    steps = steps.last(count) if count < len(steps) else steps
    scale = schedule.initial_scale(steps, sampler.spacing_rule, options.spacing) if len(steps) else 1.0
    if options.denoising_start > 0 and len(steps):  # the previous run's latents have the scale of training
        scale = math.sqrt(steps.sigmas[0] ** 2 + 1)
    return Run(
        schedule=schedule,
        steps=steps,
        length=max(len(steps) - after_end, 0),
        sampler=sampler,
        sampler_options=run_options(sampler, schedule, steps, **options.of_sampler()),
        initial_scale=scale,
        seeds=seeds,
        s_noise=1.0 if options.s_noise is None else options.s_noise,
        variation_seeds=image_seeds(options.variation_seed, len(seeds)) if options.variation_strength else (),
        **{name: getattr(options, name) for name in _NOISE_OPTIONS},
    )


def _find_sampler(options: Options, schedule: Schedule) -> tuple[Sampler, str | None]:
    """Find the sampler of filled options, and the noise schedule of the options or of the sampler's name.

    Raises ValueError if no sampler here computes the checkpoint's scheduler.
    """
    if options.sampler is None:
        text = f"the checkpoint's scheduler is not supported, {describe(schedule.config)}"
        raise SettingError(f"{text}; choose one: sampler NAME", "sampler")
    sampler, curve = find_sampler(options.sampler, s_noise=options.s_noise, **options.of_sampler())
    return sampler, curve if options.schedule is None else read_schedule(options.schedule)


def _lay_steps(
    schedule: Schedule, options: Options, num_steps: int | None, default_steps: int, rule: str, curve: str | None
) -> Steps:
    """Return all steps of a run, given in the options or as ``num_steps`` of a noise schedule."""
    if options.timesteps is not None:
        steps = schedule.at_timesteps(options.timesteps, rule)
    elif options.sigmas is not None:
        steps = schedule.at_sigmas(options.sigmas)
    else:
        return schedule.steps(default_steps if num_steps is None else num_steps, rule, options.spacing, curve)
    if num_steps not in (None, len(steps)):
        raise ValueError(f"num_steps {num_steps} does not fit the {len(steps)} steps of the options; omit it")
    return steps


def image_seeds(seed: int | Sequence[int] | None, n_images: int, counts: bool = True) -> tuple[int, ...]:
    """Return one seed for each image: ``seed``, ``seed + 1``, ..., the given list, or random ones for None.

    Without ``counts`` all images get the first seed, unless a list is given. Raises ValueError for a seed that is not a
    whole number of at least 0, and for a list of the wrong length.
    """
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = tuple(seed)
        if len(seeds) != n_images:
            raise ValueError(f"{len(seeds)} seeds for {n_images} images; give one for the first, or one for each")
    else:
        first = secrets.randbits(32) if seed is None else seed
        seeds = tuple(first + i * counts for i in range(n_images)) if isinstance(first, int) else (first,)
    for value in seeds:
        Number(int, 0).check("seed", value)
    return seeds
