"""A request: all settings that decide the pixels of an image, in one record from flags, metadata or JSON."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property, partial
from itertools import product, repeat
from random import Random, SystemRandom
from typing import Any, get_args, get_origin, get_type_hints

from ..lora.delta import Scale
from ..options import NUMBERS as OPTION_NUMBERS
from ..options import Number, Options, SettingError, check_choice
from ..planning import image_seeds
from ..text.alternatives import expand as expand_prompt
from ..text.encode import SizeConditioning
from ..text.prompt import EMPHASES
from ..weights.layout import SUFFIXES
from .beside import mistakes_of_networks
from .lora_tags import TAG, read_loras
from .wildcards import read_wildcards

MOST_IMAGES = 9999
_BOXES = re.compile(r"(\d{1,6}(,\d{1,6}){3}(;|$))+")
DEFAULT_IMAGES = 4  # of a prompt, by default

COUNT = Number(int, 1, 9999)
FRACTION = Number(float, 0, 1)
STRENGTH = Number(float, 0, 1, excludes_lowest=True)
_SEED = Number(int, 0)
NUMBERS = OPTION_NUMBERS | {
    "width": Number(int, 32, 16384, multiple=8),
    "height": Number(int, 32, 16384, multiple=8),
    "n_images": COUNT,
    "seed": Number(int, -1, 2**63 - 1),
    "steps": COUNT,
    "cfg": Number(float),
    "image_cfg": Number(float),
    "strength": STRENGTH,
    "mask_blur": Number(float, 0, 9999),
    "mask_padding": Number(int, 0, 9999),
    "expand": Number(int, 0, 9999),
    "control_start": FRACTION,
    "control_end": FRACTION,
    "ip_start": FRACTION,
    "ip_end": FRACTION,
    "hires": Number(float, 1, 8),
    "hires_strength": STRENGTH,
    "hires_steps": COUNT,
    "refiner_start": STRENGTH,
    "detail_strength": STRENGTH,
    "detail_padding": Number(int, 0, 9999),
}
UPSCALERS = ("latents", "pixels")  # or a file
_METHODS = (*UPSCALERS, *SUFFIXES)  # endings of a valid upscaler
CHOICES = {
    "emphasis": EMPHASES,
    "alternatives": ("all", "one"),
    "resize": ("crop", "pad", "stretch"),
    "dtype": ("float16", "bfloat16", "float32"),
}


@dataclass(frozen=True)
class Variant:
    """Hold the place of an image in its request: the prompt, the image and the swept settings."""

    prompt: int
    image: int
    seeds: tuple[int, ...]
    swept: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """Describe an image, or several that differ in prompt, seed and swept settings.

    ``prompt`` is the typed text; ``resolved_prompt`` is the text after alternatives and wildcards were replaced. A seed
    of None or -1 is random, a ``dtype`` of None is that of the device. ``options`` are those of ``generate_latents``;
    flags, records and JSON have their fields, and those of their ``size_conditioning``, on the same level as the
    others. Files are paths; networks are paths or Hub ids.

    Raises ValueError for a number out of range or an unknown choice.
    """

    prompt: str = ""
    negative_prompt: str = ""
    resolved_prompt: str | None = None
    seed: int | tuple[int, ...] | None = None
    n_images: int | None = None
    fixed_seed: bool = False
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg: float | None = None
    options: Options = field(default_factory=Options)
    emphasis: str = "mean"
    weight_blocks: bool = False
    truncate: bool = False
    alternatives: str = "all"
    wildcards: str | None = None
    resize: str = "crop"
    # an image to start from
    image: str | None = None
    strength: float | None = None
    image_cfg: float | None = None
    mask: str | None = None
    invert_mask: bool = False
    mask_blur: float = 0.0
    mask_padding: int | None = None
    no_composite: bool = False
    expand: tuple[int, int, int, int] | None = None
    depth: str | None = None
    # ControlNets, each (network, scale)
    controlnet: tuple[tuple[str, float], ...] = ()
    control_image: tuple[str, ...] = ()
    canny: bool = False
    control_start: tuple[float, ...] = ()
    control_end: tuple[float, ...] = ()
    control_type: tuple[str, ...] = ()
    guess_mode: bool = False
    # IP-Adapters, each (network, scale), and the pictures that each reads together
    ip_adapter: tuple[tuple[str, float], ...] = ()
    ip_image: tuple[tuple[str, ...], ...] = ()
    ip_start: tuple[float, ...] = ()
    ip_end: tuple[float, ...] = ()
    ip_blocks: tuple[str, ...] = ()
    ip_mask: tuple[str, ...] = ()
    # a second pass
    hires: float | None = None
    hires_strength: float = 0.5
    hires_steps: int | None = None
    hires_upscaler: str = "latents"
    upscale: str | None = None
    refiner: str | None = None
    refiner_start: float = 0.8
    # areas to repaint: "X,Y,W,H", or several with semicolons, or "mask" for the parts of the mask
    detail: tuple[str, ...] = ()
    detail_prompt: str | None = None
    detail_strength: float = 0.4
    detail_padding: int = 32
    # the model
    model: str = "sdxl"
    revision: str | None = None
    vae: str | None = None
    unet: str | None = None
    text_encoder: str | None = None
    text_encoder_2: str | None = None
    tokenizer: str | None = None
    prediction: str | None = None
    lora: tuple[tuple[str, Scale], ...] = ()
    lora_partial: bool = False
    lora_dir: str | tuple[str, ...] | None = None
    embedding: tuple[str, ...] = ()
    quantize: bool = False
    unet_bits: int | str | None = None
    text_bits: int | str | None = None
    dtype: str | None = None
    exact: bool = False
    variant: Variant | None = None  # set by ``expand``, and not recorded

    def __post_init__(self) -> None:
        for name, number in NUMBERS.items():
            value = getattr(self, name, None)
            for one in value if isinstance(value, tuple) else (value,):
                # Seeds incremented from image to image may exceed the largest that can be chosen.
                (_SEED if name == "seed" and self.variant is not None else number).check(name, one)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), (None, *choices))
        method = self.hires_upscaler
        adjusts, paints = self.mask_blur or self.mask_padding is not None, self.mask or self.expand
        mistakes = {
            "mask_blur and mask_padding need mask or expand": adjusts and not paints,
            "invert_mask needs mask": self.invert_mask and not self.mask,
            "expand needs a border of at least 1 pixel": self.expand is not None and not any(self.expand),
            "depth and expand cannot be combined: the map does not cover the borders; omit depth to estimate it": (
                self.depth and self.expand
            ),
            "seamless cannot be combined with mask_padding or detail: a cropped area has edges": (
                self.options.seamless and (self.mask_padding is not None or self.detail)
            ),
            f"hires_upscaler {method!r} is unknown; choose latents, pixels or a file": not method.endswith(_METHODS),
            "hires and refiner cannot be combined: run one after the other": self.refiner and self.hires,
            "detail and refiner cannot be combined: run one after the other": self.refiner and self.detail,
            "detail must be X,Y,W,H in pixels, or the word that names the parts of a given picture": (
                not all(place == "mask" or _BOXES.fullmatch(place) for place in self.detail)
            ),
            "detail works on the parts of mask: give mask too": "mask" in self.detail and not self.mask,
            "width and height have no effect when only detail changes the picture: give strength too": (
                self.has_only_details and (self.width or self.height)
            ),
            "detail_prompt names a LoRA, which has no effect: name it in the prompt": TAG.search(
                self.detail_prompt or ""
            ),
            "refiner cannot be combined with mask or expand: it does not know the area that is kept": self.refiner
            and paints,
        }
        mistakes |= mistakes_of_networks(self)
        for message in (message for message, is_made in mistakes.items() if is_made):
            raise SettingError(message, *(word for word in re.findall(r"\w+", message) if word in KINDS))

    # --- records -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], base: "Request | None" = None) -> tuple["Request", list[str]]:
        """Read a request from plain values by the names of fields and options; returns it and the unknown names.

        ``base`` has the values of all other fields. Raises ValueError for a value of the wrong type.
        """
        settings = {}
        for name, value in record.items():
            if name in KINDS:
                try:
                    settings[name] = _converted(value, KINDS[name])
                except (TypeError, OverflowError):  # a float of hundreds of digits
                    raise SettingError(f"{name} {value!r} has the wrong type", name) from None
        return (base or cls()).with_values(**settings), sorted(record.keys() - settings.keys())

    def with_values(self, **settings: Any) -> "Request":
        """Return the request with other values of its fields, its options and its sizes."""
        if sizes := {name: settings.pop(name) for name in [*settings] if name in SIZES}:
            settings["size_conditioning"] = replace(self._sizes, **sizes)
        options = {name: settings.pop(name) for name in [*settings] if name in _OPTION_NAMES}
        return replace(self, **settings, options=replace(self.options, **options) if options else self.options)

    def value(self, name: str) -> Any:
        """Return the value of a field, an option or a size by its name."""
        return getattr(self._sizes if name in SIZES else self.options if name in _OPTION_NAMES else self, name)

    @property
    def _sizes(self) -> SizeConditioning:
        return self.options.size_conditioning or SizeConditioning()

    def to_dict(self) -> dict[str, Any]:
        """Return the prompt, and all fields and options that differ from their defaults, as JSON values."""
        settings = {name: self.value(name) for name in KINDS}
        return {name: value for name, value in settings.items() if value != _DEFAULT.value(name) or name == "prompt"}

    @property
    def has_only_details(self) -> bool:
        """Return whether only the details of an input image are repainted: without a ``strength``."""
        is_painted = self.expand or (self.mask and "mask" not in self.detail)
        return bool(self.detail and self.image and self.strength is None and not is_painted)

    # --- prompts -----------------------------------------------------------------------------------------------------

    @property
    def tagged_text(self) -> str:
        """Return the resolved prompt, with the tags of LoRAs."""
        return self.prompt if self.resolved_prompt is None else self.resolved_prompt

    @cached_property
    def texts(self) -> tuple[str, str, str | None, str | None]:
        """Return the texts for the text encoders, without the tags of LoRAs: the prompt and the negative prompt.

        Two more are for XL's second text encoder; None means that of the first.
        """
        texts = self.tagged_text, self.negative_prompt, self.options.prompt_2, self.options.negative_prompt_2
        return tuple(None if text is None else TAG.sub("", text) for text in texts)

    @property
    def text(self) -> str:
        """Return the prompt for the text encoders."""
        return self.texts[0]

    @cached_property
    def prompt_loras(self) -> tuple[tuple[str, Scale], ...]:
        """Return (name, scale) of each LoRA that the prompt names: ``<lora:name:0.8>``."""
        return read_loras(self.all_text[0])

    @property
    def all_text(self) -> tuple[str, str]:
        """Return the prompts of both text encoders with the tags of LoRAs, and the negative prompts."""
        pairs = (self.tagged_text, self.options.prompt_2), (self.negative_prompt, self.options.negative_prompt_2)
        return tuple("\n".join(filter(None, pair)) for pair in pairs)

    @property
    def upscalers(self) -> set[str]:
        """Return the files of upscaler networks."""
        return {self.upscale, self.hires_upscaler if self.hires else None} - {None, *UPSCALERS}

    @property
    def reading(self) -> dict[str, Any]:
        """Return the keywords of ``encode_prompt``."""
        names = ("emphasis", "truncate", "weight_blocks")
        return {"clip_skip": self.options.clip_skip} | {name: getattr(self, name) for name in names}


_OPTION_NAMES = frozenset(field.name for field in fields(Options))
SIZES = tuple(field.name for field in fields(SizeConditioning))  # the names of XL's size conditioning
_NOT_RECORDED = {"options", "variant", "size_conditioning", "controls", "image_prompts", "latents", "noise"}
# The types of the recorded fields and options: texts, numbers, booleans, and tuples of them.
KINDS: dict[str, Any] = {
    name: kind
    for record in (Request, Options, SizeConditioning)
    for name, kind in get_type_hints(record).items()
    if name not in _NOT_RECORDED and not name.startswith("_")
}
# A request has one prompt, and one seed to begin with.
KINDS |= {"prompt_2": str | None, "negative_prompt_2": str | None, "variation_seed": int | None}


def _converted(value: Any, kind: Any) -> Any:
    """Convert a JSON value to a Python type: lists become tuples. Raises TypeError for a value of another type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (tuple, Sequence):
        is_open = origin is Sequence or arguments[-1] is ...
        if not isinstance(value, list | tuple) or not (is_open or len(value) == len(arguments)):
            raise TypeError
        kinds = repeat(arguments[0]) if is_open else arguments
        return tuple(_converted(one, one_kind) for one, one_kind in zip(value, kinds, strict=False))
    for one in arguments:  # of a union
        with suppress(TypeError):
            return _converted(value, one)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


_DEFAULT = Request()


Sweep = dict[str, tuple[Any, ...]]  # the settings that have several values, in the order in which they were given


def expand(lines: Sequence[tuple[Request, Sweep]], random: Random | None = None) -> list[Request]:
    """Expand requests to one for each image, in the order of the images.

    Alternatives and wildcards give one prompt each; with ``alternatives`` "one", the seed of each image chooses one.
    Each combination of swept values is a setting: the first value changes slowest, then the prompts, then the seeds.
    Seeds increase by 1 from image to image, also from prompt to prompt; a line with a seed restarts the count. With
    ``fixed_seed``, and if settings are swept, all prompts have the same seeds. Several seeds are used for every prompt.
    With a ``variation_strength``, the variation seeds increase instead of the seeds. ``random`` draws seeds of None; by
    default the system does.

    Raises ValueError for more than 9999 images, and if ``n_images`` differs from the number of seeds.
    """
    images: list[tuple[int, Request]] = []
    read, drawn, next_seed, number = cache(read_wildcards), partial(_drawn, random=random or SystemRandom()), None, 0
    for request, sweep in lines:
        swept = {name: settings for name, settings in sweep.items() if name != "seed"}
        settings = [dict(zip(swept, chosen, strict=True)) for chosen in product(*swept.values())]
        own_seeds = tuple(map(drawn, request.seed)) if isinstance(request.seed, tuple) else None
        count = len(own_seeds or ()) or request.n_images or (1 if sweep else DEFAULT_IMAGES)
        if request.n_images not in (None, count):
            text = f"n_images {request.n_images} differs from the number of seeds, {count}; omit it"
            raise SettingError(text, "n_images")
        if isinstance(request.seed, int) or next_seed is None:
            next_seed = drawn(request.seed if own_seeds is None else None)
        is_varied = any(sweep.get("variation_strength", [request.options.variation_strength]))
        if is_varied and request.options.variation_seed is None:
            request = request.with_values(variation_seed=drawn(None))
        seeds, before = own_seeds or image_seeds(next_seed, count, counts=not is_varied), 0
        for prompts in _prompts(request, seeds, read):
            if len(images) + count * len(settings) > MOST_IMAGES:
                text = f"too many images, the limit is {MOST_IMAGES}; give fewer values or a smaller n_images"
                raise SettingError(text, "n_images")
            for place, setting in enumerate(settings):
                for i, (seed, prompt) in enumerate(zip(seeds, prompts, strict=True)):
                    single = {"seed": seed, "n_images": 1, "fixed_seed": False}
                    variant = Variant(number, i, seeds, tuple(sweep))
                    image = request.with_values(variant=variant, **prompt, **single, **setting)
                    images.append((place, _varied(image, before + i)))
            number += 1
            if is_varied and not (request.fixed_seed or swept):
                before += count
            elif not (request.fixed_seed or swept):
                next_seed = seeds[-1] + 1
                seeds = own_seeds or image_seeds(next_seed, count)
    return [image for _, image in sorted(images, key=lambda pair: pair[0])]


def _varied(image: Request, number: int) -> Request:
    options = image.options
    return image.with_values(variation_seed=options.variation_seed + number) if options.variation_strength else image


def _drawn(seed: int | None, random: Random) -> int:
    return random.getrandbits(32) if seed in (None, -1) else image_seeds(seed, 1)[0]


def _prompts(
    request: Request, seeds: Sequence[int], read: Callable[[str], Callable[[str], Sequence[str]]]
) -> Iterator[list[dict[str, str | None]]]:
    """Yield the fields of each seed for every prompt that alternatives and wildcards give."""
    names = "resolved_prompt", "negative_prompt", "prompt_2", "negative_prompt_2"
    typed = request.prompt, *map(request.value, names[1:])
    if request.resolved_prompt is not None or request.weight_blocks or request.emphasis == "none":
        yield [{}] * len(seeds)
        return
    wildcards = None if request.wildcards is None else read(request.wildcards)
    drawn = seeds if request.alternatives == "one" else None
    absent = [None] * len(drawn or [0])
    texts = [absent if text is None else expand_prompt(text, drawn, wildcards) for text in typed]
    groups = [zip(*texts, strict=True)] if drawn else ([each] * len(seeds) for each in product(*texts))
    for group in groups:
        yield [{} if each == typed else dict(zip(names, each, strict=True)) for each in group]
