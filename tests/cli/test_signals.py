"""Ctrl-C and SIGTERM at every moment of a run: what is written, what is said, and how the process ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image

from command_line import PROMPT, ROOT, names, pixels
from stable_diffusion.app import engine, memory
from stable_diffusion.cli import main as cli
from stable_diffusion.cli import signals as signals_module
from stable_diffusion.cli.signals import signals
from stable_diffusion.images.files import UNFINISHED
from stable_diffusion.models.unet import UNet2DConditionModel
from stable_diffusion.pipeline import StableDiffusion


def kill(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def said() -> list[str]:
    return []


# --- the signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_raises_while_a_run_is_made_ready_and_then_it_is_noted(said, number):
    with signals(said.append) as stop:
        with pytest.raises(KeyboardInterrupt):
            kill(number)
        assert stop.code == 128 + number
    assert said == []
    with signals(said.append) as stop:
        stop.is_expected = True
        assert stop.code is None
        kill(number)
        assert stop.code == 128 + number
    assert len(said) == 1 and "once more" in said[0]


def test_it_is_said_while_the_main_thread_computes():
    """The handler of Python has to wait for the computation."""
    said = []
    with signals(lambda line: said.append(stop.code)) as stop:
        stop.is_expected = True
        x = mx.ones((512, 512)) / 512
        for _ in range(200):
            x = x @ x
        threading.Timer(0.2, kill).start()
        while not said:  # one is enough, but on a fast machine
            mx.eval(x + 1)
    assert said == [None] and stop.code == 130


def test_everything_is_as_before(said):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *args: seen.append(args))
    try:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        threads, files = threading.active_count(), len(os.listdir("/dev/fd"))
        for _ in range(3):
            with signals(said.append) as stop:
                stop.is_expected = True
                kill()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert (threading.active_count(), len(os.listdir("/dev/fd"))) == (threads, files)
        assert signal.set_wakeup_fd(-1) == -1
        kill(signal.SIGTERM)
        assert len(seen) == 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_is_ignored_stays_ignored(said):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals(said.append) as stop:
            kill()
            assert stop.code is None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_watch_for_nothing(said):
    codes = []

    def work() -> None:
        with signals(said.append) as stop:
            stop.is_expected = True
            codes.append(stop.code)

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [None] and signal.getsignal(signal.SIGINT) is handler


LONG = """
import os, signal, sys, threading
from pathlib import Path
import mlx.core as mx
from stable_diffusion.images.files import UNFINISHED
from stable_diffusion.cli import signals

signals._PATIENCE = 1
path = Path(sys.argv[1])
path.write_text("half")
UNFINISHED.add(path)
with signals.signals(lambda line: None) as stop:
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
    done = subprocess.run([sys.executable, "-c", LONG, half, *sent.split()], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == code and not half.exists()


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(run, sd1_folder, tmp_path, monkeypatch) -> Callable:
    """Run a script, and send a signal in the UNet's call of a number; returns what it says and what it leaves."""
    monkeypatch.setattr(memory, "fits_together", lambda *args: True)
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
    assert len(done.remarks) == 2 and "once more leaves at once" in done.remarks[0]
    assert ": error: interrupted" in done.remarks[1]
    assert not UNFINISHED


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_in_the_second_of_three_batches(interrupted, tmp_path, number, code):
    done, left, calls = interrupted(6, "--n_images", 3, "--batch_size", 1, "--steps", 4, number=number)
    stopped(done, code)
    assert calls == 6 and left == ["a_1.png", "a_2_partial.png"]
    assert done.out == [f"{tmp_path}/out/a_1.png seed 1", f"{tmp_path}/out/a_2_partial.png seed 2 partial: step 2 of 4"]
    assert all(pixels(tmp_path / "out" / name).shape == (64, 64, 3) for name in left)
    with Image.open(tmp_path / "out" / "a_2_partial.png") as image:
        assert json.loads(image.text["stable_diffusion"])["partial"] == "step 2 of 4"
    with Image.open(tmp_path / "out" / "a_1.png") as image:
        assert '"partial"' not in image.text["stable_diffusion"]


def test_in_the_only_batch(interrupted):
    done, left, calls = interrupted(1, "--n_images", 2, "--steps", 3, "--json")
    stopped(done, 130)
    assert calls == 1 and left == ["a_1_partial.png", "a_2_partial.png"]
    records = [json.loads(line) for line in done.out]
    assert [(record["kind"], record["partial"]) for record in records] == [("partial", "step 1 of 3")] * 2


@pytest.mark.parametrize(
    "at, options, left",
    [
        (3, ["--n_images", 1], ["a.png"]),  # in the last step nothing is partial
        (4, ["--n_images", 3, "--batch_size", 1, "--low_memory"], ["a_1.png", "a_2_partial.png"]),
    ],
)
def test_what_is_left(interrupted, at, options, left):
    """In low memory the batches are decoded after the last pass; those that have not begun are left out."""
    done, found, _ = interrupted(at, "--steps", 3, *options)
    stopped(done, 130)
    assert found == left


@pytest.mark.parametrize("at, calls, until", [(1, 1, "step 1 of 2"), (2, 2, "the first pass"), (3, 3, "step 1 of 2")])
def test_before_and_in_a_second_pass(interrupted, tmp_path, at, calls, until):
    """Enlarged it is only once the second pass has begun."""
    hires = ["--hires", 1.5, "--hires_strength", 1]
    done, left, called = interrupted(at, "--n_images", 1, "--steps", 2, *hires)
    stopped(done, 130)
    assert called == calls and left == ["a_partial.png"] and done.out[0].endswith(f"partial: {until}")
    assert pixels(tmp_path / "out" / left[0]).shape == ((96, 96, 3) if at == 3 else (64, 64, 3))


def test_before_a_refiner_is_read(interrupted, sd1_folder, monkeypatch):
    read, load = [], engine.open_model
    monkeypatch.setattr(
        engine, "open_model", lambda request, *more, **kind: read.append(kind) or load(request, *more, **kind)
    )
    refiner = ["--refiner", sd1_folder, "--refiner_start", 0.5]
    done, left, _ = interrupted(2, "--n_images", 1, "--steps", 4, *refiner)
    stopped(done, 130)
    assert left == ["a_partial.png"] and done.out[0].endswith("partial: the first pass") and read == []


def test_while_an_image_is_decoded(interrupted, monkeypatch):
    """What is computed is written; no other batch is begun, and there is no grid."""
    decode = StableDiffusion.decode
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, x: kill() or decode(self, x))
    monkeypatch.setattr(signals_module, "_watch", lambda *args: None)  # every image is one more signal
    done, left, calls = interrupted(0, "--n_images", 4, "--batch_size", 2, "--steps", 2)
    assert done.code == 130 and calls == 2 and left == ["a_1.png", "a_2.png"]


def test_before_the_first_step(interrupted, monkeypatch):
    monkeypatch.setattr(cli, "Engine", lambda *args, **options: kill())
    done, left, calls = interrupted(0, "--n_images", 1)
    done.failed(130, "interrupted")
    assert left == [] and done.out == [] and calls == 0


def test_a_process(sd1_folder, tmp_path: Path):
    """Two signals to a script that has begun to compute, as a terminal sends them."""
    options = ["--model", str(sd1_folder), "--steps", "900", "--n_images", "1", "--seed", "1"]
    command = [sys.executable, "txt2image.py", PROMPT, *options, "--preview", str(tmp_path / "p.png")]
    command += ["--preview_every", "1", "--output", str(tmp_path / "a.png")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "p.png").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "partial: step" in out and "interrupted" in err.splitlines()[-1]
    assert names(tmp_path) == ["a_partial.png", "p.png"]
