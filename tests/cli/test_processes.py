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
from stable_diffusion.images.files import save

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


def difference(one: Path, two: Path) -> float:
    """Return the largest difference of the factors in two checkpoints, over the largest factor."""
    one, two = mx.load(str(one)), mx.load(str(two))
    factors = [name for name in one if name.startswith("factors")]
    largest = max(mx.abs(one[name]).max().item() for name in factors)
    return max(mx.abs(one[name] - two[name]).max().item() for name in factors) / largest


def test_two_processes_train_what_one_does_with_twice_the_batch(photos, tmp_path, start):
    """Over 20 steps, and also where one goes on from the checkpoint of two, and two from that of one."""
    flags = ["--model", "tiny", "--trigger", "ohwx", "--steps", 20, "--rank", 2, "--learning_rate", 1e-3]
    flags += ["--measure_every", 0, "--prior", 1, "--prior_prompt", "a circle", "--save_every", 18]
    flags = [str(word) for word in [photos, *flags]]
    one, two = (tmp_path / name / "a.safetensors" for name in ("one", "two"))
    text = {"parameters": "a circle\nSeed: 0, Model: tiny"}  # as of one that is drawn
    for output in (one, two):
        (output.parent / "a-prior").mkdir(parents=True)
        save(Image.linear_gradient("L").convert("RGB").resize((64, 64)), output.parent / "a-prior" / "0000.png", text)
    both = start(*flags, "--json", "--output", two)
    assert main([*flags, "--batch_size", "2", "--output", str(one)]) == 0
    (code, out, err), other = ends(both)
    assert (code, *other) == (0, 0, "", ""), err
    events = [json.loads(line) for line in out.splitlines()]
    assert {event["rank"] for event in events} == {0} and [event["kind"] for event in events].count("step") == 20
    assert "2 processes, each with a batch of 1" in err
    names = [sorted(path.name for path in output.parent.iterdir()) for output in (one, two)]
    assert names[0] == names[1] and "a.csv" in names[0] and not list((tmp_path / "tmp1").glob("*/a*"))
    for output, size in ((one, "2"), (two, "1")):
        assert mx.load(str(output), return_metadata=True)[1]["ss_batch_size_per_device"] == size
    middle, end = "a-000018.state.safetensors", "a-000020.state.safetensors"
    whole = (one.parent / end).rename(tmp_path / "whole.safetensors")
    assert difference(whole, two.parent / end) <= 1e-5
    both[:] = []
    start(*flags, "--output", one, "--resume", one.parent / middle)
    assert main([*flags, "--batch_size", "2", "--output", str(two), "--resume", str(two.parent / middle)]) == 0
    assert [code for code, *_ in ends(both)] == [0, 0]
    assert 0 < max(difference(whole, output.parent / end) for output in (one, two)) <= 1e-5


def test_where_a_process_is_lost_a_checkpoint_is_left(photos, tmp_path, start):
    flags = ["--model", "tiny", "--trigger", "a", "--steps", 500, "--rank", 1, "--measure_every", 0, "--save_every", 0]
    both = start(photos, *flags, "--json", "--output", tmp_path / "a.safetensors")
    assert json.loads(both[0].stdout.readline())["step"] == 1
    both[1].kill()
    (code, out, err), _ = ends(both)
    assert code == 1 and "another process is lost" in err and "--resume latest" in err
    last = [json.loads(line) for line in out.splitlines()]
    assert [event["kind"] for event in last[-2:]] == ["checkpoint", "lora"]
    assert Path(last[-2]["path"]).is_file() and Path(last[-1]["path"]).is_file()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("word, code", [("--help", 0), ("--nonsense", 2)])
def test_what_all_would_print_is_printed_by_the_first(monkeypatch, capsys, rank, word, code):
    monkeypatch.setattr(processes, "join", lambda: SimpleNamespace(rank=lambda: rank, size=lambda: 2))
    with pytest.raises(SystemExit) as leaving:
        main([word])
    assert leaving.value.code == code and bool("".join(capsys.readouterr())) == (rank == 0)


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
    assert "--resume latest" in err and "a.safetensors" in out
    assert len(list(tmp_path.glob("a-*.state.safetensors"))) == 1
