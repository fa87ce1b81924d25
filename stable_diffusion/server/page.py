"""The page of the server, and what it calls: a request by the names of its fields, events as they come."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from .. import __version__
from ..diffusion.samplers import SAMPLERS
from ..diffusion.schedule import SCHEDULES
from .service import Service


def routes(service: Service) -> APIRouter:
    """Return the routes of the page."""
    router = APIRouter(tags=["page"])

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"), headers={"cache-control": "no-cache"})

    @router.get("/v1/health", summary="Say whether the server works, and on what")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "model": service.model, "jobs": len(service.worker.jobs)}

    @router.get("/v1/library", summary="List what requests may name")
    async def library() -> dict[str, Any]:
        of = service.settings.library
        return {
            "model": service.model,
            "models": [*of.models],
            "samplers": [*SAMPLERS],
            "schedules": [*SCHEDULES],
            "loras": [*of.loras()],
            "controlnets": [*of.controlnets],
            "words": [*service.worker.words],
        }

    return router
