"""Files that are made to harm: refused in one line, with nothing run, written or asked for, in little memory and time.

Each case is a process. Names that hold what a terminal obeys are in ``test_streams``.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
from PIL import Image

from forked import Ended
from stable_diffusion.images.files import save
from stable_diffusion.weights.catalog import ALIASES

# The command, in a process that says so where it starts another one or asks a network, and that notes its peak of
# memory: on Linux ru_maxrss begins with the peak of the process that started it.
WATCHED = """
import os, sys
PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
EVENTS = PROCESSES | {"socket.connect", "socket.getaddrinfo"}
sys.addaudithook(lambda event, args: event in EVENTS and os.write(2, f"{event} {args}\\n".encode()))
from stable_diffusion.__main__ import run
try:
    sys.exit(run())
finally:
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as status:
            memory = 1024 * int(status.read().split("VmHWM:")[1].split()[0])
    else:
        import resource
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open(os.environ["PEAK"], "w") as peak:
        peak.write(str(memory))
"""
MEMORY, SECONDS = 500_000_000, 10  # above a run that does nothing; of the processor, as others may use it too


@pytest.fixture(scope="session")
def end(forked) -> Callable[[list[str], Path], tuple[Ended, int]]:
    """Run a command in ``folder/here``, which is its home too, with a PATH that begins with ``folder/bin``.

    Returns what it ended as and its peak of memory in bytes.
    """

    def call(words: list[str], folder: Path) -> tuple[Ended, int]:
        environment = os.environ | {name: str(folder / "here") for name in ("HOME", "TMPDIR", "HF_HOME")}
        environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PEAK": str(folder / "peak")}
        ended = forked(WATCHED, *words, cwd=folder / "here", env=environment)
        return ended, int((folder / "peak").read_text())

    return call


@pytest.fixture(scope="session")
def baseline(end, tmp_path_factory) -> int:
    """Bytes of a run that finds nothing."""
    folder = tmp_path_factory.mktemp("nothing")
    (folder / "here").mkdir()
    return end(["inspect", "./none"], folder)[1]


# --- what files are made of ------------------------------------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(ran) (w) file closefile\n"
NESTED = '{"arguments":' * 480 + "1" + "}" * 480
MANY = [f"<{i}>" for i in range(50_000)]


def chunk(tag: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(width: int, height: int, *chunks: bytes, pixels: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def huge(folder: Path) -> None:
    """Write a black picture of 169 megapixels."""
    packer, row = zlib.compressobj(), bytes(1 + 3 * 13_000)
    pixels = b"".join(packer.compress(row) for _ in range(13_000)) + packer.flush()
    (folder / "a.png").write_bytes(png(13_000, 13_000, pixels=pixels))


def record(folder: Path, text: str) -> None:
    save(Image.new("RGB", (8, 8)), folder / "a.png", {"stable_diffusion": text})


def arguments(**values: Any) -> Callable[[Path], None]:
    return lambda folder: record(folder, json.dumps({"arguments": {"prompt": "x", "model": "tiny"} | values}))


def data(content: bytes, name: str = "a.png") -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def model(path: str, content: Any) -> Callable[[Path], None]:
    """A copy of the bundled model in which a file is another, or some keys of it are."""

    def write(folder: Path) -> None:
        file = shutil.copytree(ALIASES["tiny"].folder, folder / "model") / path
        kept = json.loads(file.read_text()) if isinstance(content, dict) and file.is_file() else {}
        file.write_text(json.dumps(kept | content) if isinstance(content, dict) else content, encoding="utf-8")

    return write


def lora(**settings: Any) -> Callable[[Path], None]:
    shapes = {"A": (4, 4, 3, 3), "B": (8, 4, 1, 1)}
    factors = {f"unet.conv_in.lora_{side}.weight": mx.zeros(shape) for side, shape in shapes.items()}
    texts = {"lora_adapter_metadata": json.dumps(settings)}
    return lambda folder: mx.save_safetensors(str(folder / "a.safetensors"), factors, texts)


def header(text: bytes) -> Callable[[Path], Any]:
    return data(struct.pack("<Q", len(text)) + text, "a.safetensors")


class Case(NamedTuple):
    what: str
    make: Callable[[Path], Any]
    command: str
    says: str  # on stderr, in pieces between |


DRAW = "txt2image x --model tiny --steps 1 --n_images 1"
CHANGE = "image2image whole.png x --model tiny --steps 1 --n_images 1"
AGAIN = "txt2image --from_image a.png"
SHOW = "inspect a.safetensors"
OTHER = "txt2image x --model ./model --steps 1 --n_images 1"
PICTURES = [
    Case("PostScript as the image", data(EPS), "image2image a.png x --model tiny", "a.png is a PostScript file"),
    Case("PostScript as a mask", data(EPS), f"{CHANGE} --mask a.png", "a.png is a PostScript file"),
    Case("PostScript as a depth map", data(EPS), f"{CHANGE} --depth a.png", "a.png is a PostScript file"),
    Case("PostScript as a hint", data(EPS), f"{DRAW} --controlnet tiny --control_image a.png", "is a PostScript file"),
    Case("PostScript as a record", data(EPS), AGAIN, "a.png is a PostScript file"),
    Case("PostScript that is inspected", data(EPS), "inspect a.png", "a.png is a PostScript file"),
    Case("a picture of 3.6 gigapixels", data(png(60_000, 60_000)), "image2image a.png x --model tiny", "too large"),
    Case("a record before 170 megapixels", huge, AGAIN, "does not record"),
    Case(
        "a text of 32 MB in a picture of 32 kB",
        data(png(8, 8, chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2**25))))),
        AGAIN,
        "a.png",
    ),
]
RECORDS = [
    Case("a record of 480 levels", lambda folder: record(folder, NESTED), AGAIN, "does not record how"),
    Case(
        "a record of brackets", lambda folder: record(folder, "[" * 100_000), AGAIN, "does not record how it was made"
    ),
    *(
        Case(f"{name} {value!r:.20}", arguments(**{name: value}), AGAIN, name)
        for name, value in (
            ("steps", [1]),
            ("steps", "x"),
            ("steps", 10**30),
            ("seed", {}),
            ("cfg", [[]]),
            ("width", 2**63),
            ("lora", [["x"]]),
            ("lora", "x"),
            ("guidance_interval", [0, None]),
            ("controlnet", [[None, 1]]),
        )
    ),
]
CHECKPOINTS = [
    *(
        Case(f"{path} with {content!r:.40}", model(path, content), OTHER, says)
        for path, content, says in (
            ("tokenizer/vocab.json", {"a</w>": None}, "vocab.json|'a</w>'"),
            ("tokenizer/vocab.json", {"a</w>": [1]}, "vocab.json|'a</w>'"),
            ("tokenizer/vocab.json", {"a</w>": 2**63}, "vocab.json|'a</w>'"),
            ("tokenizer/vocab.json", {"a</w>": 10**6}, "tokenizer|1000000|tokens"),
            ("tokenizer/vocab.json", "[" * 100_000, "vocab.json|JSON"),
            ("tokenizer/vocab.json", '{"a":' + "[" * 480 + "]" * 480 + "}", "vocab.json|20 levels"),
            ("tokenizer/vocab.json", "[" + "[]," * 3_400_000 + "[]]", "vocab.json|10 MB"),
            ("tokenizer/merges.txt", "a b\n" * 2_600_000, "merges.txt|10 MB"),
            ("tokenizer/merges.txt", "a b c\n", "merge 1"),
            ("tokenizer/added_tokens.json", {"<new>": [7]}, "added_tokens.json|'<new>'"),
            ("tokenizer/tokenizer_config.json", {"model_max_length": [77]}, "tokenizer_config.json|'model_max_length'"),
            ("tokenizer/tokenizer_config.json", {"added_tokens_decoder": [1]}, "'added_tokens_decoder'"),
            ("tokenizer/special_tokens_map.json", {"pad_token": [1]}, "special_tokens_map.json|'pad_token'"),
            ("tokenizer/special_tokens_map.json", {"additional_special_tokens": MANY}, "50000 special tokens"),
            ("model_index.json", NESTED, "model_index.json|20 levels"),
            ("unet/config.json", NESTED, "unet/config.json|20 levels"),
            ("unet/config.json", {"layers_per_block": 10**30}, "layers_per_block"),
            ("unet/config.json", {"block_out_channels": [None, 32, 64]}, "block_out_channels"),
            ("text_encoder/config.json", {"num_hidden_layers": 10**30}, "num_hidden_layers"),
            ("text_encoder/config.json", {"vocab_size": [1]}, "vocab_size"),
            ("scheduler/scheduler_config.json", {"num_train_timesteps": 2**63}, "num_train_timesteps"),
            ("scheduler/scheduler_config.json", {"beta_start": [1]}, "beta_start"),
            ("vae/config.json", {"scaling_factor": [1]}, "scaling_factor"),
        )
    )
]
FILES = [
    Case("a LoRA with alpha [1]", lora(lora_alpha=[1]), f"{DRAW} --lora a.safetensors", "a.safetensors|alpha [1]"),
    Case("a LoRA with patterns [1]", lora(alpha_pattern=[1]), SHOW, "a.safetensors|alpha_pattern"),
    Case(
        "a header of brackets",
        lambda folder: header(b"[" * 50_000_000)(folder),
        SHOW,
        "a.safetensors",
    ),
    Case("a header of 480 levels", header(NESTED.encode()), SHOW, "a.safetensors"),
]


@pytest.mark.parametrize("case", PICTURES + RECORDS + CHECKPOINTS + FILES, ids=lambda case: case.what)
def test_a_hostile_file_is_refused(case, end, tmp_path, baseline):
    here, tools = tmp_path / "here", tmp_path / "bin"
    here.mkdir()
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/here/ran\n")
    (tools / "gs").chmod(0o755)
    Image.new("RGB", (64, 64)).save(here / "whole.png")
    case.make(here)
    before = sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*"))
    ended, memory = end(case.command.split(), tmp_path)
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert ended.err.count("\n") == 1 and ": error: " in ended.err, ended.err
    assert not [words for words in case.says.split("|") if words not in ended.err], ended.err
    assert len(ended.err) < 400 and "Error" not in ended.err, ended.err
    assert sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*")) == before
    assert memory < baseline + MEMORY and ended.seconds < SECONDS


def test_marks_are_seen():
    """Programs and connections that a process starts are told on stderr."""
    watched = WATCHED.split("from stable_diffusion")[0]
    for line in ("os.system('true')", "import socket; socket.getaddrinfo('localhost', 80)"):
        done = subprocess.run([sys.executable, "-c", watched + line], capture_output=True, text=True, check=True)
        assert done.stderr.count("\n") >= 1
