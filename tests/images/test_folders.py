"""A folder of pictures is read in every form that trainers know, and each file that cannot be used has one line."""

import json
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stable_diffusion.images.files import open_image
from stable_diffusion.images.folders import read_pictures


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16), mode: str = "RGB", **options) -> Path:
    """Write a picture that no other seed has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def write(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def rows(*entries: dict) -> str:
    return "\n".join(json.dumps(entry) for entry in entries) + "\n"


def read(folder: Path, **options) -> dict[str, tuple[str, int]]:
    """Read a folder without a faulty file: the caption and the repeats of each picture."""
    pictures, lines = read_pictures(folder, 16, **options)
    assert lines == []
    return {picture.path.relative_to(folder).as_posix(): (picture.caption, picture.repeats) for picture in pictures}


FORMS = {  # files beside a.png and b.JPG, options, and the captions
    "text files": ({"a.txt": "one", "b.TXT": " two\nlines "}, {}, ("one", "two lines")),
    "kohya's captions": ({"a.caption": "one", "b.JPG.txt": "two"}, {}, ("one", "two")),
    "both": ({"a.caption": "no", "a.txt": "one", "b.txt": ""}, {}, ("one", "")),
    "UTF-16": ({"a.txt": "ünö".encode("utf-16"), "b.txt": "dué".encode("utf-8-sig")}, {}, ("ünö", "dué")),
    "diffusers": (
        {"metadata.jsonl": rows({"file_name": "a.png", "text": "one"}, {"file_name": "./b.JPG", "text": "two"})},
        {},
        ("one", "two"),
    ),
    "mlx-examples": (
        {"train.jsonl": "\ufeff" + rows({"image": "a.png", "prompt": "one"}, {"image": "b.JPG", "prompt": "two"})},
        {},
        ("one", "two"),
    ),
    "--caption": ({"a.txt": "one"}, {"caption": "two"}, ("one", "two")),
    "--trigger": (
        {"a.txt": "an OHWX, red", "b.txt": "ohwxen myohwx (red:1.5)"},
        {"trigger": "ohwx"},
        ("an OHWX, red", "ohwx, ohwxen myohwx (red:1.5)"),
    ),
    "--trigger alone": ({"b.txt": ""}, {"trigger": "c++"}, ("c++", "c++")),
    "--trigger of signs": ({"a.txt": "c++ code", "b.txt": "c code"}, {"trigger": "c++"}, ("c++ code", "c++, c code")),
    "both options": ({}, {"trigger": "ohwx", "caption": "a dog"}, ("ohwx, a dog", "ohwx, a dog")),
}


@pytest.mark.parametrize("form", FORMS)
def test_captions_are_read_in_every_form(tmp_path, form):
    files, options, captions = FORMS[form]
    draw(tmp_path / "a.png", 1)
    draw(tmp_path / "b.JPG", 2)
    for name, content in files.items():
        write(tmp_path, name, content)
    assert read(tmp_path, **options) == {"a.png": (captions[0], 1), "b.JPG": (captions[1], 1)}


def test_folders_have_repeats_and_names_as_captions(tmp_path):
    draw(tmp_path / "a.png", 0)
    draw(tmp_path / "10_ohwx dog" / "a.png", 1)
    draw(tmp_path / "10_ohwx dog" / "b.png", 2)
    write(tmp_path, "10_ohwx dog/b.txt", "a dog asleep")
    draw(tmp_path / "10_ohwx dog" / "more" / "c.png", 3)
    draw(tmp_path / "10_ohwx dog" / "more" / "2_cat" / "d.png", 4)
    draw(tmp_path / "2024_holiday" / "e.png", 5)
    draw(tmp_path / "3_x" / "e.png", 6)
    write(tmp_path, "3_x/metadata.jsonl", rows({"file_name": "e.png"}))
    draw(tmp_path / "sub" / "f.png", 7)
    draw(tmp_path / ".hidden" / "g.png", 8)
    draw(tmp_path / "._a.png", 9)
    assert read(tmp_path, caption="other") == {
        "a.png": ("other", 1),
        "10_ohwx dog/a.png": ("ohwx dog", 10),
        "10_ohwx dog/b.png": ("a dog asleep", 10),
        "10_ohwx dog/more/c.png": ("ohwx dog", 10),
        "10_ohwx dog/more/2_cat/d.png": ("cat", 2),
        "2024_holiday/e.png": ("other", 1),
        "3_x/e.png": ("x", 3),
        "sub/f.png": ("other", 1),
    }


def test_a_list_names_pictures_in_sub_folders(tmp_path):
    draw(tmp_path / "sub" / "a.png", 1)
    draw(tmp_path / "sub" / "b.png", 2)
    write(tmp_path, "metadata.jsonl", rows({"file_name": "sub/a.png", "text": "one"}))
    write(tmp_path, "sub/b.txt", "two")
    assert read(tmp_path) == {"sub/a.png": ("one", 1), "sub/b.png": ("two", 1)}


def test_links_to_pictures_are_followed(tmp_path):
    draw(tmp_path / "elsewhere" / "a.png", 1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "b.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    assert read(tmp_path / "photos", caption="") == {"b.png": ("", 1)}


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "I;16", "EXIF", "animation"])
def test_every_form_of_picture_is_read_as_elsewhere(tmp_path, mode):
    path, exif = tmp_path / ("a.jpg" if mode in ("CMYK", "EXIF") else "a.gif" if mode == "animation" else "a.png"), {}
    if mode == "I;16":
        Image.fromarray((np.arange(320) * 200).astype(np.uint16).reshape(16, 20)).save(path)
    elif mode == "animation":
        frames = [Image.new("RGB", (20, 16), colour) for colour in ("red", "blue")]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    else:
        exif = {"exif": Image.Exif()} if mode == "EXIF" else {}
        if exif:
            exif["exif"][0x0112] = 6  # turned by 90 degrees
        draw(path, mode="RGB" if mode == "EXIF" else mode, **exif)
    (picture,), _ = read_pictures(tmp_path, 16, caption="")
    assert picture.size == open_image(path).size == ((16, 20) if mode == "EXIF" else (20, 16))


def messy(folder: Path) -> set[str]:
    """Fill a folder with three good pictures and every kind of bad input; returns the names of what is bad."""
    for seed, name in enumerate(("good.png", "latin.png", "uncaptioned.png", "long.png")):
        draw(folder / name, seed)
    whole = draw(folder / "source.jpg", 9, (64, 64)).read_bytes()
    (folder / "source.jpg").unlink()
    write(folder, "good.txt", "a good one")
    write(folder, "latin.txt", "na\xefve".encode("latin-1"))
    write(folder, "orphan.txt", "nobody's")
    write(folder, "long.txt", "word " * 2_500_000)
    write(folder, "empty.png", b"")
    write(folder, "truncated.JPG", whole[:700])
    write(folder, "text.jpeg", "a letter")
    write(folder, "photo.HEIC", b"\0\0\0\x18ftypheic" + bytes(50))
    write(folder, "drawing.svg", "<svg></svg>")
    write(folder, "clip.mp4", b"\0\0\0\x18ftypisom" + bytes(50))
    size = (60_000).to_bytes(4)
    chunks = (b"IHDR" + size + size + b"\x08\x02\0\0\0", b"IDAT" + zlib.compress(bytes(99)), b"IEND")
    chunks = ((len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4) for chunk in chunks)
    write(folder, "bomb.png", b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    draw(folder / "small.png", 10, (9, 6))
    draw(folder / "twin.bmp", 0)
    write(folder, "twin.txt", "the good one again")
    os.mkfifo(folder / "pipe.png")
    (folder / "dangling.png").symlink_to(folder / "nothing")
    (folder / "linked").symlink_to(folder)
    draw(folder / "0_off" / "off.png", 11)
    draw(folder / "listed" / "fine.png", 12)
    draw(folder / "listed" / "unlisted.png", 13)
    listed = rows({"file_name": "fine.png", "text": "fine"}, {"file_name": "missing.png", "text": "x"})
    listed += rows({"file_name": "../outside.png", "text": "x"}, {"text": "nameless"}, {"file_name": "fine.png"})
    write(folder, "listed/metadata.jsonl", listed + "{no JSON\n\n" + rows({"file_name": "many.png", "text": ["x"]}))
    draw(folder / "broken" / "own.png", 14)
    write(folder, "broken/own.txt", "its own")
    write(folder, "broken/train.jsonl", b"\xff\xfe\xff")
    bad = {"latin.txt", "uncaptioned.png", "orphan.txt", "long.txt", "empty.png", "truncated.JPG", "text.jpeg"}
    bad |= {"photo.HEIC", "drawing.svg", "clip.mp4", "bomb.png", "small.png", "twin.bmp", "pipe.png", "dangling.png"}
    bad |= {"linked", "0_off", "unlisted.png", "missing.png", "outside.png", "train.jsonl"}
    return bad | {f"line {number} of " for number in (4, 5, 6, 8)}


def test_a_messy_folder_has_each_file_named_once(tmp_path):
    bad = messy(tmp_path / "photos")
    pictures, lines = read_pictures(tmp_path / "photos", 16)
    assert {(p.path.name, p.caption) for p in pictures} == {
        ("good.png", "a good one"),
        ("fine.png", "fine"),
        ("own.png", "its own"),
    }
    assert len(lines) == len(bad)
    for name in bad:
        found = [line for line in lines if re.search(rf"(^|[/ ]){re.escape(name)}", line)]
        assert len(found) == 1, (name, found)
    assert any("bomb.png is too large" in line for line in lines)
    for line in lines:
        assert "\n" not in line and len(line.replace(str(tmp_path), "")) <= 300, line


@pytest.mark.parametrize("case", ["missing", "file", "empty", "uncaptioned", "damaged"])
def test_a_folder_without_a_usable_picture_is_one_error(tmp_path, case):
    folder = tmp_path / "photos"
    if case == "file":
        write(tmp_path, "photos", "")
    elif case != "missing":
        folder.mkdir()
    if case == "uncaptioned":
        draw(folder / "a.png", 1)
    elif case == "damaged":
        write(folder, "a.png", b"\x89PNG")
        write(folder, "b.png", b"")
    with pytest.raises(ValueError, match={"damaged": r"b\.png.*and 1 more"}.get(case, "photos")) as caught:
        read_pictures(folder, 16)
    assert "\n" not in str(caught.value)


def test_too_small_is_by_area(tmp_path):
    draw(tmp_path / "a.png", 1, (32, 32))
    draw(tmp_path / "b.png", 2, (128, 8))
    draw(tmp_path / "c.png", 3, (31, 33))
    pictures, lines = read_pictures(tmp_path, 64, caption="")
    assert [picture.path.name for picture in pictures] == ["a.png", "b.png"]
    assert lines[0].startswith(f"{tmp_path / 'c.png'} has 31x33 pixels, too few for 64x64")
