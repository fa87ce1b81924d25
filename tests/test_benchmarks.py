"""The benchmarks run, with the bundled model's shapes: of the comparison every part, and one beside diffusers."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import dummy
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import approximations, fleet, growth, memory
from benchmarks.compare import workers
from benchmarks.compare.__main__ import FULL, QUICK, main
from benchmarks.compare.cases import PARTS, Case, cases
from benchmarks.shapes import SHAPES, UNETS

ROOT = Path(__file__).parents[1]
TINY = ("--shape", "tiny", "--size", "64", "--repeats", "2")


class Thread(dummy.Process):
    """Stands in for a worker's process: the networks are small, and to start one takes longer than to measure them."""

    def kill(self) -> None:
        assert not self.is_alive()


@pytest.fixture
def compare(monkeypatch, tmp_path, capsys) -> Callable[..., tuple[list[dict], str]]:
    """Compare in this process; gives the results in the JSON file, and the table."""
    monkeypatch.setattr(workers, "_SPAWN", SimpleNamespace(Process=Thread, Pipe=dummy.Pipe))

    def call(*arguments: str) -> tuple[list[dict], str]:
        file = tmp_path / "figures.json"
        assert main([*TINY, "--json", str(file), *arguments]) == 0
        read = json.loads(file.read_text())
        assert read["machine"]["cores"] >= 1 and read["machine"]["mlx"]
        return read["results"], capsys.readouterr().out

    return call


def test_every_part(compare):
    results, table = compare("--only", ",".join(PARTS), "--columns", "this library")
    assert [case["part"] for case in results] == list(PARTS)
    for case in results:
        figures = case["columns"]["this library"]
        assert 0 < figures["min"] <= figures["median"] <= figures["max"] == max(figures["seconds"])
        assert len(figures["seconds"]) == len(figures["processor"]) == 2 and figures["first"] > 0
        # All of the weights are in memory, and something is computed from them; files are in half precision.
        assert figures["peak"] > figures["weights"] > 0
        assert (figures["primitives"] is None) == (case["part"] in ("load", "image"))
        assert figures["primitives"] is None or figures["primitives"] > figures["fused"] > 0
        assert re.search(rf"this library .* {figures['median']:.3f} s", table)
    files = {case["part"]: case["columns"]["this library"]["weights"] for case in results}
    vae = files["vae-encode"] + files["vae-decode"]
    assert files["load"] == files["image"] == pytest.approx((files["unet"] + files["text"] + vae) / 2, rel=0.02)


def test_beside_diffusers_which_has_nothing_quantized(compare):
    options = ("--only", "unet", "--weights", "plain", "quantized", "--columns", "this library", "diffusers")
    results, table = compare(*options)
    plain, quantized = (case["columns"] for case in results)
    ours, theirs = plain["this library"], plain["diffusers"]
    assert ours["weights"] == theirs["weights"] > quantized["this library"]["weights"]
    assert f"this library / diffusers: time {ours['median'] / theirs['median']:.2f}" in table
    assert "diffusers" not in quantized


def test_in_processes_where_a_column_that_fails_is_a_result():
    command = [sys.executable, "-m", "benchmarks.compare", *TINY, "--only", "vae-encode", "--columns", "this library"]
    done = subprocess.run(
        [*command, "--size", "64", "-8"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"64 x 64\n.*\n +this library( +\d+\.\d+ s){3}", done.stdout)
    assert re.search(r"-8 x -8\n.*\n +this library +\w+Error: ", done.stdout)


def test_the_matrix():
    assert cases(["unet"], QUICK) == [Case("unet", "sd21", 512)]
    # The published autoencoders are one; whole models are read in the two types that the scripts know.
    count = {part: len(cases([part], FULL)) for part in PARTS}
    assert count == {"unet": 108, "text": 18, "vae-encode": 3, "vae-decode": 3, "load": 12, "image": 36}
    assert [case.shape for case in cases(["vae-decode"], QUICK | {"shape": ("tiny", "sd15", "sdxl")})] == [
        "tiny",
        "sd15",
    ]
    assert {case.dtype for case in cases(["image"], FULL)} == {"float32", "float16"}
    titles = [case.title() for case in cases(list(PARTS), FULL)]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--only", "unets"), "'unets' is none of unet, text"),
        (("--columns", "mlx-examples"), "give --mlx-examples DIR"),
        (("--mlx-examples", "/nowhere"), "in /nowhere: give a copy of mlx-examples"),
        (("--repeats", 1), "--repeats 1 is less than 2"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    assert leaving.value.code == 2 and words in capsys.readouterr().err


def test_approximations_beside_the_exact_pictures(monkeypatch, capsys):
    settings = {"exact": {}, "twice": {"deep_cache": 2}, "fewer": {"num_steps": 1}}
    monkeypatch.setattr(approximations, "SETTINGS", {name: {"num_steps": 3} | told for name, told in settings.items()})
    approximations.quality(4)
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["4 captions", *settings]
    exact, cached, fewer = (float(line[2]) for line in lines[1:])
    assert exact == 0 < cached < fewer
    assert all(len(line) == len(lines[0]) == 8 for line in lines)


@pytest.mark.parametrize(
    "module, options, lines",
    [(approximations, "--steps-of tiny --latents 16", 7), (growth, "--shape tiny --sizes 64 128", 5)],
)
def test_steps_of_a_shape(module, options, lines, monkeypatch, capsys):
    monkeypatch.setitem(UNETS, "tiny", SHAPES["tiny"]["unet"])
    monkeypatch.setattr(sys, "argv", ["benchmark", *options.split()])
    module.main()
    shares = [float(share) for share in re.findall(r"(\d\.\d+)$", capsys.readouterr().out, re.MULTILINE)]
    assert len(shares) == lines and shares[0] == 1 and all(s > 0 for s in shares)


def test_what_fits_which_mac_is_in_the_documents(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--macs"])
    memory.main()
    table = capsys.readouterr().out.splitlines()
    figures, summary = (
        (ROOT / "docs" / name).read_text("utf-8") for name in ("figures/memory.md", "memory-and-speed.md")
    )
    assert len(table) == 29 and "\n".join(table) in figures
    assert "\n".join([*table[:2], *(line for line in table if "SDXL" in line)]) in summary
    cells = {line: line.split(" | ")[3:] for line in table[2:]}
    assert [len(row) for row in cells.values()] == [4] * 27
    assert all("no" not in cell for line, row in cells.items() for cell in row if "-q" in line or "SDXL" not in line)


def test_a_fleet_is_as_fast_as_its_pictures_divide(capsys):
    job = fleet.Job(pictures=64, seconds=20, size=1024, start=15)
    assert [job.even(macs) for macs in (1, 2, 48, 64, 100)] == [15 + 64 * 20, 15 + 32 * 20, 55, 35, 35]
    assert job.gathering(1, fleet.LINKS["wifi"]) == 0
    two = job.gathering(2, fleet.LINKS["ethernet"])
    assert two == pytest.approx(64 * 3 * 1024**2 / 112e6, rel=0.1)  # a sum over two sends the data once
    assert two < job.gathering(8, fleet.LINKS["ethernet"]) < job.gathering(8, fleet.LINKS["wifi"])
    assert job.even(1) / 2 < job.guidance(fleet.LINKS["ethernet"]) < 0.6 * job.even(1)
    assert fleet.pays_up_to(job, fleet.LINKS["ethernet"]) == 64
    assert fleet.pays_up_to(fleet.Job(pictures=64, seconds=0.1), fleet.LINKS["wifi"]) == 1
    fleet.main(["--macs", "1", "2", "--pictures", "3", "--seconds", "10"])
    lines = capsys.readouterr().out.splitlines()
    assert "computed, not measured" in lines[0]
    assert lines[2].split()[:4] == ["1", "45", "s", "1.00"] and lines[3].split()[:4] == ["2", "35", "s", "1.29"]
