"""A request: everything that decides the pixels of an image, as one record from flags, metadata, JSON or HTTP."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ..options import NUMBERS as OPTION_NUMBERS
from ..options import Number, Options, SettingError, image_seeds
from ..text.prompt import EMPHASES
from ..text.prompt import expand as expand_prompt
from ..text.wildcards import read_wildcards

MOST_IMAGES = 9999
DEFAULT_IMAGES = 4  # of a prompt, where nothing else is specified

COUNT = Number(int, 1, 9999)
FRACTION = Number(float, 0, 1)
STRENGTH = Number(float, 0, 1, excludes_lowest=True)
_SEED = Number(int, 0)
NUMBERS = OPTION_NUMBERS | {
    "width": Number(int, 64, 16384, multiple=8),
    "height": Number(int, 64, 16384, multiple=8),
    "n_images": COUNT,
    "seed": Number(int, 0, 2**63 - 1),
    "steps": COUNT,
    "cfg": Number(float),
    "image_cfg": Number(float),
    "strength": STRENGTH,
    "mask_blur": Number(float, 0, 9999),
    "mask_padding": Number(int, 0, 9999),
    "control_start": FRACTION,
    "control_end": FRACTION,
    "hires": Number(float, 1, 8),
    "hires_strength": STRENGTH,
    "hires_steps": COUNT,
    "refiner_start": STRENGTH,
}
CHOICES = {
    "emphasis": EMPHASES,
    "alternatives": ("all", "one"),
    "resize": ("crop", "pad", "stretch"),
    "hires_upscaler": ("latents", "pixels"),
}


# <lora:name:0.8>; inside brackets its colons come back with a backslash.
_LORA_TAG = re.compile(r"\s*<lora\\?:([^:<>\\]+)(?:\\?:([+-]?(?:\d+\.?\d*|\.\d+)))?>")


@dataclass(frozen=True)
class Variant:
    """Hold the place of an image among those of its request: which prompt, which image, which settings were swept."""

    prompt: int
    image: int
    seeds: tuple[int, ...]
    swept: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """Describe an image, or several that differ in prompt, seed and swept settings.

    ``prompt`` is the text that was typed; ``resolved_prompt`` is what choices and wildcards made of it. A seed of None
    is random. ``options`` are those of ``generate_latents``; their fields stand beside the others in flags, records and
    JSON. Files are paths; networks are paths or Hub ids.

    Raises ValueError for a number out of range or an unknown choice.
    """

    prompt: str = ""
    negative_prompt: str = ""
    resolved_prompt: str | None = None
    seed: int | tuple[int, ...] | None = None
    n_images: int | None = None
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
    guess_mode: bool = False
    # a second pass
    hires: float | None = None
    hires_strength: float = 0.5
    hires_steps: int | None = None
    hires_upscaler: str = "latents"
    refiner: str | None = None
    refiner_start: float = 0.8
    # the model
    model: str = "sdxl"
    revision: str | None = None
    vae: str | None = None
    unet: str | None = None
    text_encoder: str | None = None
    text_encoder_2: str | None = None
    tokenizer: str | None = None
    prediction: str | None = None
    lora: tuple[tuple[str, float], ...] = ()
    lora_partial: bool = False
    lora_dir: str | None = None
    embedding: tuple[str, ...] = ()
    quantize: bool = False
    unet_bits: int | None = None
    text_bits: int | None = None
    float16: bool = True
    # set by ``expand``, and not recorded
    variant: Variant | None = field(default=None, metadata={"recorded": False})

    def __post_init__(self) -> None:
        for name, number in NUMBERS.items():
            value = getattr(self, name, None)
            for one in value if isinstance(value, tuple) else (value,):
                # Seeds that are counted on may come above the largest that can be chosen.
                (_SEED if name == "seed" and self.variant is not None else number).check(name, one)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                text = f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}"
                raise SettingError(text, name)
        for names, is_violated, message in _CONFLICTS:
            if is_violated(self):
                raise SettingError(message, *names)

    # --- records -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], base: "Request | None" = None) -> tuple["Request", list[str]]:
        """Read a request from plain values by the names of fields and options; returns it and the unknown names.

        ``base`` has the values of all other fields. Raises ValueError for a value of the wrong kind.
        """
        settings = {}
        for name, value in record.items():
            if name in KINDS:
                try:
                    settings[name] = _converted(value, KINDS[name])
                except TypeError:
                    raise SettingError(f"{name} {value!r} is of the wrong kind", name) from None
        return (cls() if base is None else base).with_values(**settings), sorted(record.keys() - settings.keys())

    def with_values(self, **settings: Any) -> "Request":
        """Return the request with other values of its fields and of its options."""
        options = {name: settings.pop(name) for name in [*settings] if name in _OPTION_NAMES}
        return replace(self, **settings, options=replace(self.options, **options) if options else self.options)

    def value(self, name: str) -> Any:
        """Return the value of a field or an option by its name."""
        return getattr(self.options if name in _OPTION_NAMES else self, name)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and options that differ from their defaults, as JSON takes them, and the prompt."""
        settings = {name: self.value(name) for name in KINDS}
        return {name: value for name, value in settings.items() if value != _DEFAULT.value(name) or name == "prompt"}

    # --- prompts -----------------------------------------------------------------------------------------------------

    @cached_property
    def text(self) -> str:
        """Return the prompt for the text encoders: resolved, without the tags of LoRAs."""
        return _LORA_TAG.sub("", self.prompt if self.resolved_prompt is None else self.resolved_prompt)

    @cached_property
    def prompt_loras(self) -> tuple[tuple[str, float], ...]:
        """Return (name, scale) of each LoRA that the prompt names: ``<lora:name:0.8>``."""
        tags = _LORA_TAG.findall(self.prompt if self.resolved_prompt is None else self.resolved_prompt)
        return tuple((name.strip(), float(scale) if scale else 1.0) for name, scale in tags)

    @property
    def reading(self) -> dict[str, Any]:
        """Return the keywords of ``encode_prompt``."""
        names = ("emphasis", "truncate", "weight_blocks")
        return {"clip_skip": self.options.clip_skip} | {name: getattr(self, name) for name in names}


_OPTION_NAMES = frozenset(field.name for field in fields(Options))


def _kinds() -> dict[str, Any]:
    """Return the types of all fields and options that are recorded: those of plain values."""
    kinds = {one.name: kind for one, kind in zip(fields(Request), get_type_hints(Request).values(), strict=True)}
    kinds = {one.name: kinds[one.name] for one in fields(Request) if one.metadata.get("recorded", True)}
    options = {name: kind for name, kind in get_type_hints(Options).items() if name in _OPTION_NAMES}
    return {name: kind for name, kind in (kinds | options).items() if _is_plain(kind)}


def _is_plain(kind: Any) -> bool:
    """Return whether values of a type, or of one of its alternatives, are numbers, texts, truths or tuples of them."""
    if get_origin(kind) in (tuple, Sequence):
        return all(one is ... or _is_plain(one) for one in get_args(kind))
    if isinstance(kind, type):
        return kind in (int, float, str, bool)
    return any(_is_plain(one) for one in get_args(kind))


def _converted(value: Any, kind: Any) -> Any:
    """Return a value of JSON in a type of Python: lists become tuples. Raises TypeError for another kind of value."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (tuple, Sequence):
        if not isinstance(value, list | tuple):
            raise TypeError
        is_open = origin is Sequence or arguments[-1:] == (...,)
        kinds = arguments[:1] * len(value) if is_open else arguments
        if len(kinds) != len(value):
            raise TypeError
        return tuple(_converted(one, one_kind) for one, one_kind in zip(value, kinds, strict=True))
    if isinstance(kind, type):
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise TypeError
        return value
    for one in arguments:
        if one is NoneType and value is None:
            return None
        try:
            return _converted(value, one)
        except TypeError:
            continue
    raise TypeError


KINDS = _kinds()


def _fits(count: int, networks: int) -> bool:
    return count in (0, 1, networks)


# Fields that exclude or need each other: their names, the condition, the message.
_CONFLICTS: tuple[tuple[tuple[str, ...], Callable[[Request], Any], str], ...] = (
    (
        ("mask_blur", "mask_padding", "mask", "expand"),
        lambda r: (r.mask_blur or r.mask_padding is not None) and not (r.mask or r.expand),
        "mask_blur and mask_padding need mask or expand",
    ),
    (("invert_mask", "mask"), lambda r: r.invert_mask and not r.mask, "invert_mask needs mask"),
    (
        ("depth", "expand"),
        lambda r: r.depth and r.expand,
        "depth and expand do not go together: the map does not show the borders; without it, it is estimated",
    ),
    (
        ("control_image", "controlnet"),
        lambda r: r.control_image and not r.controlnet,
        "control_image needs controlnet: an id, a folder or a file",
    ),
    (
        ("control_image", "controlnet"),
        lambda r: r.controlnet and len(r.control_image) not in (1, len(r.controlnet)),
        "control_image is needed once for each controlnet, or once for all",
    ),
    (
        ("control_start", "control_end", "controlnet"),
        lambda r: not all(_fits(len(ends), len(r.controlnet)) for ends in (r.control_start, r.control_end)),
        "control_start and control_end are given once for each controlnet, or once for all",
    ),
    (
        ("hires", "refiner"),
        lambda r: r.refiner and r.hires,
        "hires and refiner do not go together: run one after the other",
    ),
    (
        ("refiner", "mask", "expand"),
        lambda r: r.refiner and (r.mask or r.expand),
        "refiner does not go together with mask and expand: it does not know what is kept",
    ),
)

_DEFAULT = Request()


class Sweep(dict[str, tuple[Any, ...]]):
    """Map the names of settings with several values to these, in the order in which they were given."""


def expand(lines: Sequence[tuple[Request, Sweep]]) -> list[Request]:
    """Expand requests to one for each image, in the order of the images.

    Choices and wildcards of a prompt stand for a prompt each. Each combination of swept values is a setting: the first
    of them changes slowest, then come the prompts, then the seeds. Seeds count on over all prompts, and start again
    where a line names one; several seeds are those of every prompt. All settings of a prompt have the same seeds.

    Raises ValueError for more than 9999 images, and where ``n_images`` is not the number of the seeds.
    """
    images: list[tuple[int, Request]] = []
    next_seed, number = None, 0
    for request, sweep in lines:
        settings, count = _settings(sweep), _images_per_prompt(request, sweep)
        _check_count(count * len(settings))
        if isinstance(request.seed, int) or next_seed is None:
            next_seed = image_seeds(request.seed if isinstance(request.seed, int) else None, 1)[0]
        for prompt in _prompts(request, next_seed):
            seeds = request.seed if isinstance(request.seed, tuple) else tuple(range(next_seed, next_seed + count))
            resolved = None if prompt == request.prompt else prompt
            for place, setting in enumerate(settings):
                for i, seed in enumerate(seeds):
                    variant = Variant(number, i, seeds, tuple(sweep))
                    single = {"seed": seed, "n_images": 1, "resolved_prompt": resolved, "variant": variant}
                    images.append((place, request.with_values(**single, **setting)))
            next_seed, number = seeds[-1] + 1, number + 1
            _check_count(len(images))
    return [image for _, image in sorted(images, key=lambda pair: pair[0])]


def _settings(sweep: Sweep) -> list[dict[str, Any]]:
    names = [name for name in sweep if name != "seed"]
    return [dict(zip(names, chosen, strict=True)) for chosen in product(*(sweep[name] for name in names))]


def _images_per_prompt(request: Request, sweep: Sweep) -> int:
    if isinstance(request.seed, tuple):
        if request.n_images not in (None, len(request.seed)):
            text = f"n_images {request.n_images} is not the number of the {len(request.seed)} seeds; leave it out"
            raise SettingError(text, "n_images")
        return len(request.seed)
    default = 1 if sweep else DEFAULT_IMAGES
    return default if request.n_images is None else request.n_images


def _check_count(images: int) -> None:
    if images > MOST_IMAGES:
        message = f"more than {MOST_IMAGES} images are requested; give fewer values, or a smaller n_images"
        raise SettingError(message, "n_images")


def _prompts(request: Request, seed: int) -> list[str]:
    """Return the prompts that choices and wildcards stand for, with the tags of LoRAs."""
    if request.resolved_prompt is not None:
        return [request.resolved_prompt]
    if request.weight_blocks or request.emphasis == "none":
        return [request.prompt]
    wildcards = None if request.wildcards is None else read_wildcards(request.wildcards)
    prompt = _LORA_TAG.sub(lambda tag: tag[0].replace("__", "\\__"), request.prompt)  # in a name it is no wildcard
    prompts = expand_prompt(prompt, seed if request.alternatives == "one" else None, wildcards)
    return [request.prompt] if prompts == [prompt] else prompts
