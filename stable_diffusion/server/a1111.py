"""The API of AUTOMATIC1111's."""

from fastapi import APIRouter

from .service import Service


def routes(service: Service) -> APIRouter:
    """Return the routes of this interface."""
    return APIRouter(tags=["AUTOMATIC1111's"])
