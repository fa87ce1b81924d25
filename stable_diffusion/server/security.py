"""Who may ask a server for what: addresses, keys, origins and sizes, checked before anything is read.

A server at home listens to its own machine alone. A page that a browser has open may still talk to it: by its name
("DNS rebinding": the Host is another one then), or from another origin. Both are refused.
"""

import base64
import binascii
import hmac
import json
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .pictures import MOST_BYTES
from .settings import LOCAL, Settings


class Guard:
    """Let requests through to ``app`` that the settings allow, and answer others with one line.

    ``Authorization`` must have the API key, as Bearer or as the password of Basic.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._names = app, LOCAL if settings.host in LOCAL else None
        self._key, self._origins = settings.api_key, settings.cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on with a body that is counted."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(headers, scope["method"])
        if refused is not None:
            status, message, more = refused
            return await answer(send, status, message, more)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MOST_BYTES:
                raise TooLargeError(_TOO_LARGE)
            return message

        await self._app(scope, counted, send)

    def _refusal(self, headers: Mapping[str, str], method: str) -> tuple[int, str, dict[str, str]] | None:
        """Return status, message and headers of the answer to a request that is not allowed."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._names is not None and urlsplit(f"//{host}").hostname not in self._names:
            return 403, f"the host {host!r:.80} is not this machine; use 127.0.0.1 or localhost", {}
        is_own = origin is None or urlsplit(origin).netloc == host
        if not is_own and origin not in self._origins:
            return 403, f"pages of {origin!r:.80} may not call; allow them: --cors {origin:.80}", {}
        if self._key is not None and method != "OPTIONS" and not _has_key(headers.get("authorization", ""), self._key):
            return 401, "the API key is missing or wrong; send it as Bearer, or as Basic's password", _CHALLENGE
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return 413, _TOO_LARGE, {}
        return None


class TooLargeError(Exception):
    """Refuse a body of more bytes than are read."""


_TOO_LARGE = f"the body is too large; at most {MOST_BYTES // 2**20} MB"
_CHALLENGE = {"www-authenticate": 'Basic realm="stable-diffusion"'}


def _has_key(authorization: str, key: str) -> bool:
    """Return whether a header has the key, in a time that does not depend on where it differs."""
    scheme, _, value = authorization.strip().partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(value.strip().encode(), key.encode())


async def answer(send: Send, status: int, message: str, headers: Mapping[str, str]) -> None:
    """Send an error as JSON of one line, which both kinds of clients understand."""
    body = json.dumps(error_body(status, message)).encode()
    pairs = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    encoded = [(name.encode(), value.encode()) for name, value in pairs.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def error_body(status: int, message: str) -> dict:
    """Return what an error says: ``detail`` for clients of AUTOMATIC1111's API, ``error`` for those of OpenAI's."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"detail": message, "error": {"message": message, "type": kind, "code": status, "param": None}}
