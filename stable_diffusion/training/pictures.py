"""Find the pictures of a training and their captions, and say of each file that cannot be used why."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..images.files import open_image
from ..models.config import parse_json, read_text

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".ppm"}
_CAPTIONS = (".txt", ".caption")  # beside a picture, as kohya's scripts and mflux read them
_LISTS = ("metadata.jsonl", "train.jsonl")  # of diffusers, of mlx-examples
_REPEATS = re.compile(r"(\d{1,4})_(.*)")
_LARGEST_SCALE = 2.0  # by which a picture may be enlarged


@dataclass(frozen=True)
class Picture:
    """Describe a picture: file, caption, how often an epoch shows it, size (width, height), and hash of its pixels."""

    path: Path
    caption: str | None
    repeats: int = 1
    size: tuple[int, int] = (0, 0)
    digest: str = ""


def read_pictures(
    folder: Path, resolution: int, *, caption: str | None = None, trigger: str | None = None
) -> tuple[list[Picture], list[str]]:
    """Read the pictures in a folder for a training, and a line about each file that is left out or changed.

    A caption is in the text file of the picture's name, or in metadata.jsonl (``file_name`` and ``text``) or
    train.jsonl (``image`` and ``prompt``). A folder ``10_name`` is shown 10 times in an epoch, and its name is the
    caption of pictures without one.

    Args:
        folder: searched with all its sub-folders, but for hidden ones.
        resolution: side of a square of the area in pixels at which is trained.
        caption: of pictures without one.
        trigger: word that is put before each caption that lacks it.

    Raises ValueError, one line, for a folder without a picture that can be used.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} with pictures; check the path")
    pictures, lines = [], []
    seen: dict[str, Path] = {}
    for entry in _entries(folder, lines):
        picture = _checked(entry, resolution, seen, lines)
        if picture is None:
            continue
        text = picture.caption if picture.caption is not None else caption
        if text is None and trigger is None:
            lines.append(f"{picture.path} has no caption and is left out; write {picture.path.stem}.txt beside it")
            continue
        words = " ".join((text or "").split())
        if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", words, re.IGNORECASE):
            words = f"{trigger}, {words}" if words else trigger
        pictures.append(replace(picture, caption=words))
    if not pictures:
        first = f": {lines[0]}" if lines else "; it needs PNG, JPEG or WebP files"
        raise ValueError(f"no picture in {folder} can be used{first}")
    return pictures, lines


def _entries(folder: Path, lines: list[str]) -> Iterator[Picture]:
    """Iterate over the pictures of a folder, not opened yet, each with its own caption."""
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    if listing := next((file for file in files if file.name in _LISTS), None):
        yield from _listed(listing, files, lines)
    else:
        match = _REPEATS.fullmatch(folder.name)
        repeats, name = (max(int(match[1]), 1), match[2]) if match else (1, None)
        for file in files:
            if file.suffix.lower() in _SUFFIXES and file.is_file():
                caption = name
                for text in (file.with_suffix(suffix) for suffix in _CAPTIONS):
                    if text.is_file():
                        try:
                            caption = read_text(text)
                        except ValueError as error:
                            lines.append(f"{error}; the caption of {file.name} is left out")
                yield Picture(file, caption, repeats)
    for child in files:
        if child.is_dir() and not child.is_symlink():
            yield from _entries(child, lines)


def _listed(listing: Path, files: list[Path], lines: list[str]) -> Iterator[Picture]:
    """Iterate over the pictures that a list names; others in its folder are said to be left out."""
    folder, named = listing.parent.resolve(), set()
    for number, line in enumerate(read_text(listing).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {listing}"
        try:
            entry: dict[str, Any] = parse_json(line, where)
        except ValueError as error:
            lines.append(str(error))
            continue
        name = next((entry[key] for key in ("file_name", "image", "file") if key in entry), None)
        caption = next((entry[key] for key in ("text", "prompt", "caption") if key in entry), None)
        if not isinstance(name, str) or not isinstance(caption, str | None):
            lines.append(f"{where} names no picture; it needs file_name and text, such as {json.dumps(_EXAMPLE)}")
        elif not (path := folder / name).resolve().is_relative_to(folder):
            lines.append(f"{where} names {name:.80}, which is outside of the folder; move it into the folder")
        else:
            named.add(path.resolve())
            yield Picture(listing.parent / name, caption)
    for file in files:
        if file.suffix.lower() in _SUFFIXES and file.resolve() not in named:
            lines.append(f"{file} is left out: {listing.name} does not name it")


_EXAMPLE = {"file_name": "a.jpg", "text": "a photo of a cat"}


def _checked(entry: Picture, resolution: int, seen: dict[str, Path], lines: list[str]) -> Picture | None:
    """Open a picture. Returns None, with a line, for one that is damaged, too small or shown already."""
    try:
        image = open_image(entry.path)
    except ValueError as error:
        lines.append(f"{error}; it is left out")
        return None
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    width, height = image.size
    if width * height * _LARGEST_SCALE**2 < resolution**2:
        needed = f"{resolution}x{resolution} pixels are trained on"
        lines.append(f"{entry.path} is left out: it has {width}x{height} pixels, and {needed}; find a larger one")
    elif digest in seen:
        lines.append(f"{entry.path} is left out: it is the same picture as {seen[digest]}; remove one of them")
    else:
        seen[digest] = entry.path
        return replace(entry, size=(width, height), digest=digest)
    return None
