"""The API of OpenAI for images, ``/v1/images``: for the openai SDK, Open WebUI, LibreChat and other clients.

An unknown model name means the model in use, because clients send the name in their settings. The fields from
``steps`` on are additions, sent with ``extra_body`` of the SDK. Unknown fields are ignored.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi import Request as Connection
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field
from starlette.datastructures import FormData, UploadFile

from ..app.worker import Picture
from ..images.encoded import repainted, to_base64
from .service import Service

_USAGE = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
_USAGE |= {"input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}
_OURS = {"steps", "cfg", "seed", "sampler", "schedule", "negative_prompt", "strength"}


class _Body(BaseModel):
    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|\d{1,5}x\d{1,5})$")] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    steps: int | None = None
    cfg: float | None = None
    seed: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    negative_prompt: str | None = None
    strength: float | None = None
    lora: str | list[str] | None = None


def routes(service: Service) -> APIRouter:
    """Return the routes of this interface."""
    router = APIRouter(prefix="/v1", tags=["OpenAI's API"])

    @router.get("/models", summary="List the models")
    async def models() -> dict[str, Any]:
        owner = {"object": "model", "created": 0, "owned_by": "stable-diffusion-mlx"}
        return {"object": "list", "data": [{"id": name, **owner} for name in service.settings.library.models]}

    @router.post("/images/generations", summary="Generate images from a prompt")
    async def generations(body: _Body, connection: Connection) -> Any:
        return await _draw(service, connection, body, {}, "image_generation")

    @router.post("/images/edits", summary="Edit an image, or a part of it: a form, not JSON")
    async def edits(connection: Connection) -> Any:
        async with connection.form() as form:
            body = _Body.model_validate({name: value for name, value in form.items() if isinstance(value, str)})
            return await _draw(service, connection, body, await _pictures(form), "image_edit")

    return router


async def _pictures(form: FormData) -> dict[str, bytes | None]:
    """Return the image of a form, and the transparent area of its mask, or of the image itself."""
    images = [one for name in ("image", "image[]") for one in form.getlist(name) if isinstance(one, UploadFile)]
    if len(images) != 1:
        raise ValueError(f"{len(images)} files in image; give one")
    image, mask = await images[0].read(), form.get("mask")
    transparent = await run_in_threadpool(repainted, await mask.read() if isinstance(mask, UploadFile) else image)
    if transparent is None and mask is not None:
        raise ValueError("the mask has no transparent area, which is the area to repaint; give a PNG with one")
    return {"image": image, "mask": transparent}


async def _draw(
    service: Service, connection: Connection, body: _Body, pictures: Mapping[str, bytes | None], kind: str
) -> Any:
    """Generate images, and return all at once or as events of ``kind``."""
    form, count = body.output_format or "png", body.partial_images or 0
    quality = None if form == "png" or body.output_compression is None else max(body.output_compression, 1)
    shown = 0

    def translate(event: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal shown
        if isinstance(event, Picture):
            name, image, text, more = f"{kind}.completed", event.image, event.text, {"usage": _USAGE}
        elif event == "preview" and shown < count and job.progress >= (shown + 1) / (count + 1):
            name, image, text, more = f"{kind}.partial_image", job.preview, None, {"partial_image_index": shown}
            shown += 1
        else:
            return
        common = {"created_at": int(time.time()), "output_format": form, "background": "opaque", "quality": "auto"}
        made = {"b64_json": to_base64(image, text, form, quality), "size": "{}x{}".format(*image.size)}
        yield name, {"type": name} | made | common | more

    job = await service.job(_values(service, body), pictures, shows=bool(body.stream and count))
    if body.stream:
        return await service.stream(connection, job, translate)
    drawn = await service.draw(connection, job)
    made = [await run_in_threadpool(to_base64, one.image, one.text, form, quality) for one in drawn]
    is_url = body.response_format == "url"
    data = [{"url": f"data:image/{form};base64,{one}"} if is_url else {"b64_json": one} for one in made]
    return {"created": int(time.time()), "data": data, "output_format": form}


def _values(service: Service, body: _Body) -> dict[str, Any]:
    """Return the values of a request."""
    values = body.model_dump(include=_OURS, exclude_none=True)
    loras = [body.lora] if isinstance(body.lora, str) else body.lora or []
    values |= {"prompt": body.prompt + "".join(f" <lora:{lora}>" for lora in loras), "n_images": body.n or 1}
    if body.size not in (None, "auto"):
        values["width"], values["height"] = map(int, body.size.split("x"))
    if body.model in (models := service.settings.library.models):
        values["model"] = models[body.model]
    return values
