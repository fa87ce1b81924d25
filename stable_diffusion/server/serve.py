"""The server: the application with all parts of this folder, its error responses, its start and its end."""

import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from .. import __version__
from ..app.worker import BusyError, StoppedError, Worker
from . import a1111, openai, page
from .security import Guard, error_response
from .service import Service
from .settings import Settings

MOST_BYTES = 64 * 2**20  # of a request body
_STATUS = {BusyError: 503, StoppedError: 503, ValueError: 400, OSError: 400, Exception: 500}


def create_app(service: Service) -> ASGIApp:
    """Create the application (ASGI) of a service; start its worker before the first request."""
    settings = service.settings
    app = FastAPI(title="Stable Diffusion in MLX", version=__version__, max_body_size=MOST_BYTES)
    for part in (a1111, openai, page):
        app.include_router(part.routes(service))
    for kind in (HTTPException, RequestValidationError, ValidationError, *_STATUS):
        app.add_exception_handler(kind, _answer)
    app.add_middleware(CORSMiddleware, allow_origins=settings.cors, allow_methods=["*"], allow_headers=["*"])
    return Guard(app, settings)


async def _answer(request: Request, error: Exception) -> Response:
    """Return an error response of one line."""
    status, message = next((status for kind, status in _STATUS.items() if isinstance(error, kind))), str(error)
    if isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError | ValidationError):
        status = 422
        message = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
    elif status == 500:
        message = f"the computation failed ({type(error).__name__}: {error})"
    headers = {"retry-after": str(error.seconds)} if isinstance(error, BusyError) else None
    return error_response(status, message, headers)


class _Server(uvicorn.Server):
    """Stop the worker first, so that the requests that uvicorn waits for end with the step at hand."""

    def __init__(self, config: uvicorn.Config, worker: Worker):
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop()
        await super().shutdown(sockets)


def run(settings: Settings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then free everything; ``announce`` is called with the address.

    Raises ValueError or OSError if the address cannot be used or the model cannot be opened.
    """
    with _listen(settings.host, settings.port) as listener:
        names = ("base", "resources", "queue", "idle", "device", "preload_models", "safety_check", "safety_model")
        worker = Worker(**{name: getattr(settings, name) for name in names})
        config = uvicorn.Config(create_app(Service(settings, worker)), log_level="warning", access_log=False)
        worker.start()
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has ended
            signal.signal(number, lambda number, frame: None)
        try:
            host, port = listener.getsockname()[:2]
            announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            _Server(config, worker).run([listener])
        finally:
            worker.stop()
            worker.join()


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError, one line, if the address cannot be used."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = f"{error.strerror or error}; choose another --port or --host"
        raise OSError(f"the address {host}:{port} cannot be used ({reason})") from None
