"""A server on the bundled model, as a process of its own, and requests to it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from command_line import ROOT


class Answer(NamedTuple):
    """An HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Server:
    """A server that runs: ``url``, ``pid``, and the lines on its stderr, which end up in a file."""

    def __init__(self, process: subprocess.Popen, url: str, log: Path):
        self.process, self.url, self.pid, self.log = process, url, process.pid, log

    def __call__(
        self, path: str, body: Any = None, *, headers: dict[str, str] | None = None, timeout: float = 120
    ) -> Answer:
        """GET a path, or POST ``body``: bytes as they are, else as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"} | (headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers), error.read())

    def raw(self, data: bytes) -> socket.socket:
        """Send bytes as they are, such as the head of a request that is never sent whole."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        connection.sendall(data)
        return connection

    def memory(self, of: str = "VmRSS") -> int:
        """The bytes of memory that the process holds, or with "VmHWM" has held."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return 1024 * int(re.search(rf"{of}:\s*(\d+)", status)[1])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the process by a signal, and return its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serving(*flags: object, model: str = "tiny", env: dict[str, str] | None = None) -> Iterator[Server]:
    """Start ``python -m stable_diffusion serve`` on a free port, and end it."""
    words = [sys.executable, "-m", "stable_diffusion", "serve", "--model", model, "--port", "0", "--device", "cpu"]
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen(
            [*words, *map(str, flags)], cwd=ROOT, env=os.environ | (env or {}), stdout=log, stderr=log
        )
        try:
            while not (found := re.search(r"listening on (http://\S+)", text := Path(log.name).read_text())):
                assert process.poll() is None, text
                try:
                    process.wait(0.05)
                except subprocess.TimeoutExpired:
                    continue
            yield Server(process, found[1], Path(log.name))
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
