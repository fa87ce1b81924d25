"""Converting on the command line: a folder that is complete or not there, and errors of one line."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from app.test_convert import same
from cli.test_faults import PREPARE
from command_line import ROOT
from forked import Ended
from stable_diffusion import StableDiffusion
from stable_diffusion.cli.convert import file_size, main
from stable_diffusion.weights.files import open_checkpoint
from stable_diffusion.weights.formats import safetensors

# --- all or nothing ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(forked) -> Callable[[str, Path], Ended]:
    """Convert the bundled model in a process of its own, which meets a fault."""
    convert = "from stable_diffusion.cli.convert import main\nsys.exit(main(['tiny', str(out), '-q']))"
    return lambda fault, dest: forked(f"{PREPARE}{fault}\n{convert}", dest)


_MOMENTS = ["safetensors, 'all_finite', 1", "safetensors, 'all_finite', 250", "os, 'fsync', 11", "Path, 'rename', 1"]


# Of the bundled model 12 files are written: config.json and weights of 3 networks, 4 of the tokenizer, 2 more.
@pytest.mark.parametrize("moment", _MOMENTS)
def test_killed_and_started_again(run, tmp_path, moment):
    dest = tmp_path / "new"
    killed = run(f"from stable_diffusion.weights.formats import safetensors\nat({moment}, send(KILL))", dest)
    assert killed.code == -9, killed.err
    assert os.listdir(tmp_path) == [".new.partial"]
    if "all_finite" in moment:  # later all of it is there
        with pytest.raises(ValueError, match=r"has no model_index\.json"):
            open_checkpoint(tmp_path / ".new.partial")
    assert main(["tiny", str(dest), "-q"]) == 0
    assert os.listdir(tmp_path) == ["new"]
    assert same(StableDiffusion(dest, True), StableDiffusion("tiny", True, unet_bits=8, text_bits=4))


def test_killed_after_the_end(run, tmp_path):
    """Synced last is the folder that the new one is in: after the 12 files, the 5 folders in it, and itself."""
    assert run("at(os, 'fsync', 19, send(KILL))", tmp_path / "new").code == -9
    assert os.listdir(tmp_path) == ["new"] and open_checkpoint(tmp_path / "new")


def test_a_disk_that_fills_up_leaves_nothing(run, tmp_path):
    result = run("resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))", tmp_path / "new")
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("python -m stable_diffusion convert: error: ") and "File too large" in result.err
    assert os.listdir(tmp_path) == []


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "stable_diffusion", "convert", "tiny", str(tmp_path / "new"), "-q"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'new'}\n")
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["unet:", "vae:", "text_encoder:"]
    assert "8 bits" in result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    "error, code", [(RuntimeError("[read] gone"), 1), (MemoryError(), 1), (KeyboardInterrupt(), 130)]
)
def test_what_fails_on_the_way_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, error, code):
    def fail(value: mx.array) -> mx.array:
        raise error

    monkeypatch.setattr(safetensors, "all_finite", fail)
    with pytest.raises(SystemExit) as exit:
        main(["tiny", str(tmp_path / "new")])
    err = capsys.readouterr().err
    assert exit.value.code == code and err.count("\n") == 1 and "nothing was written" in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["no-such-model"], "unknown model 'no-such-model'"),
        (["tiny", "--dtype", "int8"], "'int8' is unknown"),
        (["tiny", "--max_shard_size", "0.5"], "'0.5' is not a size such as 5GB or 500MB"),
        (["tiny", "--lora", "no-such.safetensors:0.5"], "there is no LoRA at no-such.safetensors"),
        (["tiny", "--revision", "main"], "revision"),
        (["no-such-model", "taken"], "is not empty: choose another name, or remove it"),  # before the source is sought
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, named):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    source, *options = arguments
    dest = tmp_path / (options.pop() if options == ["taken"] else "new")
    with pytest.raises(SystemExit) as error:
        main([source, str(dest), *options])
    line = capsys.readouterr().err.splitlines()[-1]
    assert error.value.code == 2 and line.startswith("python -m stable_diffusion convert: error: ") and named in line
    assert os.listdir(tmp_path) == ["taken"]


def test_sizes():
    sizes = {"5GB": 5 * 10**9, "1.5g": 15 * 10**8, "300 MB": 3 * 10**8, "7": 7}
    assert {text: file_size(text) for text in sizes} == sizes
