"""The page of the server, and its API: requests by the names of their fields, events as they happen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Connection
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from .. import __version__
from ..app.metadata import read_record
from ..app.worker import Picture
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedule import SCHEDULES
from ..images.encoded import read_by, to_base64
from .service import Fields, Service

# The fields of a request of the page, besides its images and the model.
_FIELDS = ("prompt", "negative_prompt", "width", "height", "n_images", "steps", "cfg", "sampler", "schedule", "seed")
_FIELDS += ("strength", "mask_blur", "mask_padding", "variation_seed", "variation_strength", "clip_skip", "hires")
_FIELDS += ("hires_strength", "seamless", "noise_source")


def routes(service: Service) -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter(tags=["page"])

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"), headers={"cache-control": "no-cache"})

    @router.get("/v1/health", summary="Return the status, version and model of the server")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "model": service.model, "jobs": len(service.worker.jobs)}

    @router.get("/v1/library", summary="List the available names, and the defaults of the server")
    async def library() -> dict[str, Any]:
        names = {"models": [*service.settings.library.models], "loras": [*service.settings.library.loras()]}
        names |= {"samplers": [*SAMPLERS], "schedules": [*SCHEDULES], "words": [*service.worker.words]}
        defaults = {name: value for name in _FIELDS if (value := service.base.value(name)) is not None}
        return {"model": service.model, "defaults": defaults} | names

    @router.post("/v1/draw", summary="Generate images, and send events: steps with previews, images with settings")
    async def draw(body: Fields, connection: Connection) -> Any:
        values = {name: body[name] for name in _FIELDS if body.get(name) is not None}
        if body.get("model"):
            values["model"] = service.settings.library.find("models", body["model"])
        job = await service.job(values, {name: body.get(name) for name in ("image", "mask")}, shows=True)

        def translate(event: Any) -> Iterator[tuple[str, dict[str, Any]]]:
            if isinstance(event, Picture):
                made = {"seed": event.request.seed, "text": event.text["parameters"], "partial": event.partial}
                yield "picture", {"image": to_base64(event.image, event.text), "withheld": event.is_flagged} | made
            else:
                image = to_base64(job.preview, None, "jpg", 80) if job.preview else None
                yield "step", {"step": job.done, "steps": job.done + job.left, "preview": image}

        return await service.stream(connection, job, translate)

    @router.post("/v1/record", summary="Read the settings recorded in an image, by the names of fields")
    async def record(body: Fields) -> dict[str, Any]:
        arguments = (await run_in_threadpool(read_by, read_record, body.get("image"))).arguments
        return {name: value for name, value in arguments.items() if name in _FIELDS}

    return router
