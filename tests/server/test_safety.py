"""Who may ask a server for what, and what no request can make it do."""

import base64
import hmac
import io
import os
import struct
import zlib
from contextlib import suppress

import pytest
from PIL import Image

from serving import Answer, serving
from stable_diffusion.cli import serve
from stable_diffusion.server.security import Guard
from stable_diffusion.server.settings import Settings

TEXT, IMAGE = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"
ONE = {"prompt": "a red circle", "steps": 1, "width": 32, "height": 32, "seed": 1}


def refused(answer: Answer, status: int, *words: str) -> None:
    """One line in the forms that both kinds of clients read."""
    assert answer.status == status, answer.body
    line = answer.json["detail"]
    assert line == answer.json["error"]["message"] and "\n" not in line and len(line) <= 300
    assert not [word for word in words if word not in line], line


@pytest.mark.parametrize("path", ["/", "/v1/health", "/sdapi/v1/options", "/v1/models", "/docs", "/nothing"])
def test_a_name_that_is_not_this_machines_is_refused(server, path):
    """As a page of another site has whose name leads here meanwhile (DNS rebinding)."""
    for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[", "localhost@evil.example:1"):
        refused(server(path, headers={"Host": host}), 403, "is not this machine")
    for host in ("localhost", "127.0.0.1:1234", "[::1]:80", "LOCALHOST"):
        assert server(path, headers={"Host": host}).status != 403


def test_pages_of_other_origins_may_not_call(server):
    for origin in ("http://evil.example", "null", "http://localhost:3000", server.url.replace("http", "https") + "0"):
        refused(server(TEXT, ONE, headers={"Origin": origin}), 403, "are not allowed")
    answer = server(TEXT, ONE, headers={"Origin": server.url})
    assert answer.status == 200 and "access-control-allow-origin" not in answer.headers


def test_an_origin_that_is_allowed_may_call_and_a_key_is_needed(tmp_path):
    flags = ("--cors", "http://localhost:3000", "--api_key", "s3cret", "--host", "0.0.0.0")
    with serving(*flags) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        refused(server("/v1/health"), 401, "API key is missing or wrong")
        basic = {text: base64.b64encode(text.encode()).decode() for text in ("any:s3cret", "s3cret", "any:other")}
        for value in ("Bearer other", "Bearer", "Basic ???", f"Basic {basic['s3cret']}", f"Basic {basic['any:other']}"):
            refused(server("/v1/health", headers={"Authorization": value}), 401)
        assert "Basic" in server("/").headers["www-authenticate"]  # a browser asks for it
        for value in ("Bearer s3cret", "bearer s3cret", f"Basic {basic['any:s3cret']}"):
            assert server("/v1/health", headers={"Authorization": value}).status == 200
        known = {"Authorization": "Bearer s3cret", "Origin": "http://localhost:3000", "Host": "mac.local:7860"}
        answer = server(TEXT, ONE, headers=known)
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "http://localhost:3000")
        refused(server(TEXT, ONE, headers=known | {"Origin": "http://localhost:3001"}), 403)
        assert "s3cret" not in server.log.read_text()


def test_the_key_is_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    guard = Guard(None, Settings(base=None, api_key="right"))
    for value, is_allowed in (("Bearer right", True), ("Bearer wrong", False)):
        assert (guard._refusal({"host": "localhost", "authorization": value}, "GET") is None) == is_allowed
    assert compared == [(b"right", b"right"), (b"wrong", b"right")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], ["host 0.0.0.0 is open to other machines", "api_key"]),
        (["--host", "999.1.1.1", "--api_key", "x"], ["999.1.1.1:7860 cannot be used"]),
        (["--models", "/nowhere/models"], ["/nowhere/models"]),
        (["--model", "nothing"], ["unknown model 'nothing'"]),
        (["--port", "70000"], ["--port", "from 0 to 65535"]),
        (["--steps", "0"], ["--steps"]),
    ],
)
def test_settings_that_cannot_be_followed(capsys, flags, words):
    with pytest.raises(SystemExit) as left:
        serve.main(["--model", "tiny", *flags])
    line = capsys.readouterr().err
    assert left.value.code == 2 and line.count("\n") == 1 and not [word for word in words if word not in line], line


def test_ctrl_c_while_the_model_is_opened(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    left = []
    monkeypatch.setattr("stable_diffusion.app.worker.Worker.start", interrupted)
    monkeypatch.setattr(os, "_exit", left.append)
    serve.main(["--model", "tiny", "--port", "0"])
    assert left == [130] and "interrupted; nothing was started" in capsys.readouterr().err


def test_without_its_packages_the_server_says_how_to_install_them(forked):
    code = (
        "import sys\nsys.modules['fastapi'] = None\nfrom stable_diffusion.__main__ import run\nsys.exit(run(['serve']))"
    )
    done = forked(code)
    assert done.code == 2 and "pip install '.[server]'" in done.err and done.err.count("\n") == 1


NAMES = ("../../etc/passwd", "/etc/passwd", "..", "~", "tiny/../tiny", "tiny\0", "nothing", "a" * 5000, "$(id)")


@pytest.mark.parametrize("name", NAMES)
def test_requests_name_no_files(server, name):
    settings = {"sd_model_checkpoint": name}
    refused(server(TEXT, ONE | {"override_settings": settings}), 400, "unknown model")
    refused(server("/sdapi/v1/options", settings), 400, "unknown model")
    refused(server(TEXT, ONE | {"override_settings": {"sd_vae": name}}), 400, "unknown autoencoder")
    unit = {"image": picture(32, 32), "model": name}
    refused(server(TEXT, ONE | {"alwayson_scripts": {"ControlNet": {"args": [unit]}}}), 400, "unknown ControlNet")
    refused(server(TEXT, ONE | {"prompt": f"a <lora:{name}:1>"}), 400, "LoRA")
    body = {"image": picture(32, 32), "upscaler_1": name}
    refused(server("/sdapi/v1/extra-single-image", body), 400, "unknown upscaler")
    if "\0" not in name:
        assert server("/v1/draw", {"prompt": "a", "model": name}).status == 400
    assert server("/sdapi/v1/options").json["sd_model_checkpoint"] == "tiny"


def picture(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def bomb(width: int, height: int, text: int = 0) -> str:
    """A PNG that says it has so many pixels, and a compressed text of so many bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    data = zlib.compress(bytes(((width + 7) // 8 + 1) * min(height, 20000)), 9)
    comment = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(text), 9)) if text else b""
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + comment + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return base64.b64encode(png).decode()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (bomb(40000, 1001), ["40000x1001", "limit is 40 megapixels"]),
        (bomb(60000, 60000), ["too large"]),
        ("data:image/png;base64," + bomb(8000, 5001), ["limit is 40 megapixels"]),
        ("!" * 40, ["is not base64"]),
        (base64.b64encode(b"%PDF-1.4").decode(), ["a PDF, not an image"]),
        (base64.b64encode(b"%!PS-Adobe\n").decode(), ["PostScript"]),
        ("/etc/passwd", []),
        ("http://127.0.0.1:1/a.png", ["is not base64"]),
        ("", []),
        (5, ["give it in base64"]),
        ({"a": 1}, ["give it in base64"]),
    ],
    ids=str,
)
def test_what_is_no_picture_is_refused(server, image, words):
    refused(server(IMAGE, ONE | {"init_images": [image]}), 400, *words)
    for path in ("png-info", "extra-single-image"):
        refused(server(f"/sdapi/v1/{path}", {"image": image}), 400, *words)
    assert server("/v1/record", {"image": image}).status == 400


def test_a_compressed_text_does_not_fill_the_memory(server):
    assert server("/sdapi/v1/png-info", {"image": bomb(32, 32, 200_000_000)}).status in (200, 400)
    assert server.memory("VmHWM") < 3e9


def test_bodies_are_limited(server):
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.raw(f"{head}Content-Length: {65 * 2**20}\r\n\r\n".encode()) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413")  # before a byte of it is sent
    with server.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()) as connection, suppress(ConnectionError):
        for _ in range(65):
            connection.sendall(b"100000\r\n" + b"a" * 2**20 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    for body in (b"{", b"", b"\xff\xfe", b"[" * 100_000, b"null", b"[1]", b'"text"', b"NaN"):
        refused(server(TEXT, body), 400 if body.startswith(b"[[") else 422)
