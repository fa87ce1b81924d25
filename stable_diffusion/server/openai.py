"""The API of OpenAI for images, ``/v1/images``: for the openai SDK, Open WebUI, LibreChat and other clients.

A model that is not listed is the one in use, since clients send what their settings say. Further keys (``extra_body``
of the SDK) are fields of a request: steps, cfg, seed, sampler, schedule, negative_prompt, strength; and lora.
"""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Connection
from starlette.datastructures import UploadFile

from ..app.worker import Picture
from .pictures import repainted, to_base64
from .service import Fields, Service

_EXTRA = ("steps", "cfg", "seed", "sampler", "schedule", "negative_prompt", "strength")
_FORMATS = ("png", "jpeg", "webp")


def routes(service: Service) -> APIRouter:
    """Return the routes of this interface."""
    router = APIRouter(prefix="/v1", tags=["OpenAI's API"])

    @router.get("/models", summary="List the models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in service.settings.library.models]}

    @router.get("/models/{name:path}", summary="Describe a model")
    async def model(name: str) -> dict[str, Any]:
        service.settings.library.find("models", name)
        return _model(name)

    @router.post("/images/generations", summary="Draw from a prompt")
    async def generations(body: Fields, connection: Connection) -> Any:
        return await _draw(service, connection, body, {}, "image_generation")

    @router.post("/images/edits", summary="Draw from a picture, or a part of it: a form, not JSON")
    async def edits(connection: Connection) -> Any:
        async with connection.form() as form:
            body = {name: _value(name, value) for name, value in form.items() if isinstance(value, str)}
            images = [one for name in ("image", "image[]") for one in form.getlist(name) if isinstance(one, UploadFile)]
            if len(images) != 1:
                raise ValueError(f"{len(images)} pictures in image; give one")
            image, mask = await images[0].read(), form.get("mask")
            transparent = repainted(await mask.read() if isinstance(mask, UploadFile) else image)
        if transparent is None and mask is not None:
            raise ValueError("the mask has no transparent part, which is what is repainted; give a PNG with one")
        return await _draw(service, connection, body, {"image": image, "mask": transparent}, "image_edit")

    return router


async def _draw(
    service: Service, connection: Connection, body: Mapping[str, Any], pictures: Mapping[str, Any], kind: str
) -> Any:
    """Draw, and answer by all pictures at once or by events of ``kind``."""
    form, suffix, quality = _form(body)
    count = body.get("partial_images") or 0
    if type(count) is not int or not 0 <= count <= 3:
        raise ValueError(f"partial_images {count!r:.80} is not from 0 to 3")
    job = service.job(_request(service, body), pictures, shows=bool(body.get("stream")) and count > 0)
    if not body.get("stream"):
        made = [to_base64(picture, suffix, quality) for picture in await service.draw(connection, job)]
        is_url = body.get("response_format") == "url"
        data = [{"url": f"data:image/{form};base64,{one}"} if is_url else {"b64_json": one} for one in made]
        return {"created": int(time.time()), "data": data, "output_format": form}

    shown = 0

    def translate(event: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal shown
        common = {"created_at": int(time.time()), "output_format": form, "background": "opaque", "quality": "auto"}
        if isinstance(event, Picture):
            name, image = f"{kind}.completed", event.image
            common |= {"b64_json": to_base64(event, suffix, quality), "usage": _USAGE}
        elif event == "preview" and shown < count and job.progress >= (shown + 1) / (count + 1):
            name, image = f"{kind}.partial_image", job.preview
            common |= {"b64_json": to_base64(image, suffix, quality), "partial_image_index": shown}
            shown += 1
        else:
            return
        yield name, {"type": name, "size": "{}x{}".format(*image.size)} | common

    return await service.stream(connection, job, translate)


_USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
_USAGE |= {"input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}


def _request(service: Service, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a request."""
    values = {name: body[name] for name in _EXTRA if body.get(name) is not None}
    values |= {"prompt": body.get("prompt", ""), "n_images": body.get("n") or 1}
    loras = body.get("lora") or []
    for lora in loras if isinstance(loras, list) else [loras]:
        values["prompt"] = f"{values['prompt']} <lora:{lora}>"
    size = body.get("size") or "auto"
    if size != "auto":
        width, _, height = str(size).partition("x")
        if not (width.isdecimal() and height.isdecimal()):
            raise ValueError(f"size {size!r:.80} is none; give one like 512x512, or auto")
        values |= {"width": int(width), "height": int(height)}
    if str(body.get("model")) in service.settings.library.models:
        values["model"] = service.settings.library.find("models", body["model"])
    return values


def _form(body: Mapping[str, Any]) -> tuple[str, str, int | None]:
    """Return the format of pictures, the suffix of its files, and its quality."""
    form, quality = body.get("output_format") or "png", body.get("output_compression")
    if form not in _FORMATS:
        raise ValueError(f"output_format {form!r:.80} is unknown; choose one of {', '.join(_FORMATS)}")
    if form == "png" or quality is None:
        return form, f".{form}", None
    if type(quality) is not int or not 0 <= quality <= 100:
        raise ValueError(f"output_compression {quality!r:.80} is not a whole number from 0 to 100")
    return form, f".{form}", max(quality, 1)


def _value(name: str, text: str) -> Any:
    """Read a value of a form: texts as they are, numbers and truths as in JSON."""
    if name in ("prompt", "negative_prompt", "model", "size", "sampler", "schedule", "user", "lora"):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "stable-diffusion-mlx"}
