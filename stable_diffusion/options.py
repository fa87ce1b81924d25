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
    """Describe the numbers that a setting takes, for its check and for messages."""

    kind: type = float
    lowest: float = -math.inf
    highest: float = math.inf
    excludes_lowest: bool = False
    multiple: int = 1

    def accepts(self, value: Any) -> bool:
        """Return whether ``value`` is of the kind and within the limits."""
        kinds = int if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= sys.float_info.max:
            return False
        is_above = value > self.lowest if self.excludes_lowest else value >= self.lowest
        return is_above and value <= self.highest and not (self.multiple > 1 and value % self.multiple)

    def check(self, name: str, value: Any) -> None:
        """Raise SettingError, with the limits, for a value that is not accepted; None is."""
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
    """Refuse a setting, or several that exclude each other; ``names`` are their names in the message."""

    def __init__(self, message: str, *names: str):
        super().__init__(message)
        self.names = names


def check_choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """Raise SettingError, with the ``choices``, for a value that is none of them."""
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
    """Collect every setting of a run that has a default. None means the model's own choice.

    Args:
        sampler: a name in ``SAMPLERS``, a name of another program ("DPM++ 2M Karras"), or a sampler function.
        schedule: the curve of the noise levels, one of ``SCHEDULES``, also as others write it ("Karras"); None is the
            sampler name's or the checkpoint's.
        spacing: spread of the timesteps: "leading", "trailing" or "linspace".
        timesteps: the timesteps themselves, descending, in place of their number and spacing.
        sigmas: the noise levels themselves, descending; the last is where the run ends.
        eta: fraction of fresh noise, at least 0, for the samplers that have one.
        s_noise: factor on the noise that samplers add, at least 0.
        s_churn: share of noise, times the steps, that Euler and Heun add before a step (Karras et al. 2022, alg. 2).
        s_tmin, s_tmax: the sigmas between which they do; None is no limit.
        prompt_2, negative_prompt_2: for XL's second text encoder, one for all prompts or for each; None is the first.
        order: order of the methods that have several, 1 ... 3 (LMS, UniPC, iPNDM, SA-Solver: 4); None is the sampler's
            or, for the checkpoint's own sampler, the checkpoint's.
        clip_skip: number of the text encoder's last layers to leave out.
        guidance_interval: (start, end), fractions of the steps between which there is guidance (Kynkäänniemi et al.
            2024); outside of them the UNet runs for the prompt alone.
        guidance_rescale: blend, 0 ... 1, of the guided prediction with one rescaled to the deviation of the prediction
            for the prompt (Lin et al. 2024, eq. 15 and 16); 0 is none. None is 0.7, the paper's value, for checkpoints
            with zero terminal SNR and v-prediction, and 0 for others.
        pag_scale: scale of perturbed-attention guidance (Ahn et al. 2024), also beside the other; 0 is none.
        pag_layers: parts of the UNet whose self-attentions it perturbs: "mid", "down", "up", or names of modules such
            as "down_blocks.1" and "up.0.attentions.2".
        freeu: (b1, b2, s1, s2), the factors of FreeU (Si et al. 2024) in the first and the second block of the UNet's
            second half: of half of the channels of its map, and of the lowest frequencies of its skips.
        deep_cache: run all of the UNet in every n-th step and else its last layer (Ma et al. 2023); 1 is exact.
        token_merging: fraction of positions, 0 ... 0.75, that large self-attentions merge (Bolya & Hoffman 2023).
        seamless: axes along which the edges of the picture meet: "x", "y" or "xy"; for :meth:`decode` too.
        size_conditioning: the sizes that SDXL is conditioned on (Podell et al. 2023).
        controls: ControlNets and T2I-Adapters with their conditioning images.
        image_prompts: pictures that act beside the prompt, each with its IP-Adapter.
        denoising_start: fraction of the noise that is gone already: continue from the ``latents`` of another run.
        denoising_end: fraction of the noise at which to stop, for another model to continue.
        noise_source: generator of a seed's noise: "mlx"; "torch", the one of torch on the CPU, drawn from as diffusers
            does with one for each image; or "cuda", the one of torch on a GPU, as AUTOMATIC1111's web UI does. The
            noise of dpmpp_sde and dpmpp_3m_sde is a Brownian motion with both, that of dpmpp_2m_sde with "cuda".
        eta_noise_seed_delta: what is added to the seed, modulo 2^64, for the noise that stochastic samplers add; from a
            ``noise_source`` other than "mlx" that noise continues the first one where it is 0 (ENSD of the web UI).
        variation_seed: of the first image, the following count on from it; or a list with one for each. None is random.
        variation_strength: how far to turn the initial noise from the seed's, 0, to that of the variation seed, 1
            (variation seed of the web UI). Above 0 a ``seed`` that is no list is that of all images.
        latents: the initial noise [n, h, w, 4], unit normal, in place of the seed's.
        noise: a function ``noise(step, shape)`` that replaces the seed's noise of stochastic samplers.

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
        """Combine ``options`` with single keywords, which win. Raises TypeError for a keyword that is no option."""
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
    """Name the fields of :class:`Options` as keywords of the methods that generate."""

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
    """Hold the prompts of a run and the scales of their guidance.

    ``text`` is a prompt, a list of prompts or an encoded one. Raises ValueError for anything else, and for scales that
    are not finite.
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
