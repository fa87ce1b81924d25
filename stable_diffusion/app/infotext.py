"""Write and read the metadata text of AUTOMATIC1111's web UI, which many programs read.

The prompt, a line "Negative prompt: ...", and a last line of settings:

    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512

A value with a comma, a colon or a line break is written as a JSON string. Both prompts may have several lines. The
text has no escapes: a prompt with a line that begins with "Negative prompt:" is read wrongly.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from decimal import Decimal
from pathlib import PurePath
from typing import Any

from ..diffusion.choice import read_name, read_schedule
from ..diffusion.samplers import SAMPLERS

_NEGATIVE = "Negative prompt:"
# Bounded: otherwise a long text without a colon would be searched from each of its letters.
_SETTING = re.compile(r'(\w[\w /-]{0,99}):\s*("(?:[^"\\]|\\.)*"(?=\s*(?:,|$))|\{[^{}]*\}(?=\s*(?:,|$))|[^,]*)(?:,|$)')
_FEWEST_SETTINGS = 3  # of the last line; with fewer it belongs to the prompt

# Words of our names as the web UI writes them, except in capitals (samplers) or as a title (schedules).
_SAMPLER_WORDS = {"a": "a", "dpmpp": "DPM++", "euler": "Euler", "heun": "Heun", "pndm": "PLMS", "unipc": "UniPC"}
_SCHEDULE_TITLES = {"default": "Uniform", "sgm_uniform": "SGM Uniform", "align_your_steps_xl": "Align Your Steps"}
_GENERATORS = {"cpu": "torch", "gpu": "cuda", "nv": "cuda", "cuda": "cuda"}  # the noise source for a value of RNG


def number(value: Any) -> str:
    """Write a number with all its digits, without an exponent; convert other values with ``str``."""
    return format(Decimal(repr(value)), "f").removesuffix(".0") if isinstance(value, float) else str(value)


def sampler_name(sampler: str) -> str:
    """Return the web UI's name of a sampler, given by any of its names."""
    return " ".join(_SAMPLER_WORDS.get(word, word.upper()) for word in read_name(sampler)[0].split("_"))


def schedule_name(schedule: str) -> str:
    """Return the web UI's name of a schedule; "default" is the checkpoint's."""
    return _SCHEDULE_TITLES.get(schedule, schedule.replace("_", " ").title())


def _schedule(text: str) -> str | None:
    return None if text.lower() == "automatic" else read_schedule(text)


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


# The web UI's name -> a field of a request, the function that reads its value (KeyError or ValueError if unreadable,
# None for no value) and the one that writes it. "size" is width and height; a sampler may include its schedule.
_FIELDS: dict[str, tuple[str, Callable[[str], Any], Callable[[Any], str]]] = {
    "Steps": ("steps", int, number),
    "Sampler": ("sampler", read_name, sampler_name),
    "Schedule type": ("schedule", _schedule, schedule_name),
    "CFG scale": ("cfg", float, number),
    "Image CFG scale": ("image_cfg", float, number),
    "Seed": ("seed", int, number),
    "Size": ("size", _size, lambda size: f"{size[0]}x{size[1]}"),
    "Denoising strength": ("strength", float, number),
    "Clip skip": ("clip_skip", lambda text: max(0, int(text) - 1), lambda skipped: number(skipped + 1)),  # from 1
    "Mask blur": ("mask_blur", float, number),
    "Hires upscale": ("hires", float, number),
    "Hires steps": ("hires_steps", lambda text: int(text) or None, number),  # 0 is the number of the first pass
    "Hires upscaler": (
        "hires_upscaler",
        lambda text: "latents" if text.startswith("Latent") else "pixels",
        lambda method: {"latents": "Latent", "pixels": "Lanczos"}.get(method) or PurePath(method).stem,
    ),
    "Refiner switch at": ("refiner_start", float, number),
    "Eta": ("eta", float, number),
    "Sigma churn": ("s_churn", float, number),
    "Sigma tmin": ("s_tmin", float, number),
    "Sigma tmax": ("s_tmax", lambda text: None if float(text) in (0, math.inf) else float(text), number),
    "Sigma noise": ("s_noise", float, number),
    "RNG": ("noise_source", lambda text: _GENERATORS[text.lower()], {"torch": "CPU", "cuda": "NV"}.__getitem__),
    "ENSD": ("eta_noise_seed_delta", int, number),
    "Prompt 2": ("prompt_2", str, str),  # of XL's second text encoder; the web UI has no such name
    "Negative prompt 2": ("negative_prompt_2", str, str),
    "Variation seed": ("variation_seed", int, number),
    "Variation seed strength": ("variation_strength", float, number),
}


def write(prompt: str, negative: str, fields: Mapping[str, Any], others: Mapping[str, Any]) -> str:
    """Write a picture's text: ``fields`` of its request, and ``others`` by the web UI's names. None is omitted."""
    if "hires" in fields:
        fields = {**fields, "strength": fields["hires_strength"]}
    rows = [(name, to_text, fields.get(field)) for name, (field, _, to_text) in _FIELDS.items()]
    settings = {name: to_text(value) for name, to_text, value in rows if value is not None}
    settings |= {name: value for name, value in others.items() if value is not None}
    lines = [prompt, f"{_NEGATIVE} {negative}"] if negative else [prompt]
    # "Hashes" is JSON already.
    pairs = ((name, value if name == "Hashes" else _quoted(value)) for name, value in settings.items())
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs))
    return "\n".join(lines).replace("\0", "")  # PNG and others end a text there


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n]|^["{\s]|\s$', text) else text


def read(text: str) -> tuple[str, str, dict[str, str]]:
    """Split a text into the prompt, the negative prompt and the settings."""
    *lines, last = text.strip().split("\n")
    settings = {}
    for name, value in _SETTING.findall(last):
        settings[name] = value = value.strip()
        if value.startswith('"'):
            with suppress(ValueError):
                settings[name] = str(json.loads(value))
    if len(settings) < _FEWEST_SETTINGS:
        lines, settings = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE)
    return "\n".join(lines[:start]).strip(), negative.strip(), settings


def to_arguments(prompt: str, negative: str, settings: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return values by the names of a request's fields, and the settings that are unknown or unreadable."""
    arguments: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    other = {}
    for name, text in settings.items():
        try:
            field, from_text, _ = _FIELDS["Eta" if name == "Eta DDIM" else name]
            value = from_text(text)
        except (KeyError, ValueError):
            other[name] = text
        else:
            arguments |= {} if value is None else {field: value}
    if "size" in arguments:
        arguments["width"], arguments["height"] = arguments.pop("size")
    if "sampler" in arguments:
        arguments["sampler"], schedule = arguments["sampler"]
        arguments |= {"schedule": schedule} if schedule and "schedule" not in arguments else {}
    options = SAMPLERS[arguments["sampler"]].option_names if "sampler" in arguments else ()
    for name in ("Eta", "Sigma churn", "Sigma tmin", "Sigma tmax", "Sigma noise"):
        field = _FIELDS[name][0]
        if field in arguments and field not in options:
            other[name] = number(arguments.pop(field))
    if "hires" in arguments and "strength" in arguments:
        arguments["hires_strength"] = arguments.pop("strength")
    return arguments, other
