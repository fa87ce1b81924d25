"""The access control of the server: hosts, keys and origins, checked before a request is read.

By default the server listens only to this machine. A web page in a browser on it could still send requests: by DNS
rebinding, which changes the Host header, or from another origin. Both are refused.
"""

import base64
import binascii
import hmac
import json
import logging
import re
from collections.abc import Mapping
from time import perf_counter

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .settings import LOCAL, Settings

_log = logging.getLogger("stable_diffusion.server")

_LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
_FOLDERS, _LONGEST = re.compile(r"(?<![\w:/.])/(?:[^\s/]+/)+(?=[^\s/])"), 300


class Guard:
    """Pass allowed requests to ``app``, refuse others with an error of one line, and log all.

    ``Authorization`` must have the API key, as Bearer or as the password of Basic.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._is_local = app, settings.host in LOCAL
        self._key, self._origins = settings.api_key, settings.cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(headers, scope["method"])
        try:
            await (self._app if refusal is None else refusal)(scope, receive, noted)
        except Exception as error:  # the client has an error of one line already
            _log.error("a request failed", exc_info=error)
        fields = {"method": scope["method"], "path": scope["path"], "status": status}
        _log.info("%s", json.dumps(fields | {"seconds": round(perf_counter() - began, 3)}))

    def _refusal(self, headers: Mapping[str, str], method: str) -> ASGIApp | None:
        """Return the error response for a request that is not allowed."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._is_local and not _LOCAL_HOST.fullmatch(host):
            return error_response(403, f"the host {host!r:.80} is not this machine; use 127.0.0.1 or localhost")
        if origin is not None and origin not in self._origins and origin.partition("://")[2] != host:
            return error_response(403, f"pages of {origin!r:.80} are not allowed; start with --cors {origin:.80}")
        if self._key is not None and method != "OPTIONS" and not _has_key(headers.get("authorization", ""), self._key):
            message = "the API key is missing or wrong; send it as Bearer, or as Basic's password"
            return error_response(401, message, {"www-authenticate": 'Basic realm="stable-diffusion"'})
        return None


def _has_key(authorization: str, key: str) -> bool:
    """Return whether a header has the key, in a time independent of the first difference."""
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    return scheme.lower() in ("basic", "bearer") and hmac.compare_digest(value.strip().encode(), key.encode())


def in_one_line(message: object) -> str:
    """Return a message in one line of at most 300 characters, with file names without their folders."""
    return _FOLDERS.sub("", " ".join(str(message).split()))[:_LONGEST]


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error of one line: ``detail`` for clients of AUTOMATIC1111's API, ``error`` for those of OpenAI's."""
    line, kind = in_one_line(message), "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": line, "type": kind, "code": status, "param": None}
    return JSONResponse({"detail": line, "error": error}, status, headers)
