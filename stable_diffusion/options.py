"""Options of a run: every setting of ``generate_latents`` that has a default, checked once."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar, TypedDict

import mlx.core as mx

from .diffusion.choice import find_sampler, read_schedule
from .diffusion.controls import Control
from .diffusion.generators import NOISE_SOURCES
from .diffusion.image_prompts import ImagePrompt
from .diffusion.samplers import Noise, States
from .diffusion.schedule_config import SPACINGS
from .models.seamless import SEAMLESS
from .models.token_merging import HIGHEST
from .text.encode import Conditioning, SizeConditioning

Prompt = str | Sequence[str] | Conditioning
SamplerFunction = Callable[..., States]


@dataclass(frozen=True)
class Number:
    """Describe the valid numbers of a setting, for its check and for messages."""

    kind: type = float
    lowest: float = -math.inf
    highest: float = math.inf
    excludes_lowest: bool = False
    multiple: int = 1

    def accepts(self, value: Any) -> bool:
        """Return whether ``value`` has the right kind and lies within the limits."""
        kinds = int if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= sys.float_info.max:
            return False
        is_above = value > self.lowest if self.excludes_lowest else value >= self.lowest
        return is_above and value <= self.highest and not (self.multiple > 1 and value % self.multiple)

    def check(self, name: str, value: Any) -> None:
        """Raise SettingError, with the limits, for an invalid value. None is valid."""
        if value is not None and not self.accepts(value):
            raise SettingError(f"{name} {value!r} is not {self}", name)

    def __str__(self) -> str:
        kind = "a whole number" if self.kind is int else "a number"
        if self.multiple > 1:
            kind = f"a multiple of {self.multiple}"
        lowest, highest = ("2^63 - 1" if limit == 2**63 - 1 else f"{limit:g}" for limit in (self.lowest, self.highest))
        if self.excludes_lowest:
            return f"{kind} above {lowest} and at most {highest}"
        if self.highest == math.inf:
            return kind if self.lowest == -math.inf else f"{kind} of at least {lowest}"
        return f"{kind} from {lowest} to {highest}"


class SettingError(ValueError):
    """Report an invalid setting, or settings that exclude each other. ``names`` are their names in the message."""

    def __init__(self, message: str, *names: str):
        super().__init__(message)
        self.names = names


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """Raise SettingError, with the ``choices``, for any other value."""
    if value not in choices:
        raise SettingError(f"{name} {value!r} is unknown; choose one of {', '.join(filter(None, choices))}", name)


_SIZES_OF = ("", "negative_")
NUMBERS = {
    "eta": Number(float, 0, 1),
    **dict.fromkeys(("s_noise", "s_churn", "s_tmin", "s_tmax"), Number(float, 0)),
    "order": Number(int, 1, 4),
    "clip_skip": Number(int, 0),
    "guidance_rescale": Number(float, 0, 1),
    "pag_scale": Number(float, 0),
    "freeu": Number(float, 0, 10),
    "deep_cache": Number(int, 1),
    "token_merging": Number(float, 0, HIGHEST),
    "denoising_start": Number(float, 0, 1),
    "denoising_end": Number(float, 0, 1),
    "eta_noise_seed_delta": Number(int, -(2**32), 2**32),
    **{of + size: Number(int, 0, 65536) for of in _SIZES_OF for size in ("original_size", "crop", "target_size")},
    **{f"{of}aesthetic_score": Number(float, 0) for of in _SIZES_OF},
    "variation_seed": Number(int, 0, 2**63 - 1),
    "variation_strength": Number(float, 0, 1),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hold every setting of a run that has a default. None means the model's default.

    Args:
        sampler: a name in ``SAMPLERS``, a name of another program ("DPM++ 2M Karras"), or a sampler function.
        schedule: the noise schedule, one of ``SCHEDULES``, also as other programs write it ("Karras"). Default: the one
            in the sampler's name, or the checkpoint's.
        spacing: timestep spacing: "leading", "trailing" or "linspace".
        timesteps: an explicit list of timesteps, descending, instead of their number and spacing.
        sigmas: an explicit list of noise levels, descending. The run ends at the last one.
        eta: fraction of fresh noise, at least 0, for stochastic samplers.
        s_noise: factor on the noise that samplers add, at least 0.
        s_churn: noise that Euler and Heun add before each step, times the number of steps (Karras et al. 2022, alg. 2).
        s_tmin, s_tmax: limits of the sigmas at which ``s_churn`` applies. Default: no limit.
        prompt_2, negative_prompt_2: prompts for XL's second text encoder, one for all or one for each. Default: those
            of the first encoder.
        order: order of the solver, 1 ... 3 (LMS, UniPC, iPNDM, SA-Solver: up to 4). Default: the sampler's, or for the
            checkpoint's sampler the checkpoint's.
        clip_skip: number of final text encoder layers to skip.
        guidance_interval: (start, end), the fractions of the steps between which guidance applies (Kynkäänniemi et al.
            2024). Outside, the UNet computes only the conditional rows.
        guidance_rescale: blend, 0 ... 1, of the guided prediction with a copy rescaled to the standard deviation of the
            conditional prediction (Lin et al. 2024, eq. 15 and 16). 0 turns it off. Default: 0.7, the paper's value,
            for checkpoints with zero terminal SNR and v-prediction, and 0 for others.
        pag_scale: scale of perturbed-attention guidance (Ahn et al. 2024), added to other guidance. 0 turns it off.
        pag_layers: parts of the UNet with perturbed self-attention: "mid", "down", "up", or module names such as
            "down_blocks.1" and "up.0.attentions.2".
        freeu: (b1, b2, s1, s2), the FreeU factors (Si et al. 2024) of the first and second up block: b scales half of
            the backbone channels, s the lowest frequencies of the skips.
        deep_cache: run the full UNet in every n-th step, and only its last layer in the others (DeepCache, Ma et al.
            2023). 1 is exact.
        token_merging: fraction of tokens to merge, 0 ... 0.75, in large self-attentions (ToMe, Bolya & Hoffman 2023).
        seamless: axes along which the image tiles without a seam: "x", "y" or "xy". Give it to :meth:`decode` too.
        size_conditioning: SDXL's size conditioning (Podell et al. 2023).
        controls: ControlNets and T2I-Adapters with their control images.
        image_prompts: image prompts, each with its IP-Adapter.
        denoising_start: fraction of the denoising that is already done: continue from the ``latents`` of another run.
        denoising_end: fraction of the denoising at which to stop, so that another model can continue.
        noise_source: generator of the noise for a seed. "mlx" is MLX's. "torch" is torch's on the CPU, with one
            generator per image as in diffusers. "cuda" is torch's on a GPU, as in AUTOMATIC1111's web UI. With the last
            two, dpmpp_sde and dpmpp_3m_sde use Brownian noise; with "cuda" dpmpp_2m_sde does too.
        eta_noise_seed_delta: number added to the seed, modulo 2^64, for the noise that stochastic samplers add (ENSD of
            the web UI). At 0, with a ``noise_source`` other than "mlx", this noise continues the initial noise.
        variation_seed: variation seed of the first image; the next ones use +1, +2, ... A list gives one for each.
            Default: random.
        variation_strength: interpolation of the initial noise from that of the seed, 0, to that of the variation seed,
            1 (variation seed of the web UI). Above 0, all images share a ``seed`` that is not a list.
        latents: the initial noise [n, h, w, 4], unit normal, instead of the seed's.
        noise: a function ``noise(step, shape)`` that replaces the seed's noise in stochastic samplers.

    Raises ValueError for a number out of range, an unknown name, or settings that exclude each other.
    """

    sampler: str | SamplerFunction | None = None
    schedule: str | None = None
    spacing: str | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    eta: float | None = None
    s_noise: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    prompt_2: str | Sequence[str] | None = None
    negative_prompt_2: str | Sequence[str] | None = None
    order: int | None = None
    clip_skip: int = 0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float | None = None
    pag_scale: float = 0.0
    pag_layers: tuple[str, ...] = ("mid",)
    freeu: tuple[float, float, float, float] | None = None
    deep_cache: int = 1
    seamless: str | None = None
    token_merging: float = 0.0
    size_conditioning: SizeConditioning | None = None
    controls: Sequence[Control] = ()
    image_prompts: Sequence[ImagePrompt] = ()
    denoising_start: float = 0.0
    denoising_end: float = 1.0
    noise_source: str = "mlx"
    eta_noise_seed_delta: int = 0
    variation_seed: int | Sequence[int] | None = None
    variation_strength: float = 0.0
    latents: mx.array | None = None
    noise: Noise | None = None

    _EARLIER_NAMES: ClassVar[Mapping[str, str]] = {"micro": "size_conditioning"}

    @classmethod
    def of(cls, options: "Options | None", keywords: Mapping[str, Any]) -> "Options":
        """Combine ``options`` with keywords, which override them. Raises TypeError for an unknown keyword."""
        if not keywords:
            return _DEFAULT if options is None else options
        keywords = {cls._EARLIER_NAMES.get(name, name): value for name, value in keywords.items()}
        names = [field.name for field in fields(cls)]
        for name in keywords.keys() - set(names):
            similar = get_close_matches(name, names, n=1)
            raise TypeError(f"unknown option {name!r}" + (f"; did you mean {similar[0]}?" if similar else ""))
        return replace(_DEFAULT if options is None else options, **keywords)

    def of_sampler(self) -> dict[str, Any]:
        """Return the options that are keyword arguments of samplers."""
        return {name: getattr(self, name) for name in ("eta", "order", "s_churn", "s_tmin", "s_tmax")}

    def __post_init__(self) -> None:
        if self.sampler is not None:
            find_sampler(self.sampler, s_noise=self.s_noise, **self.of_sampler())
        for name, number in NUMBERS.items():
            value = getattr(self, name, getattr(self.size_conditioning, name, None))
            for one in value if isinstance(value, tuple | list) else (value,):
                number.check(name, one)
        if self.schedule is not None:
            read_schedule(self.schedule)
        if self.spacing not in (None, *SPACINGS):
            raise ValueError(f"spacing {self.spacing!r} is unknown; choose one of {', '.join(SPACINGS)}")
        check_choice("noise_source", self.noise_source, NOISE_SOURCES)
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
            text = f"guidance_interval {interval} must be fractions of the steps, 0 <= start <= end <= 1"
            raise SettingError(text, "guidance_interval")
        check_choice("seamless", self.seamless, (None, *SEAMLESS))
        layers = self.pag_layers
        if not isinstance(layers, tuple) or not layers or not all(isinstance(one, str) and one for one in layers):
            raise SettingError(f"pag_layers {layers!r:.80} is not a tuple of names; give ('mid',)", "pag_layers")
        if self.freeu is not None and (not isinstance(self.freeu, tuple) or len(self.freeu) != 4):
            raise SettingError(f"freeu {self.freeu!r} is not a tuple of four factors; give (b1, b2, s1, s2)", "freeu")
        for text in (self.prompt_2, self.negative_prompt_2):
            texts = [text] if text is None or isinstance(text, str) else text
            if not isinstance(texts, Sequence) or not all(one is None or isinstance(one, str) for one in texts):
                raise ValueError(f"prompt_2 {text!r:.80} is not a prompt; give a text, or a list of texts")
        for name, kind in (("controls", Control), ("image_prompts", ImagePrompt)):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not all(isinstance(one, kind) for one in values):
                form = ", ".join([*kind.__dataclass_fields__][:2])
                raise ValueError(f"{name} must be a list of {kind.__name__}({form})")
        placed = [n for n in ("schedule", "spacing", "timesteps", "sigmas") if getattr(self, n) is not None]
        if len(placed) > 1 and not {"timesteps", "sigmas"}.isdisjoint(placed):
            raise ValueError(f"{', '.join(placed)} each define the steps; give one of them")
        if self.denoising_start > self.denoising_end or self.denoising_end == 0:
            start, end = self.denoising_start, self.denoising_end
            raise ValueError(f"a run cannot denoise from {start} to {end}; give fractions, 0 <= start <= end <= 1")
        if self.denoising_start and self.latents is None:
            raise ValueError(f"denoising_start {self.denoising_start} needs the latents of the previous run")


class OptionKeywords(TypedDict, total=False):
    """List the fields of :class:`Options` as keyword arguments of the generating methods."""

    sampler: str | SamplerFunction | None
    schedule: str | None
    spacing: str | None
    timesteps: Sequence[float] | None
    sigmas: Sequence[float] | None
    eta: float | None
    s_noise: float | None
    s_churn: float | None
    s_tmin: float | None
    s_tmax: float | None
    prompt_2: str | Sequence[str] | None
    negative_prompt_2: str | Sequence[str] | None
    order: int | None
    clip_skip: int
    guidance_interval: tuple[float, float]
    guidance_rescale: float | None
    pag_scale: float
    pag_layers: tuple[str, ...]
    freeu: tuple[float, float, float, float] | None
    deep_cache: int
    seamless: str | None
    token_merging: float
    size_conditioning: SizeConditioning | None
    controls: Sequence[Control]
    image_prompts: Sequence[ImagePrompt]
    denoising_start: float
    denoising_end: float
    noise_source: str
    eta_noise_seed_delta: int
    variation_seed: int | Sequence[int] | None
    variation_strength: float
    latents: mx.array | None
    noise: Noise | None


_DEFAULT = Options()


@dataclass(frozen=True)
class Prompts:
    """Hold the prompts and guidance scales of a run.

    ``text`` is a prompt, a list of prompts or an encoded prompt. Raises ValueError for anything else, and for scales
    that are not finite.
    """

    text: Prompt
    negative_text: Prompt
    cfg_weight: float
    image_cfg_weight: float = 1.5

    def __post_init__(self) -> None:
        for name in ("cfg_weight", "image_cfg_weight"):
            if not Number().accepts(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)!r} is not a finite number; 1 or less turns guidance off")
        for name in ("text", "negative_text"):
            text = getattr(self, name)
            texts = [text] if isinstance(text, str) else text
            is_list = isinstance(texts, Sequence) and all(isinstance(one, str) for one in texts)
            if not is_list and not isinstance(text, Conditioning):
                raise ValueError(f"{name} {text!r} is not a prompt; give a text, a list of texts, or encoded prompts")

    def count(self, n_images: int) -> int:
        """Return the number of images for ``n_images`` of each prompt; ValueError below 1."""
        Number(int, 1).check("n_images", n_images)
        return n_images * (1 if isinstance(self.text, str) else len(self.text))
