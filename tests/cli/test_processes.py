"""A training in several processes, as ``mlx.launch`` starts them: environment variables name the others."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from stable_diffusion.app import processes
from stable_diffusion.cli.train import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., list[subprocess.Popen]]]:
    """Start two processes, which compile nothing: it takes longer than the rest."""
    with socket.socket() as first, socket.socket() as second:
        for listener in (first, second):
            listener.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{listener.getsockname()[1]}"] for listener in (first, second)]
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    started = []

    def call(*words: object) -> list[subprocess.Popen]:
        for rank in range(2):
            (tmp_path / f"tmp{rank}").mkdir(exist_ok=True)
            variables = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
            variables |= {"MLX_DISABLE_COMPILE": "1", "TMPDIR": str(tmp_path / f"tmp{rank}")}
            command = [sys.executable, "-m", "stable_diffusion", "train", *map(str, words)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, **pipes))
        return started

    yield call
    for process in started:
        process.kill()
        process.communicate()


def ends(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Wait for processes; returns the exit code, stdout and stderr of each."""
    return [(process.returncode, *texts) for process in started for texts in [process.communicate(timeout=60)]]


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_two_processes_train_what_one_does_with_twice_the_batch(photos, tmp_path, start):
    flags = ["--model", "tiny", "--trigger", "ohwx", "--steps", 4, "--rank", 2, "--learning_rate", 1e-3]
    flags += ["--measure_every", 0, "--prior", 2, "--prior_prompt", "a circle"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    both = start(photos, *flags, "--json", "--output", tmp_path / "two" / "a.safetensors")
    assert main([*map(str, [photos, *flags, "--batch_size", 2, "--output", tmp_path / "one" / "a.safetensors"])]) == 0
    (code, out, err), other = ends(both)
    assert (code, *other) == (0, 0, "", ""), err
    events = [json.loads(line) for line in out.splitlines()]
    assert {event["rank"] for event in events} == {0} and [event["kind"] for event in events].count("step") == 4
    assert "2 processes, each with a batch of 1" in err
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1] and "a.csv" in names[0] and not list((tmp_path / "tmp1").glob("*/a*"))
    one, two = (mx.load(str(tmp_path / name / "a-000004.state.safetensors")) for name in ("one", "two"))
    factors = [name for name in one if name.startswith("factors")]
    largest = max(mx.abs(one[name]).max().item() for name in factors)
    assert max(mx.abs(one[name] - two[name]).max().item() for name in factors) <= 1e-5 * largest


@pytest.mark.parametrize("rank, said", [(0, "process 1: no folder; check"), (1, "no folder; check")])
def test_what_is_wrong_in_one_process_is_said_in_all(monkeypatch, rank, said):
    monkeypatch.setattr(processes, "texts", lambda text, group: ["", text or "no folder; check"])
    group = SimpleNamespace(rank=lambda: rank)
    with pytest.raises(ValueError, match=f"^{said}$"), processes.together(group):
        if rank == 1:
            raise ValueError(said)


def test_a_signal_to_one_process_ends_all_and_saves(photos, tmp_path, start):
    flags = [
        "--model",
        "tiny",
        "--trigger",
        "a",
        "--steps",
        500,
        "--rank",
        1,
        "--measure_every",
        0,
        "--save_every",
        0,
        "--json",
    ]
    both = start(photos, *flags, "--output", tmp_path / "a.safetensors")
    assert json.loads(both[0].stdout.readline())["step"] == 1
    both[1].send_signal(signal.SIGINT)
    (code, out, err), other = ends(both)
    assert (code, *other) == (130, 130, "", ""), err
    assert "goes on" in err and "a.safetensors" in out and len(list(tmp_path.glob("a-*.state.safetensors"))) == 1
