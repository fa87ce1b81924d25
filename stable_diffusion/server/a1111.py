"""The API of AUTOMATIC1111's web UI, ``/sdapi/v1``: for Open WebUI, SillyTavern, webuiapi, plugins and bots.

As in the web UI, null and empty texts mean the default of a field, and unknown fields are ignored.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from operator import truediv
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as Connection
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from ..app import infotext, webui
from ..app.inputs import enlarged
from ..app.library import check_most
from ..app.metadata import Record, for_model
from ..images.encoded import read_by, to_base64
from ..images.files import open_image, read_text
from ..images.image import fit
from ..upscaling import load_upscaler
from .service import Fields, Service

_COUNT = Annotated[int, Field(ge=1)]
# The types of fields. For an unsupported field, a Literal accepts the values without effect.
_OF_TEXT = {
    "steps seed subseed clip_skip width height hr_second_pass_steps hr_resize_x hr_resize_y": int,
    "cfg_scale subseed_strength denoising_strength eta s_churn s_tmin s_tmax s_noise hr_scale refiner_switch_at": float,
    "prompt negative_prompt sampler_index sampler_name scheduler hr_upscaler refiner_checkpoint": str,
    "hr_prompt hr_negative_prompt hr_sampler_name hr_scheduler hr_checkpoint_name": str,
    "tiling enable_hr send_images": bool,
    "batch_size n_iter": _COUNT,
    "override_settings": dict[str, Any],
    "alwayson_scripts": dict[str, dict[str, Any]],
    "restore_faces disable_extra_networks": Literal[False],
    "firstphase_width firstphase_height s_min_uncond": Literal[0],
    "seed_resize_from_w seed_resize_from_h": Literal[0, -1],
    "script_name infotext": Literal["None"],
    "styles": tuple[()],
}
_OF_IMAGE = _OF_TEXT | {
    "init_images": Annotated[list[Any], Field(min_length=1, max_length=1)],
    "mask": Any,
    "image_cfg_scale mask_blur mask_blur_x mask_blur_y": float,
    "inpaint_full_res_padding": int,
    "inpaint_full_res inpainting_mask_invert": bool,
    "resize_mode": Literal[0, 1, 2, 3],
    "inpainting_fill": Literal[0, 1],
    "initial_noise_multiplier": Literal[1],
}
_OF_EXTRAS = {
    "image": Any,
    "upscaler_1": str,
    "resize_mode": Literal[0, 1],
    "upscaling_resize": Annotated[float, Field(gt=0)],
    "upscaling_resize_w upscaling_resize_h": _COUNT,
    "upscaling_crop": bool,
    "extras_upscaler_2_visibility gfpgan_visibility codeformer_visibility": Literal[0],
}
_STATE = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": ""}
_STATE |= dict.fromkeys(("job_count", "job_no", "sampling_step", "sampling_steps"), 0)


class _Body(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_defaults(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if v not in (None, "")} if isinstance(values, dict) else values


def _body(name: str, kinds: Mapping[str, Any]) -> type[_Body]:
    fields = {field: kind for names, kind in kinds.items() for field in names.split()}
    pairs = {field: (kind, ... if field == "init_images" else None) for field, kind in fields.items()}
    return create_model(name, __base__=_Body, **pairs)


_Text, _Image, _Extras = _body("txt2img", _OF_TEXT), _body("img2img", _OF_IMAGE), _body("extras", _OF_EXTRAS)


def routes(service: Service) -> APIRouter:
    """Return the routes of this interface."""
    router = APIRouter(tags=["AUTOMATIC1111's API"])
    lists = [
        ("GET", path, partial(_list, path), "List the available names")
        for path in webui.lists(service.settings.library, ())
    ]
    for method, path, answer, summary in (*_ROUTES, *lists):
        options = {"methods": [method], "name": path.rpartition("/")[2], "response_model": None}
        router.add_api_route(path, partial(answer, service), summary=summary, description=summary, **options)
    return router


def _drawing(kind: type[_Body]) -> Callable[..., Any]:
    """Return the handler of requests to generate images, for one kind of body."""

    async def draw(service: Service, body: kind, connection: Connection) -> dict[str, Any]:
        given = body.model_dump(exclude_unset=True)

        values, pictures = webui.read_request(given, service.settings.library)
        values.setdefault("clip_skip", service.base.options.clip_skip)
        job = await service.job(values, pictures, adapt=partial(for_model, Record("", values)))
        pictures = await service.draw(connection, job)
        sent = pictures if given.get("send_images", True) else []
        images = [await run_in_threadpool(to_base64, one.image, one.text) for one in sent]
        info = json.dumps(webui.describe(pictures, job.requests))
        echo = {name: value for name, value in given.items() if isinstance(value, str | int | float) and name != "mask"}
        return {"images": images, "parameters": echo, "info": info}

    return draw


async def _extra_single_image(service: Service, body: _Extras, connection: Connection) -> dict[str, Any]:
    """Enlarge an image with a network or Lanczos; "None" returns it unchanged."""
    given, name = body.model_dump(exclude_unset=True), body.upscaler_1 or "None"
    source = None if name in webui.SIMPLE else service.settings.library.find("upscalers", name)

    image = await run_in_threadpool(read_by, open_image, given.get("image"))
    is_size, wanted = given.get("resize_mode") == 1, [given.get(f"upscaling_resize_{axis}", 512) for axis in "wh"]
    factor = max(map(truediv, wanted, image.size)) if is_size else given.get("upscaling_resize", 2.0)
    crops = is_size and given.get("upscaling_crop", True)
    size = wanted if crops else [max(1, round(side * factor)) for side in image.size]
    for side in size:
        check_most("the side", side, 4 * service.settings.limits.pixels)
    if source is not None:
        check_most("the side of the image for an upscaler network", max(image.size), service.settings.limits.pixels)
        image = await service.call(connection, lambda model: enlarged(model, image, load_upscaler(source)))
    image = image if name == "None" else await run_in_threadpool(fit, image, *size)
    return {"html_info": "", "image": await run_in_threadpool(to_base64, image)}


def _png_info(service: Service, body: Fields) -> dict[str, Any]:
    texts = read_by(read_text, body.get("image"))
    prompt, negative, settings = infotext.read(text := texts.get("parameters", ""))
    return {"info": text, "items": texts, "parameters": {"Prompt": prompt, "Negative prompt": negative} | settings}


async def _options(service: Service) -> dict[str, Any]:
    """Return the settings in use. To change the model, clients send all of them back."""
    vaes = service.settings.library.vaes
    vae = next((name for name, source in vaes.items() if source == service.base.vae), "Automatic")
    skipped = service.base.options.clip_skip + 1
    return {"sd_model_checkpoint": service.model, "sd_vae": vae, "CLIP_stop_at_last_layers": skipped}


async def _set_options(service: Service, body: Fields, connection: Connection) -> dict[str, Any]:
    values = webui.read_options(body, service.settings.library)
    values = {name: value for name, value in values.items() if service.base.value(name) != value}
    if values:
        await service.change(connection, values)
    return {}


async def _interrupt(service: Service) -> dict[str, Any]:
    service.worker.interrupt()
    return {}


async def _progress(service: Service, skip_current_image: bool = False) -> dict[str, Any]:
    job, image, state = service.worker.job, None, _STATE | {"job_timestamp": webui.timestamp()}
    if job is None:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    if not skip_current_image:
        service.worker.wants_preview = True
        image = await run_in_threadpool(to_base64, job.preview, None, "jpg", 80) if job.preview else None
    state |= {"job": "draw", "job_count": len(service.worker.jobs), "interrupted": job.is_cancelled}
    state |= {"sampling_step": job.done, "sampling_steps": job.done + job.left}
    made = {"progress": min(max(job.progress, 0.01), 0.99), "eta_relative": job.seconds_left}
    return made | {"state": state, "current_image": image, "textinfo": None}


def _list(path: str, service: Service) -> Any:
    return webui.lists(service.settings.library, service.worker.words)[path]


_ROUTES = [
    ("POST", "/sdapi/v1/txt2img", _drawing(_Text), "Generate images from a prompt"),
    ("POST", "/sdapi/v1/img2img", _drawing(_Image), "Generate images from an image"),
    ("POST", "/sdapi/v1/extra-single-image", _extra_single_image, "Enlarge an image"),
    ("POST", "/sdapi/v1/png-info", _png_info, "Read the settings recorded in an image"),
    ("GET", "/sdapi/v1/options", _options, "Return the model in use, and the defaults of requests"),
    ("POST", "/sdapi/v1/options", _set_options, "Use another model"),
    ("POST", "/sdapi/v1/interrupt", _interrupt, "Stop after the current step"),
    ("POST", "/sdapi/v1/skip", _interrupt, "Stop after the current step"),
    ("GET", "/sdapi/v1/progress", _progress, "Return the progress of the current job"),
]
