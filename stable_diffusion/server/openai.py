"""The API of OpenAI's."""

from fastapi import APIRouter

from .service import Service


def routes(service: Service) -> APIRouter:
    """Return the routes of this interface."""
    return APIRouter(tags=["OpenAI's"])
