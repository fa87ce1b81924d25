"""The benchmarks of the start, of growth and of a GPU run, with the bundled model's shapes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, growth, load_time
from benchmarks.compare import torch_diffusers
from benchmarks.shapes import SHAPES
from stable_diffusion.weights.load import build

ROOT = Path(__file__).parents[1]


def test_the_start_beside_reading_the_files(tmp_path, capsys):
    """One of each kind; nothing is left of what was written."""
    names = ["reading", "half", "converting"]
    load_time.main([str(tmp_path), "--family", "tiny", "--only", *names])
    lines = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == names and not list(tmp_path.iterdir())
    steps = [[figure for figure in line if figure.startswith(("first step", "again"))] for line in lines]
    assert [len(of) for of in steps] == [0, 2, 0]


def test_growth_is_a_power_law_that_is_drawn(tmp_path, monkeypatch):
    sides = [64, 128, 256]
    costs = [(1e-3 * side**3, 5.0 * side**2) for side in sides]
    assert growth.exponents([side**2 for side in sides], costs) == pytest.approx((1.5, 1.0))
    monkeypatch.setattr(growth, "cost", lambda work, clock, repeats: (1.0, 1.0))  # nothing is computed
    monkeypatch.setattr(growth, "random_module", lambda name, config: build(name, config))
    monkeypatch.setattr(growth, "step_of", lambda unet, rows, size: list)
    monkeypatch.setattr(growth, "decoding_of", lambda vae, rows, size: list)
    picture = tmp_path / "growth.png"
    options = ["--shape", "narrow", "--work", "step", "decode", "--cpu", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["growth", *options])
    growth.main()
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("work, make", [("step", growth.step_of), ("decode", growth.decoding_of)])
def test_memory_grows_no_faster_than_pixels_and_pictures(work, make):
    """Attention is worked off in pieces. Convolutions unfold their maps, which have a few values each here."""
    part = "unet" if work == "step" else "vae"
    network = growth.random_module(part, SHAPES["tiny"][part])
    costs = [growth.cost(make(network, *of), lambda: 1.0, 3) for of in ((1, 128), (1, 256), (2, 128), (4, 128))]
    one, larger, *more = [memory for _, memory in costs]
    assert larger <= 4.2 * one and all(memory <= 1.05 * rows * one for rows, memory in zip((2, 4), more, strict=True))


def test_the_lines_of_a_gpu(monkeypatch):
    """In this process, on a CPU, without torch's compiler; what has no time is a line, what is compiled is last."""
    cases = [gpu.case_of(part, "tiny") for part in gpu.PARTS]
    taken, compiled = {}, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))

    def in_this(case, column, device, seconds):
        torch_diffusers.SETTINGS.clear()  # as in a process of its own
        taken[case, column] = gpu.run(case, column, device)
        return taken[case, column] if column != "diffusers, compiled" else {"failed": "no time was left"}

    monkeypatch.setattr(gpu, "_TURNS", 1)
    monkeypatch.setattr(gpu, "in_a_process", in_this)
    monkeypatch.setattr(torch_diffusers, "SETTINGS", set())
    head, *lines = gpu.lines(cases, [*gpu.COLUMNS], "cpu", 100)
    assert "median" in head and len(lines) == 8 and [line[-16:] for line in lines[-2:]] == ["no time was left"] * 2
    assert compiled == ["UNet2DConditionModel", "Encoder", "Decoder"]
    first = [line for line in lines if "this library" in line]
    assert [line.split()[-1] for line in first] == ["1.00"] * 2
    assert all(0 < result["min"] <= result["median"] and result["peak"] > 0 for result in taken.values())


def test_a_line_of_a_gpu_in_a_process_that_fails_or_has_no_time():
    case = gpu.case_of("unet", "tiny")
    assert gpu.in_a_process(case, "this library", "cpu", 0.0) == {"failed": "no time was left"}
    assert "finds no gpu here" in gpu.in_a_process(case, "this library", "gpu", 100)["failed"]


def test_the_script_for_a_gpu_says_where_there_is_none(tmp_path):
    script = ROOT / "benchmarks" / "gpu.sh"
    if shutil.which("nvidia-smi"):
        pytest.skip("there is one, on which it would install")
    done = subprocess.run(["bash", str(script), str(tmp_path / "new")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("there is no NVIDIA GPU here") and not done.stdout
    assert not list(tmp_path.iterdir())
