"""Ctrl-C and SIGTERM at every moment of a run: what is written, what is said, and how the process ends."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from command_line import PROMPT, ROOT, names, pixels
from stable_diffusion.app import memory
from stable_diffusion.cli.signals import signals
from stable_diffusion.files.whole import UNFINISHED
from stable_diffusion.images.files import read_text
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.pipeline import StableDiffusion


def kill(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


# --- the signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_raises_while_a_run_is_made_ready_and_then_it_is_noted(number):
    said = []
    with signals(said.append) as stop, pytest.raises(KeyboardInterrupt):
        kill(number)
    assert stop.code == 128 + number and said == []
    with signals(said.append) as stop:
        stop.is_expected = True
        kill(number)
    assert stop.code == 128 + number and len(said) == 1 and "again quits now" in said[0]


def test_everything_is_as_before_and_what_is_ignored_stays_ignored():
    own = {signal.SIGTERM: lambda *_: None, signal.SIGINT: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    threads, files = threading.active_count(), len(os.listdir("/dev/fd"))
    with signals(lambda _: None) as stop:
        stop.is_expected = True
        kill()
        assert stop.code is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        kill(signal.SIGTERM)
        assert stop.code == 143
    assert {number: signal.signal(number, handler) for number, handler in before.items()} == own
    assert (threading.active_count(), len(os.listdir("/dev/fd"))) == (threads, files)
    assert signal.set_wakeup_fd(-1) == -1


LONG = """
import os, signal, sys, threading
from pathlib import Path
import mlx.core as mx
from stable_diffusion.files.whole import UNFINISHED
from stable_diffusion.cli import signals

signals._PATIENCE = 1
path = Path(sys.argv[1])
path.write_text("half")
UNFINISHED.add(path)
with signals.signals(lambda line: print(line, flush=True)) as stop:
    stop.is_expected = True
    x = mx.ones((1024, 1024)) / 1024
    for _ in range(5000):  # minutes of work
        x = x @ x
    for wait, name in enumerate(sys.argv[2:], start=1):
        threading.Timer(0.3 * wait, os.kill, (os.getpid(), getattr(signal, name))).start()
    mx.eval(x)
"""


@pytest.mark.parametrize("sent, code", [("SIGINT SIGINT", 130), ("SIGINT SIGTERM", 143), ("SIGTERM", 143)])
def test_the_second_and_a_lasting_sigterm_end_the_process_in_the_midst_of_a_computation(tmp_path, sent, code):
    half = tmp_path / ".half.tmp"
    command = [sys.executable, "-c", LONG, half, *sent.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code and not half.exists()
    assert "Ctrl-C again quits now" in done.stdout  # said in the midst of the computation too


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(run, sd1_folder, tmp_path, monkeypatch) -> Callable:
    """Run a script, and send a signal in the UNet's call of a number; returns what it says and what it leaves."""
    monkeypatch.setattr(memory, "fit", lambda *args, **kwargs: True)
    folder = tmp_path / "out"
    folder.mkdir()
    unet = UNet2DConditionModel.__call__

    def call(at: int, *options, number: int = signal.SIGINT, script: str = "txt2image"):
        calls = []

        def watched(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                kill(number)
            return unet(self, *args, **kwargs)

        monkeypatch.setattr(UNet2DConditionModel, "__call__", watched)
        given = ["--model", sd1_folder, "--width", 64, "--height", 64, "--seed", 1, "--cfg", 1, *options]
        done = run(script, PROMPT, *given, "--output", folder / "a.png")
        return done, names(folder), len(calls)

    return call


def stopped(done, code: int) -> None:
    assert done.code == code, done.err
    assert len(done.remarks) == 2 and "Ctrl-C again quits now" in done.remarks[0]
    assert ": error: interrupted" in done.remarks[1]
    assert not UNFINISHED


def test_in_the_second_of_three_batches(interrupted, tmp_path):
    done, left, calls = interrupted(6, "--n_images", 3, "--batch_size", 1, "--steps", 4, number=signal.SIGTERM)
    stopped(done, 143)
    assert calls == 6 and left == ["a_1.png", "a_2_partial.png"]
    assert done.out == [f"{tmp_path}/out/a_1.png seed 1", f"{tmp_path}/out/a_2_partial.png seed 2 partial: step 2 of 4"]
    whole, partial = (read_text(tmp_path / "out" / name)["stable_diffusion"] for name in left)
    assert json.loads(partial)["partial"] == "step 2 of 4" and "partial" not in json.loads(whole)


def test_what_is_left(interrupted):
    """In low memory the batches are decoded after the last pass; those that have not begun are left out."""
    low = ["--n_images", 3, "--batch_size", 1, "--low_memory"]
    done, left, _ = interrupted(4, "--steps", 3, *low)
    stopped(done, 130)
    assert left == ["a_1.png", "a_2_partial.png"]


def test_of_all_images_there_is_a_record(interrupted):
    done, left, calls = interrupted(1, "--n_images", 2, "--steps", 3, "--json")
    stopped(done, 130)
    assert calls == 1 and left == ["a_1_partial.png", "a_2_partial.png"]
    assert [json.loads(line)["partial"] for line in done.out] == ["step 1 of 3"] * 2


def test_in_the_last_step_nothing_is_partial(interrupted):
    done, left, _ = interrupted(3, "--steps", 3, "--n_images", 1)
    stopped(done, 130)
    assert left == ["a.png"]


@pytest.mark.parametrize("at, calls, until", [(1, 1, "step 1 of 2"), (2, 2, "the first pass"), (3, 3, "step 1 of 2")])
def test_before_and_in_a_second_pass(interrupted, tmp_path, at, calls, until):
    """Enlarged it is only once the second pass has begun."""
    hires = ["--hires", 1.5, "--hires_strength", 1]
    done, left, called = interrupted(at, "--n_images", 1, "--steps", 2, *hires)
    stopped(done, 130)
    assert called == calls and left == ["a_partial.png"] and done.out[0].endswith(f"partial: {until}")
    assert pixels(tmp_path / "out" / left[0]).shape == ((96, 96, 3) if at == 3 else (64, 64, 3))


def test_before_a_refiner_is_read(interrupted, sd1_folder, monkeypatch):
    opened, init = [], StableDiffusion.__init__
    monkeypatch.setattr(StableDiffusion, "__init__", lambda self, *a, **k: opened.append(1) or init(self, *a, **k))
    refiner = ["--refiner", sd1_folder, "--refiner_start", 0.5]
    done, left, _ = interrupted(2, "--n_images", 1, "--steps", 4, *refiner)
    stopped(done, 130)
    assert left == ["a_partial.png"] and done.out[0].endswith("partial: the first pass") and opened == [1]


def test_while_an_image_is_decoded(interrupted, monkeypatch):
    """What is computed is written; no other batch is begun, and there is no grid."""
    decodes, decode = [], StableDiffusion.decode

    def decode_and_kill(self, x):
        decodes.append(x)
        if len(decodes) == 1:
            kill()
        return decode(self, x)

    monkeypatch.setattr(StableDiffusion, "decode", decode_and_kill)
    done, left, calls = interrupted(0, "--n_images", 4, "--batch_size", 2, "--steps", 2)
    assert done.code == 130 and calls == 2 and left == ["a_1.png", "a_2.png"]
