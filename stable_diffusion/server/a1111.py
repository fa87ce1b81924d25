"""The API of AUTOMATIC1111's web UI, ``/sdapi/v1``: for Open WebUI, SillyTavern, webuiapi, plugins and bots.

Unknown fields are ignored, as there. Prompts have the meaning that they have here, which is close to that there.
"""

import json
import os
from collections.abc import Mapping
from datetime import datetime
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import mlx.core as mx
from fastapi import APIRouter, Body
from fastapi import Request as Connection

from ..app import infotext
from ..app.inputs import enlarged
from ..app.worker import Picture
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedule import SCHEDULES
from ..images.files import open_image, read_text
from ..images.image import fit
from ..upscaling import load_upscaler
from .pictures import MOST_SIDE, decoded, keep, to_base64
from .service import Service
from .settings import check_most

Fields = Annotated[dict[str, Any], Body()]

# A field -> the web UI's name of it in the text of a picture, by which ``infotext`` reads it.
_SETTINGS = {
    "steps": "Steps",
    "sampler_index": "Sampler",
    "sampler_name": "Sampler",
    "scheduler": "Schedule type",
    "cfg_scale": "CFG scale",
    "image_cfg_scale": "Image CFG scale",
    "seed": "Seed",
    "subseed": "Variation seed",
    "subseed_strength": "Variation seed strength",
    "denoising_strength": "Denoising strength",
    "eta": "Eta",
    "s_churn": "Sigma churn",
    "s_tmin": "Sigma tmin",
    "s_tmax": "Sigma tmax",
    "s_noise": "Sigma noise",
    # of ``override_settings``
    "CLIP_stop_at_last_layers": "Clip skip",
    "eta_noise_seed_delta": "ENSD",
    "randn_source": "RNG",
}
_OF_HIRES = {"hr_scale": "Hires upscale", "hr_second_pass_steps": "Hires steps", "hr_upscaler": "Hires upscaler"}
_OPTIONAL = {"Eta", "Sigma churn", "Sigma tmin", "Sigma tmax", "Sigma noise"}  # of samplers that have them
_RESIZE = ("stretch", "crop", "pad", "stretch")
_ENLARGES = ("None", "Lanczos", "Latent")  # without a network
_GUESS = (2, "2", "ControlNet is more important")


def routes(service: Service) -> APIRouter:
    """Return the routes of this interface."""
    router = APIRouter(tags=["AUTOMATIC1111's API"])
    worker, library = service.worker, service.settings.library

    @router.post("/sdapi/v1/txt2img", summary="Draw from a prompt")
    async def txt2img(body: Fields, connection: Connection) -> dict[str, Any]:
        return _answer(body, await service.draw(connection, service.job(*_request(service, body))))

    @router.post("/sdapi/v1/img2img", summary="Draw from a picture")
    async def img2img(body: Fields, connection: Connection) -> dict[str, Any]:
        images = body.get("init_images") or []
        if not isinstance(images, list) or not images:
            raise ValueError("init_images is empty; give a picture in base64")
        return _answer(body, await service.draw(connection, service.job(*_request(service, body, images[0]))))

    @router.post("/sdapi/v1/extra-single-image", summary="Enlarge a picture")
    async def extra_single_image(body: Fields, connection: Connection) -> dict[str, Any]:
        return {"html_info": "", "image": await _enlarged(service, connection, body)}

    @router.post("/sdapi/v1/png-info", summary="Read how a picture was made")
    async def png_info(body: Fields) -> dict[str, Any]:
        with TemporaryDirectory() as folder:
            texts = read_text(keep(decoded(body.get("image")), folder, "picture"))
        return {"info": texts.get("parameters", ""), "items": texts, "parameters": {}}

    @router.get("/sdapi/v1/options", summary="Return the model in use, and the defaults of requests")
    async def options() -> dict[str, Any]:
        vae = next((name for name, source in library.vaes.items() if source == service.base.vae), "Automatic")
        skipped = service.base.options.clip_skip + 1
        return {"sd_model_checkpoint": service.model, "sd_vae": vae, "CLIP_stop_at_last_layers": skipped}

    @router.post("/sdapi/v1/options", summary="Use another model")
    async def set_options(body: Fields, connection: Connection) -> dict[str, Any]:
        values = _overrides(service, body)
        values = {name: value for name, value in values.items() if service.base.value(name) != value}
        if values:
            await service.change(connection, values)
        return {}

    @router.post("/sdapi/v1/interrupt", summary="Stop after the step at hand")
    @router.post("/sdapi/v1/skip", include_in_schema=False)
    async def interrupt() -> dict[str, Any]:
        worker.interrupt()
        return {}

    @router.get("/sdapi/v1/progress", summary="Say how far the job at hand is")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        job, worker.wants_preview = worker.job, not skip_current_image
        state = {"skipped": False, "interrupted": False, "job": "", "job_count": 0, "job_no": 0}
        state |= {"sampling_step": 0, "sampling_steps": 0, "job_timestamp": _timestamp()}
        if job is None:
            return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
        state |= {"job": "draw", "job_count": len(worker.jobs), "interrupted": job.is_cancelled}
        state |= {"sampling_step": job.done, "sampling_steps": job.done + job.left}
        image = to_base64(job.preview) if job.preview and not skip_current_image else None
        made = {"progress": min(job.progress, 0.99), "eta_relative": job.seconds_left}
        return made | {"state": state, "current_image": image, "textinfo": None}

    for path, describe in _LISTS.items():
        router.add_api_route(path, _listing(service, describe), methods=["GET"], summary=f"List {path.split('/')[-1]}")
    return router


def _request(service: Service, body: Fields, image: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values and the pictures of a request. Raises ValueError for fields that cannot be followed."""
    if script := body.get("script_name"):
        raise ValueError(f"there is no script {script!r:.80}; leave script_name out")
    masked, has_hires = image is not None and body.get("mask") is not None, image is None and body.get("enable_hr")
    skipped = set() if has_hires or image is not None else {"denoising_strength"}
    skipped |= set() if body.get("subseed_strength") else {"subseed", "subseed_strength"}
    given = {"denoising_strength": 0.75 if image is not None else 0.7} | {
        k: v for k, v in body.items() if v is not None
    }
    settings = {name: given[field] for field, name in _SETTINGS.items() if field in given and field not in skipped}
    hires, upscaler = {"hr_scale": 2.0} | given if has_hires else {}, given.get("hr_upscaler", "Latent")
    if has_hires and given.get("hr_resize_x"):
        hires["hr_scale"] = given["hr_resize_x"] / given.get("width", 512)
    settings |= {name: hires[field] for field, name in _OF_HIRES.items() if field in hires}
    values = _read(given.get("prompt", ""), given.get("negative_prompt", ""), settings)
    values |= {name: given[name] for name in ("width", "height") if name in given}
    values["n_images"] = _count(given.get("batch_size", 1)) * _count(given.get("n_iter", 1))
    if has_hires and upscaler in service.settings.library.upscalers:
        values["hires_upscaler"] = service.settings.library.find("upscalers", upscaler)
    if refiner := given.get("refiner_checkpoint"):
        values |= {"refiner": service.settings.library.find("models", refiner)}
        values |= {"refiner_start": given["refiner_switch_at"]} if given.get("refiner_switch_at") else {}
    if given.get("tiling"):
        values["seamless"] = "xy"
    if image is not None:
        values["resize"] = _RESIZE[given.get("resize_mode", 0)] if given.get("resize_mode", 0) in range(4) else "crop"
    if masked:
        values |= {"mask_blur": given.get("mask_blur", 4), "invert_mask": bool(given.get("inpainting_mask_invert"))}
        values |= {"mask_padding": given.get("inpaint_full_res_padding", 32)} if given.get("inpaint_full_res") else {}
    values |= _overrides(service, given.get("override_settings") or {})
    controls, control_images = _controls(service, given.get("alwayson_scripts") or {})
    pictures = {"image": image, "mask": body["mask"] if masked else None, "control_image": control_images or None}
    return values | controls, pictures


def _read(prompt: Any, negative: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Read settings by the web UI's names. Raises ValueError for one that has no meaning here."""
    if not isinstance(prompt, str) or not isinstance(negative, str):
        raise ValueError("prompt and negative_prompt are no texts; give strings")
    texts = {name: infotext.number(value) for name, value in settings.items()}
    values, other = infotext.to_arguments(prompt, negative, texts)
    for name in other.keys() - _OPTIONAL:
        raise ValueError(f"{name} {other[name]!r:.80} has no meaning here; leave it out")
    if values.get("variation_seed") == -1:
        del values["variation_seed"]
    return values


def _overrides(service: Service, settings: Any) -> dict[str, Any]:
    """Return the values of the web UI's settings that have a meaning here: model, autoencoder and ways of drawing."""
    library, settings = service.settings.library, settings if isinstance(settings, dict) else {}
    values = _read("", "", {name: settings[field] for field, name in _SETTINGS.items() if field in settings})
    values = {name: value for name, value in values.items() if name not in ("prompt", "negative_prompt")}
    if model := settings.get("sd_model_checkpoint"):
        values["model"] = library.find("models", model)
    if vae := settings.get("sd_vae"):
        values["vae"] = None if vae in ("Automatic", "None") else library.find("vaes", vae)
    return values


def _controls(service: Service, scripts: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return the values and the images of the ControlNets among the scripts that always run."""
    found = [script for name, script in scripts.items() if name.lower() == "controlnet"] if scripts else []
    units = [unit for unit in (found[0].get("args") or [] if found else []) if unit and unit.get("enabled", True)]
    if not units:
        return {}, []
    modules = {unit.get("module") or "none" for unit in units}
    if not modules <= {"none", "None", "canny"} or len(modules) > 1:
        raise ValueError(
            f"the modules {', '.join(sorted(map(str, modules))):.80} cannot run; choose none, or canny for all"
        )
    images = [unit.get("image", unit.get("input_image")) for unit in units]
    return {
        "controlnet": [
            [service.settings.library.find("controlnets", str(unit.get("model"))), unit.get("weight", 1.0)]
            for unit in units
        ],
        "control_start": [unit.get("guidance_start", 0.0) for unit in units],
        "control_end": [unit.get("guidance_end", 1.0) for unit in units],
        "canny": modules == {"canny"},
        "guess_mode": any(unit.get("control_mode") in _GUESS for unit in units),
    }, [image.get("image") if isinstance(image, dict) else image for image in images]


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"batch_size and n_iter {value!r:.80} are no counts; give whole numbers from 1 on")
    return value


def _answer(body: Fields, pictures: list[Picture]) -> dict[str, Any]:
    """Return the pictures, and what the web UI says of them: ``info`` is a text of JSON."""
    requests, texts = [picture.request for picture in pictures], [picture.text["parameters"] for picture in pictures]
    _, _, first = infotext.read(texts[0]) if texts else ("", "", {})
    info = {
        **{f"all_{name}s": [getattr(one, name) for one in requests] for name in ("prompt", "negative_prompt", "seed")},
        **{f"all_sub{name}s": [one.options.variation_seed or one.seed for one in requests] for name in ("seed",)},
        **{key: first.get(name) for key, name in (("sampler_name", "Sampler"), ("sd_model_name", "Model"))},
        **{key: float(first.get(name, 0)) for key, name in (("cfg_scale", "CFG scale"), ("steps", "Steps"))},
        "sd_model_hash": first.get("Model hash"),
        "denoising_strength": body.get("denoising_strength"),
        "batch_size": len(pictures),
        "infotexts": texts,
        "index_of_first_image": 0,
        "job_timestamp": _timestamp(),
        "styles": [],
    }
    if pictures:
        info |= {"width": pictures[0].image.width, "height": pictures[0].image.height, "steps": int(info["steps"])}
        info |= {name: info[f"all_{name}s"][0] for name in ("prompt", "negative_prompt", "seed", "subseed")}
    info["withheld"] = sum(picture.is_flagged for picture in pictures)
    images = [to_base64(picture) for picture in pictures]
    return {"images": images, "parameters": {}, "info": json.dumps(info)}


async def _enlarged(service: Service, connection: Connection, body: Fields) -> str:
    """Return a picture in base64 that is enlarged by a network, or by Lanczos, to a factor or a size."""
    name, factor = body.get("upscaler_1") or "None", body.get("upscaling_resize", 2)
    source = None if name in _ENLARGES else service.settings.library.find("upscalers", name)
    with TemporaryDirectory() as folder:
        image = open_image(keep(decoded(body.get("image")), folder, "picture"))
    if body.get("resize_mode") == 1:
        size = body.get("upscaling_resize_w", 512), body.get("upscaling_resize_h", 512)
    else:
        size = tuple(round(side * factor) for side in image.size)
    for side in size:
        check_most("the side", side, MOST_SIDE)
    if source is not None:
        image = await service.call(connection, lambda model: enlarged(model, image, load_upscaler(source)))
    mode = "crop" if body.get("upscaling_crop", True) else "pad"
    return to_base64(fit(image, *size, mode=mode))


# --- lists -----------------------------------------------------------------------------------------------------------


def _timestamp() -> str:
    return datetime.now().strftime("%Y%m%d%H%M%S")


def _models(service: Service) -> list[dict[str, Any]]:
    names = service.settings.library.models
    return [{"title": name, "model_name": name, "filename": name, "hash": None, "sha256": None} for name in names]


def _samplers(service: Service) -> list[dict[str, Any]]:
    return [{"name": infotext.sampler_name(name), "aliases": [name], "options": {}} for name in SAMPLERS]


def _schedulers(service: Service) -> list[dict[str, Any]]:
    names = {"automatic": "Automatic"} | {name: infotext.schedule_name(name) for name in SCHEDULES}
    return [{"name": name, "label": label, "aliases": None} for name, label in names.items()]


def _loras(service: Service) -> list[dict[str, Any]]:
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in service.settings.library.loras()]


def _embeddings(service: Service) -> dict[str, Any]:
    return {"loaded": {word: {"step": None, "sd_checkpoint": None} for word in service.worker.words}, "skipped": {}}


def _upscalers(service: Service) -> list[dict[str, Any]]:
    names = [*_ENLARGES[:2], *service.settings.library.upscalers]
    return [{"name": name, "model_name": name, "model_path": None, "model_url": None, "scale": 4} for name in names]


def _memory(service: Service) -> dict[str, Any]:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    used = mx.get_active_memory() + mx.get_cache_memory()
    return {"ram": {"free": total - used, "used": used, "total": total}, "cuda": {"error": "there is no CUDA here"}}


_LISTS = {
    "/sdapi/v1/sd-models": _models,
    "/sdapi/v1/samplers": _samplers,
    "/sdapi/v1/schedulers": _schedulers,
    "/sdapi/v1/loras": _loras,
    "/sdapi/v1/embeddings": _embeddings,
    "/sdapi/v1/sd-vae": lambda service: [
        {"model_name": name, "filename": name} for name in service.settings.library.vaes
    ],
    "/sdapi/v1/upscalers": _upscalers,
    "/sdapi/v1/latent-upscale-modes": lambda service: [{"name": "Latent"}],
    "/sdapi/v1/scripts": lambda service: {"txt2img": [], "img2img": ["controlnet"]},
    "/sdapi/v1/memory": _memory,
    "/sdapi/v1/cmd-flags": lambda service: {},
    "/controlnet/model_list": lambda service: {"model_list": [*service.settings.library.controlnets]},
    "/controlnet/module_list": lambda service: {"module_list": ["none", "canny"]},
    "/internal/ping": lambda service: {},
}


def _listing(service: Service, describe: Any) -> Any:
    async def listing() -> Any:
        return describe(service)

    return listing
