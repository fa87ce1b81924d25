"""What a training writes beside the LoRA: names, table, curve, sheet of previews, settings, and its progress bar."""

import io
import tomllib
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from benchmarks.shapes import SHAPES
from stable_diffusion.app.training_output import LossTable, RunFiles, add_row, to_toml
from stable_diffusion.app.training_plan import predicted_seconds, step_operations
from stable_diffusion.app.training_progress import TrainingProgress
from stable_diffusion.images.files import read_text
from stable_diffusion.training.trainer import TrainingStep
from stable_diffusion.weights.load import build
from stable_diffusion.weights.quantize import quantize


def test_settings_are_read_back_as_they_were():
    values = {"text": 'a "b"\\\n\t\x1f\x7f é 🦊 # [', "rate": 1e-05, "large": 1e20, "flip": True, "n": 3, "none": None}
    assert tomllib.loads(to_toml(values)) == {name: value for name, value in values.items() if value is not None}


def test_checkpoints_are_sorted_by_step_and_are_those_of_one_name(tmp_path):
    files = RunFiles(tmp_path / "a.b.safetensors")
    wanted = [files.state(step) for step in (250, 999999, 1000000)]
    for path in [*reversed(wanted), tmp_path / "a.b-2-000001.state.safetensors", tmp_path / "a.b-1.safetensors"]:
        path.touch()
    assert files.states() == wanted
    assert (files.table.name, files.curve.name, files.sheet.name) == ("a.b.csv", "a.b-loss.png", "a.b.png")


# --- table and curve -------------------------------------------------------------------------------------------------


def step(number: int) -> TrainingStep:
    return TrainingStep(number, 1 / (number + 1), 1e-4, 0.5)


def write(path: Path, first: int, last: int) -> LossTable:
    table = LossTable(path, first - 1)
    if first == 1:
        table.write(None, 0.7)
    for number in range(first, last + 1):
        table.write(step(number), 0.5 if number % 2 == 0 else None)
    return table


def test_a_table_goes_on_where_the_run_does(tmp_path):
    write(tmp_path / "whole.csv", 1, 6)
    path = tmp_path / "a.csv"
    write(path, 1, 5)
    path.write_text(path.read_text() + "damaged\n5,half\n")
    write(path, 4, 6)
    assert path.read_text() == (tmp_path / "whole.csv").read_text()
    assert path.read_text().splitlines()[:3] == [
        "step,loss,learning_rate,seconds,measured",
        "0,,,,0.7",
        "1,0.5,0.0001,0.5,",
    ]
    write(path, 1, 2)  # a new run
    assert len(path.read_text().splitlines()) == 4


def test_the_curve(tmp_path):
    pytest.importorskip("matplotlib")
    table = write(tmp_path / "a.csv", 1, 6)
    table.rows += [["7", "nan", "0.1", "1", ""]]
    table.draw(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (800, 500) and len(image.convert("RGB").getcolors(2**16)) > 50


# --- sheet of previews -----------------------------------------------------------------------------------------------


def pictures(value: int, side: int = 32) -> list[Image.Image]:
    return [Image.new("RGB", (side, side), (value, 0, i)) for i in range(2)]


def shown(path: Path) -> list[int]:
    """The red of the pictures in each row, from above; the rows are those that the file names."""
    with Image.open(path) as image:
        rows = np.split(np.asarray(image), len(read_text(path)["steps"].split()))
    assert all((row[-9, :32, 2] == 0).all() and (row[-9, -32:, 2] == 1).all() for row in rows)
    return [int(row[-9, 0, 0]) for row in rows]


def test_a_sheet_grows_and_goes_on_where_the_run_does(tmp_path):
    path = tmp_path / "a.png"
    for number in (0, 10, 20, 30):
        add_row(path, number, pictures(number))
    assert shown(path) == [0, 10, 20, 30]
    add_row(path, 20, pictures(99))  # resumed after step 10
    assert shown(path) == [0, 10, 99] and read_text(path)["steps"] == "0 10 20"
    add_row(path, 30, pictures(30, side=40))  # another resolution
    assert read_text(path)["steps"] == "30"
    add_row(path, 0, pictures(0))  # a new run
    assert shown(path) == [0]


def test_of_many_rows_the_first_and_the_last_stay(tmp_path):
    for number in range(42):
        add_row(tmp_path / "a.png", number, pictures(number))
    assert shown(tmp_path / "a.png") == [0, *range(3, 42)]


def test_a_picture_that_is_no_sheet_is_replaced(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    add_row(tmp_path / "a.png", 5, pictures(5))
    assert shown(tmp_path / "a.png") == [5]


# --- progress --------------------------------------------------------------------------------------------------------


def test_the_bar(monkeypatch, caplog):
    """It shows a mean of the losses, the measured one, the time of a step and memory."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    preparing = [("prior pictures", 1, 2), ("prior pictures", 2, 2), ("encoding", 1, 1)]
    run = SimpleNamespace(
        prepare=lambda: iter(preparing),
        request=SimpleNamespace(settings=SimpleNamespace(steps=5)),
        trainer=SimpleNamespace(step=2),
        group=None,
    )
    event = {
        "kind": "step",
        "step": 3,
        "loss": 0.5,
        "seconds": 0.25,
        "peak_gb": 1.5,
        "measured": None,
        "skipped": False,
    }
    with closing(TrainingProgress(run)) as progress:
        progress.prepare()
        progress(event)
        progress(event | {"step": 4, "loss": None, "skipped": True})
        progress(event | {"step": 5, "loss": 0.7, "measured": 0.25})
    text = terminal.getvalue()
    for words in (
        "prior pictures:",
        "encoding:",
        "training: 100%",
        " 5/5 ",
        "loss 0.5100 (measured 0.2500), 0.25 s, 1.50 GB",
    ):
        assert words in text
    assert "step 4 is skipped" in caplog.text


@pytest.mark.parametrize("shape, side, tflop", [("sd15", 64, 2.4), ("sdxl", 128, 20.3)])
def test_the_time_of_a_step_on_metal_is_predicted_from_its_operations(monkeypatch, shape, side, tflop):
    unet = build("unet", SHAPES[shape]["unet"])
    operations = step_operations(unet, 1, (side, side))
    assert operations == pytest.approx(1e12 * tflop, rel=0.05)
    assert predicted_seconds(operations) is None
    quantize(unet, 8, 64)
    assert step_operations(unet, 1, (side, side)) == operations
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M2 Max"})
    least, most = predicted_seconds(operations)
    assert least == pytest.approx(tflop / 13.6 / 0.6, rel=0.05) and most == pytest.approx(tflop / 13.6 / 0.35, rel=0.05)
