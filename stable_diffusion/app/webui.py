"""Read requests for AUTOMATIC1111's web UI as values by the names of a request's fields, and describe the results.

Settings without effect for the sampler or the model are ignored, as in the web UI; other unsupported settings are
refused. Prompts are read with the syntax of this library, which is close to that of the web UI.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import mlx.core as mx

from .. import __version__
from ..diffusion.choice import read_name, read_schedule
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedule import SCHEDULES
from . import infotext
from .library import Library
from .request import Request
from .worker import Picture

# A field -> the web UI's name of it in the text of a picture, by which ``infotext`` reads it.
_NAMES = {
    "steps": "Steps",
    "sampler_index": "Sampler",
    "sampler_name": "Sampler",  # takes precedence over the one above
    "scheduler": "Schedule type",
    "cfg_scale": "CFG scale",
    "image_cfg_scale": "Image CFG scale",
    "seed": "Seed",
    "subseed": "Variation seed",
    "subseed_strength": "Variation seed strength",
    "denoising_strength": "Denoising strength",
    "clip_skip": "Clip skip",
    "eta": "Eta",
    "s_churn": "Sigma churn",
    "s_tmin": "Sigma tmin",
    "s_tmax": "Sigma tmax",
    "s_noise": "Sigma noise",
    "hr_second_pass_steps": "Hires steps",
    "refiner_switch_at": "Refiner switch at",
}
_NO_EFFECT = {"subseed_strength": 0, "s_churn": 0, "s_tmin": 0, "s_tmax": 0, "s_noise": 1, "refiner_checkpoint": "None"}
_OPTIONS = {"CLIP_stop_at_last_layers": "Clip skip", "eta_noise_seed_delta": "ENSD", "randn_source": "RNG"}
_OF_SAMPLERS = {"Eta", "Sigma churn", "Sigma tmin", "Sigma tmax", "Sigma noise"}  # only of samplers that read them
_READ = {"Sampler": read_name, "Schedule type": read_schedule}  # their errors list the known names
_STRENGTH = 0.75  # of the web UI
_RESIZE = {0: "stretch", 1: "crop", 2: "pad", 3: "stretch"}
_RESIZE |= {"Just Resize": "stretch", "Crop and Resize": "crop", "Resize and Fill": "pad"}  # of ControlNets
ENLARGES = {"Latent": "latents", "None": "pixels", "Lanczos": "pixels"}  # without a network
# Fields of the second pass that, if given, must equal those of the first.
_OF_SECOND = ("hr_prompt", "hr_negative_prompt", "hr_sampler_name", "hr_scheduler", "hr_checkpoint_name")
_UNION_TYPES = ("OpenPose", "Depth", "Soft Edge", "Hard Edge", "Normal Map", "Segmentation", "Tile", "Inpaint")
_GUESS = ("ControlNet is more important", 2)
# The supported values of these fields of a ControlNet; the default is first.
_OF_CONTROLS = {
    "module": ("none", "None", "canny"),
    "control_mode": ("Balanced", 0, *_GUESS),
    "resize_mode": ("Crop and Resize", *_RESIZE),
    "union_control_type": ("Unknown", *_UNION_TYPES),
    "hr_option": ("Both",),
    "mask": (None,),
}
_OF_CANNY = {
    "threshold_a": (100, 64, -1),
    "threshold_b": (200, 64, -1),
}  # and values that clients always send
# Entries of the info about images that never change here.
_INFO = {"restore_faces": False, "face_restoration_model": None, "sd_vae_hash": None, "styles": []}
_INFO |= {"seed_resize_from_w": 0, "seed_resize_from_h": 0, "index_of_first_image": 0, "version": __version__}
_INFO |= {"extra_generation_params": {}, "is_using_inpainting_conditioning": False}

SIMPLE = ["None", "Lanczos"]  # without a network
_SCRIPTS = ["controlnet", "controlnet m2m"]  # by the second webuiapi knows that there is the first
# Keys of the web UI's that say nothing here.
_NO_HASH, _NO_PLACE = {"hash": None, "sha256": None, "config": None}, {"model_path": None, "model_url": None}
_NO_RHO = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}


def read_request(fields: Mapping[str, Any], library: Library) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a request to generate images: its values, and its input images in base64.

    ``fields`` have the types of the web UI. Raises ValueError for unsupported values.
    """
    image = fields["init_images"][0] if "init_images" in fields else None
    given = {"denoising_strength": _STRENGTH} | {k: v for k, v in fields.items() if _NO_EFFECT.get(k) != v}
    hires = _second_pass(given, library) if image is None and given.get("enable_hr") else {}
    has_effect = {
        "image_cfg_scale": image is not None,
        "denoising_strength": image is not None or bool(hires),
        "hr_second_pass_steps": bool(hires),
        "subseed": "subseed_strength" in given,
        "refiner_switch_at": "refiner_checkpoint" in given,
    }
    names = {name: given[field] for field, name in _NAMES.items() if field in given and has_effect.get(field, True)}
    values = _read(names) | {name: given.get(name, "") for name in ("prompt", "negative_prompt")}
    values |= {name: given[name] for name in ("width", "height") if name in given} | hires
    if hires:
        values["hires_strength"] = values.pop("strength")
    if values.get("variation_seed") == -1:
        del values["variation_seed"]
    values["n_images"] = given.get("batch_size", 1) * given.get("n_iter", 1)
    if "refiner_checkpoint" in given:
        values["refiner"] = library.find("models", given["refiner_checkpoint"])
    if given.get("tiling"):
        values["seamless"] = "xy"
    if image is not None:
        values |= {"resize": _RESIZE[given.get("resize_mode", 0)]} | _mask(given)
    values |= read_options(given.get("override_settings", {}), library)
    units = list(_units(given.get("alwayson_scripts", {})))
    images = [unit.get("image") or unit.get("input_image") or image for unit in units]  # or that of the request
    images = [one.get("image") if isinstance(one, dict) else one for one in images]
    if None in images:
        raise ValueError("a ControlNet has no image; give one in base64")
    mask = given.get("mask") if image is not None else None
    return _controls(units, library) | values, {"image": image, "mask": mask, "control_image": images or None}


def read_options(settings: Mapping[str, Any], library: Library) -> dict[str, Any]:
    """Read the supported settings of the web UI: model, autoencoder, and options of generation."""
    given = {name: value for name, value in settings.items() if value not in (None, "")}
    values = _read({name: given[field] for field, name in _OPTIONS.items() if field in given})
    if "sd_model_checkpoint" in given:
        values["model"] = library.find("models", str(given["sd_model_checkpoint"]))
    if "sd_vae" in given:
        is_own = given["sd_vae"] in ("Automatic", "None")
        values["vae"] = None if is_own else library.find("vaes", str(given["sd_vae"]))
    return values


def _read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read settings by their names in the text of an image."""
    values, other = infotext.to_arguments("", "", {name: infotext.number(value) for name, value in settings.items()})
    for name in other.keys() - _OF_SAMPLERS:
        _READ.get(name, str)(other[name])
        raise ValueError(f"{name} {other[name]!r:.80} is not supported; omit it")
    return {name: value for name, value in values.items() if name not in ("prompt", "negative_prompt")}


def _second_pass(given: Mapping[str, Any], library: Library) -> dict[str, Any]:
    for field in _OF_SECOND:
        value, first = given.get(field, ""), given.get(field.removeprefix("hr_"), "automatic")
        if value and value.lower() != first.lower() and not value.startswith("Use same"):
            raise ValueError(f"{field} {value!r:.80} must be that of the first pass; omit it")
    scales = [given.get("hr_scale", 2.0)]
    targets = {side: given.get(f"hr_resize_{axis}") for axis, side in (("x", "width"), ("y", "height"))}
    if any(targets.values()):
        scales = [target / (given.get(side) or math.inf) for side, target in targets.items() if target]
    if max(scales) - min(scales) > 0.01 or not min(scales):
        raise ValueError("hr_resize_x and hr_resize_y must be width and height times one factor; give hr_scale")
    upscaler = given.get("hr_upscaler", "Latent")
    return {"hires": scales[0], "hires_upscaler": ENLARGES.get(upscaler) or library.find("upscalers", upscaler)}


def _mask(given: Mapping[str, Any]) -> dict[str, Any]:
    if "mask" not in given:
        return {}
    blurs = {given[name] for name in ("mask_blur", "mask_blur_x", "mask_blur_y") if name in given} or {4.0}
    if len(blurs) > 1:
        raise ValueError("mask_blur, mask_blur_x and mask_blur_y differ; give mask_blur alone")
    padding = given.get("inpaint_full_res_padding", 0) if given.get("inpaint_full_res", True) else None
    is_inverted = given.get("inpainting_mask_invert", False)
    return {"mask_blur": blurs.pop(), "mask_padding": padding, "invert_mask": is_inverted}


def _units(scripts: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the ControlNets among the scripts that always run; refuse others, unless they are off."""
    for name, script in scripts.items():
        is_known, args = name.lower() == "controlnet", script.get("args") or []
        args = args if isinstance(args, list) else [args]
        for unit in args if is_known else args[:1]:
            if not unit or (isinstance(unit, dict) and not unit.get("enabled", unit.get("enable", True))):
                continue
            if not (is_known and isinstance(unit, dict)):
                raise ValueError(f"the script {name!r:.80} with {unit!r:.80} is not supported; omit it")
            given = {field: value for field, value in unit.items() if value not in (None, "")}
            for field, choices in (_OF_CONTROLS | (_OF_CANNY if given.get("module") == "canny" else {})).items():
                if given.setdefault(field, choices[0]) not in choices:
                    known = ", ".join(map(str, choices))
                    raise ValueError(f"{field} {given[field]!r:.80} of a ControlNet is unknown; choose one of {known}")
            yield given


def _controls(units: Sequence[Mapping[str, Any]], library: Library) -> dict[str, Any]:
    """Return the values of ControlNets; all share the field ``resize`` of the request."""
    if not units:
        return {}
    rows = {(unit["module"] == "canny", unit["control_mode"] in _GUESS, _RESIZE[unit["resize_mode"]]) for unit in units}
    if len(rows) > 1:
        raise ValueError("ControlNets differ in module, control_mode or resize_mode; give all of them the same")
    ((is_canny, is_guess, resize),) = rows
    types = [unit["union_control_type"] for unit in units if unit["union_control_type"] in _UNION_TYPES]
    sources = [library.find("controlnets", str(unit.get("model"))) for unit in units]
    return {
        "controlnet": [[source, unit.get("weight", 1.0)] for source, unit in zip(sources, units, strict=True)],
        "control_start": [unit.get("guidance_start", 0.0) for unit in units],
        "control_end": [unit.get("guidance_end", 1.0) for unit in units],
        "control_type": [str(_UNION_TYPES.index(kind)) for kind in types],
        "canny": is_canny,
        "guess_mode": is_guess,
        "resize": resize,
    }


def describe(pictures: Sequence[Picture], requests: Sequence[Request]) -> dict[str, Any]:
    """Return the web UI's "info" about images; ``requests`` are those of a job, which may have no images."""
    requests = [picture.request for picture in pictures] or requests
    first, texts = requests[0], [picture.text["parameters"] for picture in pictures]
    settings = infotext.read(texts[0])[2] if texts else {}
    each = {name: [getattr(one, name) for one in requests] for name in ("prompt", "negative_prompt", "seed")}
    each["subseed"] = [r.options.variation_seed if r.options.variation_strength else r.seed for r in requests]
    width, height = pictures[0].image.size if pictures else (first.width, first.height)
    info = {
        "subseed_strength": first.options.variation_strength or 0.0,
        "width": width,
        "height": height,
        "sampler_name": settings.get("Sampler", ""),
        "cfg_scale": float(settings.get("CFG scale", 0)),
        "steps": int(settings.get("Steps", 0)),
        "batch_size": len(requests),
        "sd_model_name": settings.get("Model", ""),
        "sd_model_hash": settings.get("Model hash", ""),
        "sd_vae_name": settings.get("VAE"),
        "denoising_strength": first.hires_strength if first.hires else first.strength,
        "clip_skip": first.options.clip_skip + 1,
        "infotexts": texts,
        "job_timestamp": timestamp(),
        "withheld": sum(picture.is_flagged for picture in pictures),
    }
    for name, values in each.items():
        info |= {name: values[0], f"all_{name}s": values}
    return _INFO | info


def timestamp() -> str:
    """Return the time as the web UI writes it."""
    return datetime.now().strftime("%Y%m%d%H%M%S")


def lists(library: Library, words: Sequence[str]) -> dict[str, Any]:
    """Return the lists of available names, by the path of the API. They contain no paths of this machine.

    ``words`` are the words of embeddings.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    used = mx.get_active_memory() + mx.get_cache_memory()
    schedulers = {"automatic": "Automatic"} | {name: infotext.schedule_name(name) for name in SCHEDULES}
    upscalers = [*SIMPLE, *library.upscalers]
    unknown = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name", "shape", "vectors"))
    listed = {
        "sd-models": [{"title": name, "model_name": name, "filename": name, **_NO_HASH} for name in library.models],
        "sd-vae": [{"model_name": name, "filename": name} for name in library.vaes],
        "samplers": [{"name": infotext.sampler_name(name), "aliases": [name], "options": {}} for name in SAMPLERS],
        "schedulers": [{"name": name, "label": label, **_NO_RHO} for name, label in schedulers.items()],
        "loras": [{"name": name, "alias": name, "path": name, "metadata": {}} for name in library.loras()],
        "embeddings": {"loaded": dict.fromkeys(words, unknown), "skipped": {}},
        "upscalers": [{"name": name, "model_name": name, "scale": 4, **_NO_PLACE} for name in upscalers],
        "latent-upscale-modes": [{"name": "Latent"}],
        "scripts": {"txt2img": _SCRIPTS, "img2img": _SCRIPTS},
        "memory": {"ram": {"free": total - used, "used": used, "total": total}, "cuda": {"error": "unavailable"}},
        "cmd-flags": {},
    }
    return {f"/sdapi/v1/{name}": value for name, value in listed.items()} | {
        "/controlnet/model_list": {"model_list": [*library.controlnets]},
        "/controlnet/module_list": {"module_list": ["none", "canny"]},
        "/controlnet/version": {"version": 3},
        "/internal/ping": {},
    }
