"""A loopback server that speaks as much of the Hub's protocol as its client needs, and small checkpoints to serve."""

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlx.core as mx

from forked import Forks

ROOT = Path(__file__).parents[1]
SD_PARTS = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
}
XL_PARTS = SD_PARTS | {
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"} | dict.fromkeys(
    ("text_encoder", "text_encoder_2", "safety_checker"), "model"
)


def safetensors(**tensors: mx.array) -> bytes:
    """The bytes of a safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "it.safetensors"
        mx.save_safetensors(str(path), tensors)
        return path.read_bytes()


def checkpoint_files(
    *,
    pipeline: str = "StableDiffusionPipeline",
    parts: dict = SD_PARTS,
    halves: tuple[str, ...] = ("",),
    mark: float = 1.0,
) -> dict[str, bytes]:
    """A minimal checkpoint in diffusers layout, as {file name: bytes}; no two are equal, or the cache downloads one.

    ``halves`` are the weight files of each network, "" for float32, ".fp16" for float16; ``mark`` is the value of every
    weight, to tell checkpoints apart.
    """
    files = {"model_index.json": to_json({"_class_name": pipeline, "requires_safety_checker": True, **parts})}
    for part, (_, cls) in parts.items():
        if cls is None:
            continue
        if part.startswith("tokenizer"):
            names = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json")
            files |= {f"{part}/{name}": to_json({part: name}) for name in names}
        elif part == "scheduler":
            files["scheduler/scheduler_config.json"] = to_json({"_class_name": cls, "num_train_timesteps": 1000})
        elif part == "feature_extractor":
            files[f"{part}/preprocessor_config.json"] = b"{}"
        else:
            files[f"{part}/config.json"] = to_json({"_class_name": cls, "part": part})
            for half in halves:
                weight = mx.full((16, 16), mark, dtype=mx.float16 if half else mx.float32)
                files[f"{part}/{STEMS[part]}{half}.safetensors"] = safetensors(**{f"{part}.weight": weight})
            stem = "pytorch_model" if STEMS[part] == "model" else STEMS[part]
            files[f"{part}/{stem}.bin"] = f"a pickle of the {part}".encode()
    return files | {"README.md": b"# A model\n", "v1-5-pruned.safetensors": b"a single file\n"}


def shard(files: dict[str, bytes], part: str, half: str = "") -> dict[str, bytes]:
    """The same checkpoint with the weights of one network in two shards and an index."""
    stem = f"{part}/{STEMS[part]}"
    files = {name: data for name, data in files.items() if name != f"{stem}{half}.safetensors"}
    shards = {f"weight_{i}": f"{STEMS[part]}{half}-0000{i + 1}-of-00002.safetensors" for i in (0, 1)}
    for i, (tensor, name) in enumerate(shards.items()):
        files[f"{part}/{name}"] = safetensors(**{tensor: mx.full((4,), float(i))})
    return files | {f"{stem}.safetensors.index{half}.json": to_json({"weight_map": shards})}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def to_json(value: object) -> bytes:
    return json.dumps(value).encode()


class Hub:
    """The server, as a context manager. Its attributes make it misbehave; `requests` is what it was asked."""

    def __init__(self, forked: Forks) -> None:
        self.forked = forked
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}  # by repository and revision, which also is a commit
        # {repository: (status, X-Error-Code) of all answers}; "GatedRepo" leaves the list of files public, as the Hub.
        self.locked: dict[str, tuple[int, str | None]] = {}
        self.cuts: dict[str, int] = {}  # {file: how often its body still breaks off in the middle}
        self.afterwards: dict[str, Callable[[], None]] = {}  # {file: what to do once its contents have been sent}
        self.requests: list[tuple[str, str]] = []  # method, path

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        self.repos.setdefault(repo, {})[revision] = files

    def run(self, program: str, *args: str, home: Path, env: dict | None = None) -> tuple[str, str]:
        """Run Python code in a process that knows this server and keeps its cache in `home`: (stdout, stderr)."""
        settings = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home), "HF_HOME": str(home / "hf")}
        settings |= {"HF_ENDPOINT": self.url, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        settings |= dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"), "1") | (env or {})
        code, out, err, _ = self.forked(program, *args, env=settings, cwd=home)
        assert code == 0, err
        return out, err

    def fetched(self) -> list[str]:
        """The names of the files whose contents were asked for, sorted."""
        paths = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return sorted(path.split("/resolve/")[1].partition("/")[2] for path in paths)

    @staticmethod
    def commit(files: dict[str, bytes]) -> str:
        return hashlib.sha1(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.repos[repo]
        return revisions.get(revision) or next((f for f in revisions.values() if self.commit(f) == revision), None)

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False  # a client that was killed may have left a connection open
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def stop(self, *_: object) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    __exit__ = stop


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path))
        path = unquote(urlsplit(self.path).path).strip("/")
        if match := re.fullmatch(r"api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            repo, what, revision = match.groups()
            self.about(repo, what, revision or "main")
        elif match := re.fullmatch(r"([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(*match.groups())
        else:
            self.answer(404)

    do_HEAD = do_GET

    def about(self, repo: str, what: str | None, revision: str) -> None:
        """Answer a question about a repository: the list of its files, or its commit."""
        if (files := self.checked(repo, revision)) is None:
            return
        if what == "tree":
            sizes = {name: (len(data), hashlib.sha1(data).hexdigest()) for name, data in files.items()}
            info = [{"type": "file", "path": name, "size": size, "oid": oid} for name, (size, oid) in sizes.items()]
        else:
            info = {"id": repo, "sha": self.hub.commit(files), "siblings": [{"rfilename": name} for name in files]}
        self.answer(200, to_json(info), {"Content-Type": "application/json"})

    def file(self, repo: str, revision: str, name: str) -> None:
        if (files := self.checked(repo, revision)) is None:
            return
        about = {"X-Repo-Commit": self.hub.commit(files)}
        if name not in files:
            self.answer(404, b"", about | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        data = files[name]
        about |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        cut = self.command == "GET" and self.hub.cuts.get(name, 0) > 0
        self.hub.cuts[name] = self.hub.cuts.get(name, 0) - cut
        self.answer(200, data, about, cut=cut)
        if self.command == "GET" and name in self.hub.afterwards:
            self.hub.afterwards.pop(name)()

    def checked(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; None when the request was answered with an error instead."""
        status, code = self.hub.locked.get(repo, (None, None))
        if status and not (code == "GatedRepo" and self.path.startswith("/api/")):
            self.answer(status, b"", {"X-Error-Code": code} if code else {})
        elif repo not in self.hub.repos:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif (files := self.hub.files(repo, revision)) is None:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        else:
            return files
        return None

    def answer(self, status: int, data: bytes = b"", headers: dict | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""
