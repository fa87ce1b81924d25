"""The comparison runs, with the bundled model's shapes: every part of it, and one beside diffusers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compare.cases import PARTS, Case, cases
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parents[1]
ONE = {"shape": ["sd21"], "size": [512], "dtype": ["float32"], "rows": [2], "weights": ["plain"]}


def compare(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.compare", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run(tmp_path: Path, *arguments: object) -> tuple[list[dict], str]:
    """The results in the JSON file, and the table, of a comparison of the bundled model's shapes."""
    file = tmp_path / "figures.json"
    done = compare("--shape", "tiny", "--size", 64, "--repeats", 2, "--json", file, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    read = json.loads(file.read_text())
    assert read["machine"]["cores"] >= 1 and read["machine"]["mlx"]
    return read["results"], done.stdout


def test_every_part(tmp_path):
    results, table = run(tmp_path, "--only", ",".join(PARTS), "--columns", "this library")
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


def test_beside_diffusers_which_has_nothing_quantized(tmp_path):
    options = ("--only", "unet", "--weights", "plain", "quantized", "--columns", "this library", "diffusers")
    results, table = run(tmp_path, *options)
    plain, quantized = (case["columns"] for case in results)
    ours, theirs = plain["this library"], plain["diffusers"]
    assert ours["weights"] == theirs["weights"] > quantized["this library"]["weights"]
    assert f"this library / diffusers: time {ours['median'] / theirs['median']:.2f}" in table
    assert "diffusers" not in quantized


def test_a_column_that_fails_is_a_result(tmp_path):
    done = compare("--shape", "tiny", "--size", -8, "--only", "vae-encode", "--columns", "this library")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"this library +\w+Error: ", done.stdout)


def test_the_matrix():
    assert cases(["unet"], ONE) == [Case("unet", "sd21", 512)]
    every = {
        "shape": ["sd15", "sd21", "sdxl"],
        "size": [512, 768, 1024],
        "dtype": ["float32", "float16", "bfloat16"],
        "rows": [1, 2],
        "weights": ["plain", "quantized"],
    }
    count = {part: len(cases([part], every)) for part in PARTS}
    # The published autoencoders are one; whole models are read in the two types that the scripts know.
    assert count == {"unet": 108, "text": 18, "vae-encode": 3, "vae-decode": 3, "load": 12, "image": 36}
    assert cases(["vae-decode"], every | {"shape": ["tiny", "sd15"]})[0] == Case("vae-decode", "tiny", 512)
    assert {case.latent for case in cases(["unet"], ONE | {"shape": list(SHAPES)})} == {64, 128}
    titles = [case.title() for part in PARTS for case in cases([part], every)]
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
def test_what_makes_no_sense_is_refused(arguments, words):
    done = compare(*arguments)
    assert done.returncode == 2 and words in done.stderr
