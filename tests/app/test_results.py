"""Where images go: names of every kind, what is refused, what two processes do to each other, and what is kept."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from command_line import names
from stable_diffusion.app.results import FIELDS, NotWrittenError, Outputs

VALUES = {"i": 1, "seed": 7, "prompt": "the red cat", "steps": 20, "cfg": 7.5, "sampler": "dpmpp_2m", "model": "tiny"}
VALUES |= {"width": 64, "height": 72}


def picture(level: int = 0) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, level))


def level(path: Path) -> int:
    with Image.open(path) as image:
        assert image.size == (8, 8)
        return int(np.asarray(image).mean())


def opened(output: str, count: int = 1, overwrite: bool = False) -> Outputs:
    """The outputs of a run of ``count`` images, before their model is read."""
    known = {name: value for name, value in VALUES.items() if name not in ("steps", "cfg")}
    return Outputs(output, [known | {"i": i} for i in range(1, count + 1)], overwrite)


@pytest.fixture
def write(tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """Write ``count`` images, and their grid, as one run does; the names, seen from the folder of the test."""
    monkeypatch.chdir(tmp_path)

    def call(output: str, count: int = 1, grid: bool = False, overwrite: bool = False, **values) -> list[str]:
        images = [VALUES | {"i": i + 1, "seed": 7 + i} | values for i in range(count)]
        outputs = Outputs(output, images, overwrite)
        paths = [outputs.write(picture(i), image) for i, image in enumerate(images)]
        if grid:
            paths.append(outputs.write(picture(99), images[0], "grid"))
        assert [level(path) for path in paths] == [*range(count), *([99] if grid else [])]
        return [str(path) for path in paths]

    return call


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_next_run_has_the_next_number(write):
    assert write("a.webp", 2, grid=True) == ["a_1.webp", "a_2.webp", "a.webp"]
    assert write("a.webp", 2, grid=True) == ["a-2_1.webp", "a-2_2.webp", "a-2.webp"]
    assert write("a.webp", 3)[-1] == "a-3_3.webp"
    assert write("a.webp") == ["a-4.webp"]  # a-3.webp would look like the grid of the run before
    Path("a_1.webp").unlink()
    assert write("a.webp", 1) == ["a-5.webp"]  # a_2.webp is there
    Path("b_1.png").mkdir()
    assert write("b.png", 2)[0] == "b-2_1.png"
    Path("c_2.png").symlink_to("nowhere")
    assert write("c.png", 2) == ["c-2_1.png", "c-2_2.png"]


@pytest.mark.parametrize(
    "left", ["a.png", "a_1.png", "a_17.png", "a_2_partial.png", "a_partial.png", "a_grid_2.png", "A.PNG"]
)
def test_a_file_of_another_run_takes_the_number_of_all(write, left):
    Path(left).write_text("")
    assert write("a.png") == ["a-2.png"] and write("a.png", 2, grid=True)[-1] == "a-3.png"


@pytest.mark.parametrize("left", ["a_old.png", "ab_1.png", "a_1.jpg", "a-2.png", "a-2_1.png", "a_1.png.bak"])
def test_other_files_take_no_number(write, left):
    Path(left).write_text("")
    assert write("a.png") == ["a.png"]


def test_overwriting(write, tmp_path):
    assert write("a.png", 2, grid=True) == write("a.png", 2, grid=True, overwrite=True)
    assert names(tmp_path) == ["a.png", "a_1.png", "a_2.png"]
    # A run does not write over its own images.
    for _ in range(2):
        assert write("{prompt}.png", 3, overwrite=True) == [f"the_red_cat{n}.png" for n in ("", "-2", "-3")]
    assert len(names(tmp_path)) == 6


def test_other_words_follow_the_name(write):
    pattern = opened("{seed}.png", 2)
    assert str(opened("a.png", 3).write(picture(), VALUES | {"i": 3}, "partial")) == "a_3_partial.png"
    assert str(opened("b.png").write(picture(), VALUES, "partial")) == "b_partial.png"
    assert [str(pattern.write(picture(), VALUES, "grid")) for _ in range(2)] == ["7_grid.png", "7_grid-2.png"]


def test_every_field(write):
    (name,) = write("_".join(f"{{{name}}}" for name in FIELDS) + ".png")
    assert re.fullmatch(r"1_7_the_red_cat_20_7\.5_dpmpp_2m_64_72_tiny_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d\.png", name), name
    assert write("{i:03}-{cfg:.2f}-{{x}}.jpg", 2) == ["001-7.50-{x}.jpg", "002-7.50-{x}.jpg"]
    assert write("{cfg}.png", cfg=0) == ["0.png"] and write("{cfg}.png", cfg=5.0) == ["5.png"]


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("../../etc/passwd", "etc_passwd"),
        ("..", "_"),
        ("a\nb\\c\0d\x1b[31m", "a_b_c_d_[31m"),
        ("a\u202egnp.exe", "a_gnp.exe"),
        ("ein Kätzchen, 猫 🐈\u200d⬛", "ein_Kätzchen,_猫_🐈\u200d⬛"),
        ('<>:"|?*', "_"),
        ("-rf {seed}\udcff", "rf_{seed}"),
    ],
)
def test_prompts_as_names(write, tmp_path, prompt, name):
    assert write("{prompt}.png", prompt=prompt) == names(tmp_path) == [f"{name}.png"]


@pytest.mark.parametrize("prompt", ["x" * 5000, "x" + "🐈\u200d⬛" * 999])
def test_long_prompts_are_cut_between_letters(write, prompt):
    (name,) = write("{prompt}.png", prompt=prompt)
    assert 100 < len(name.encode()) <= 124 and prompt.startswith(name.removesuffix(".png"))
    longest = [write("{prompt}{prompt}{prompt}.png", prompt=prompt)[0] for _ in range(12)][-1]
    assert len(longest.encode()) < 255 and longest.endswith("-12.png")


def test_folders(write, tmp_path):
    (tmp_path / "is{here}").mkdir()
    for output, folder in (("is{here}", "is{here}"), ("is{here}/", "is{here}"), ("new/er/", "new/er")):
        (name,) = write(output)
        assert re.fullmatch(rf"{re.escape(folder)}/\d{{4}}-\d\d-\d\d_\d\d-\d\d-\d\d_1_7(-2)?\.png", name), name
    assert re.search(r"_1_7_grid(-2)?\.png$", write("new/er", 2, grid=True)[-1])
    assert write("made/with/a.png", 2, grid=True)[-1] == "made/with/a.png"
    assert write("{model}/{prompt}/{seed}.png", prompt="..") == ["tiny/_/7.png"]
    assert write(f"{tmp_path}/deep/{{i}}.png", 2) == [f"{tmp_path}/deep/{i}.png" for i in (1, 2)]


@pytest.mark.parametrize(
    "output, words",
    [
        ("{sead}.png", ["{sead}", *FIELDS]),
        ("{seed.real}.png", ["{seed.real}"]),
        ("{i:q}.png", ["{i:q}.png", "'q'"]),
        ("{i.png", ["{i.png is not a valid pattern"]),
        ("", ["empty"]),
        ("file/a.png", ["file is a file"]),
        ("pics", ["''", ".png", "pics/ for a folder"]),
        ("a.bmp", ["'.bmp'", ".png, .jpg, .jpeg, .webp"]),
        ("{seed}", ["''", ".png"]),
        ("file/more/{seed}.png", ["file is a file"]),
        ("a" * 300 + ".png", ["could not be written", "another name"]),
    ],
)
def test_refused(tmp_path, monkeypatch, output, words):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    with pytest.raises((ValueError, OSError)) as caught:
        opened(output)
    text = str(caught.value)
    assert not [word for word in words if word not in text] and "\n" not in text, text
    for output in ("new/", "{seed}/{i}.png", "a.png", "new/a.png"):
        opened(output)
    assert names(tmp_path) == ["file"]  # checking makes nothing


# --- others who write ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output, links", [("a.png", True), ("a.png", False), ("{prompt}.png", True), ("n/{i}.png", False)]
)
def test_runs_at_the_same_time_lose_nothing(write, tmp_path, monkeypatch, output, links):
    """Eight runs of five images each, all of which have seen an empty folder."""
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError(1, "Operation not permitted")))

    def work(number: int, outputs: Outputs) -> list[tuple[Path, int]]:
        return [(outputs.write(picture(10 * number + i), VALUES | {"i": i}), 10 * number + i) for i in range(1, 6)]

    with ThreadPoolExecutor(8) as pool:
        written = dict(chain.from_iterable(pool.map(work, range(8), [opened(output, 5) for _ in range(8)])))
    assert len(written) == len([path for path in tmp_path.rglob("*") if path.is_file()]) == 40
    assert all(level(path) == shown for path, shown in written.items())


def test_all_files_of_a_run_have_one_number(write):
    first, second = opened("a.png", 2), opened("a.png", 2)
    assert str(second.write(picture(), VALUES)) == "a_1.png"
    images = [str(first.write(picture(), VALUES | {"i": i})) for i in (1, 2)]
    assert images == ["a-2_1.png", "a-2_2.png"]
    assert str(first.write(picture(), VALUES, "grid")) == "a-2.png"
    assert str(second.write(picture(), VALUES, "grid")) == "a.png"


# --- what cannot be written ------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder with a new current folder and a new one for temporary files."""
    (tmp_path / "current").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path


def lost(outputs: Outputs, message: str) -> Path | None:
    """Fail to write a picture; returns where it is kept."""
    with pytest.raises(NotWrittenError, match=message) as caught:
        outputs.write(picture(5), VALUES)
    assert caught.value.kept is None or level(caught.value.kept) == 5
    return caught.value.kept


def test_an_image_is_kept_in_the_current_folder_or_else_in_the_temporary_one(elsewhere):
    (elsewhere / "out").mkdir()
    gone, taken, here = opened(f"{elsewhere}/out/a.png", 2), opened("new/{seed}.png"), opened("a.png")
    (elsewhere / "out").rmdir()
    message = r"out does not exist.*; the image is saved as .*current/a_1(-2)?\.png"
    assert [lost(gone, message).name for _ in range(2)] == ["a_1.png", "a_1-2.png"]
    assert names(elsewhere) == ["current", "temporary"]
    Path("new").write_text("")
    assert lost(taken, r"folder new cannot be created.*saved as .*current/7\.png")
    shutil.rmtree(elsewhere / "current")
    assert lost(here, r"saved as .*temporary/a\.png")


def test_an_image_that_nothing_takes_is_lost_and_leaves_nothing(elsewhere, monkeypatch):
    def full(self, file, **options):
        file.write(b"half of a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert lost(opened("a.png"), r"No space left on device.*; the image is lost") is None
    assert [names(folder) for folder in elsewhere.iterdir()] == [[], []]
