"""Write and read the text in which AUTOMATIC1111's web UI records a picture, which many programs read.

The prompt, a line "Negative prompt: ...", and a last line of settings:

    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512

A value with a comma, a colon or a line break is written as a string of JSON. Both texts may go over several lines. As
the text has no other marks, a prompt with a line that begins with "Negative prompt:" is not read as it was written.
"""

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ..diffusion.samplers import SAMPLERS, read_name

_NEGATIVE = "Negative prompt:"
# Bounded, or a long text without a colon would be looked through from each of its letters.
_SETTING = re.compile(r'(\w[\w /-]{0,99}):\s*("(?:[^"\\]|\\.)*"(?=\s*(?:,|$))|[^,]*)(?:,|$)')
_FEWEST_SETTINGS = 3  # of the last line, or it belongs to the prompt

# Names of the web UI that are not ours in capitals.
_SAMPLERS = {
    "euler_a": "Euler a",
    "dpm2_a": "DPM2 a",
    "pndm": "PLMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "euler": "Euler",
    "heun": "Heun",
    "unipc": "UniPC",
}
_SCHEDULES = {
    "default": "Uniform",
    "sgm_uniform": "SGM Uniform",
    "align_your_steps_xl": "Align Your Steps",
}
# Settings that are fields of a request: the web UI's name, the field, and the type of the value.
_FLAGS = {
    "Steps": ("steps", int),
    "CFG scale": ("cfg", float),
    "Image CFG scale": ("image_cfg", float),
    "Seed": ("seed", int),
    "Denoising strength": ("strength", float),
    "Mask blur": ("mask_blur", float),
    "Hires upscale": ("hires", float),
    "Hires steps": ("hires_steps", lambda text: int(text) or None),  # 0 is as many as before
    "Refiner switch at": ("refiner_start", float),
}


def sampler_name(sampler: str) -> str:
    """Return the web UI's name of a sampler, of one that is known here by any name."""
    name = read_name(sampler)[0]
    return _SAMPLERS.get(name, name.upper())


def schedule_name(schedule: str | None) -> str:
    """Return the web UI's name of a schedule; None is the checkpoint's."""
    schedule = schedule or "default"
    return _SCHEDULES.get(schedule, schedule.replace("_", " ").title())


def write(prompt: str, negative: str, settings: Mapping[str, Any]) -> str:
    """Write the text of a picture; settings that are None are left out."""
    lines = [prompt, f"{_NEGATIVE} {negative}"] if negative else [prompt]
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines).replace("\0", "")  # in which PNG and others see the end of a text


def number(value: Any) -> str:
    """Write a number with all its digits, without an exponent; anything else as it is."""
    return format(Decimal(repr(value)), "f").removesuffix(".0") if isinstance(value, float) else str(value)


def _quoted(value: Any) -> str:
    text = number(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def read(text: str) -> tuple[str, str, dict[str, str]]:
    """Split a text into the prompt, the negative prompt and the settings."""
    *lines, last = text.strip().split("\n")
    settings = {name: _unquoted(value) for name, value in _SETTING.findall(last)}
    if len(settings) < _FEWEST_SETTINGS:
        lines, settings = [*lines, last], {}
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE)
    return "\n".join(lines[:start]).strip(), negative.strip(), settings


def _unquoted(value: str) -> str:
    value = value.strip()
    if value.startswith('"'):
        try:
            return str(json.loads(value))
        except ValueError:
            pass
    return value


def as_arguments(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a text's values by the names of a request's fields, and its settings that are none.

    Values that cannot be read are among the latter; their limits are checked by the request.
    """
    prompt, negative, settings = read(text)
    arguments: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    other = {}
    for name, value in settings.items():
        try:
            arguments |= _argument(name, value)
        except (ValueError, KeyError):
            other[name] = value
    if "hires" in arguments and "strength" in arguments:
        arguments["hires_strength"] = arguments.pop("strength")
    return arguments, other


def _argument(name: str, value: str) -> dict[str, Any]:
    """Return a setting as fields; KeyError or ValueError for what is none."""
    if name == "Size":
        width, height = value.split("x")
        return {"width": int(width), "height": int(height)}
    if name == "Sampler":
        sampler, schedule = read_name(value)
        return {"sampler": sampler} | ({"schedule": schedule} if schedule else {})
    if name == "Schedule type":
        return {} if value == "Automatic" else {"schedule": "default" if value == "Uniform" else _schedule(value)}
    if name == "Clip skip":  # counts from 1, which leaves out nothing
        return {"clip_skip": max(0, int(value) - 1)}
    if name == "Hires upscaler":
        return {"hires_upscaler": "latents" if value.startswith("Latent") else "pixels"}
    flag, kind = _FLAGS[name]
    number = kind(value)
    return {} if number is None else {flag: number}


def _schedule(name: str) -> str:
    """Return our name of a schedule of the web UI; ValueError for an unknown one."""
    schedule = read_name(f"{next(iter(SAMPLERS))} {name}")[1]
    if schedule is None:
        raise ValueError(f"schedule {name!r} is unknown")
    return schedule
