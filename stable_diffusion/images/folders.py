"""Read a folder of pictures with captions, and report each file that cannot be used with the reason."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..files.text import parse_json, read_text
from .files import open_image

_READ = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")
_REFUSED = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".ico", ".exr", ".pdf", ".eps", ".mp4", ".mov")
_CAPTIONS = (".txt", ".caption")  # beside a picture, as in kohya's scripts and mflux
_LISTS = ("metadata.jsonl", "train.jsonl")  # of diffusers, of mlx-examples
_EXAMPLE = json.dumps({"file_name": "a.jpg", "text": "a photo of a cat"})
_REPEATS = re.compile(r"(\d{1,3})_(.+)")
_LARGEST_SCALE = 2.0  # most that a picture may be enlarged
_THREADS = 4  # decoding threads; Pillow lets them run in parallel


@dataclass(frozen=True)
class Picture:
    """Describe a picture: file, caption, repeats per epoch, size (width, height), and hash of its pixels."""

    path: Path
    caption: str | None
    repeats: int = 1
    size: tuple[int, int] = (0, 0)
    digest: str = ""


def read_pictures(
    folder: Path, resolution: int, *, caption: str | None = None, trigger: str | None = None
) -> tuple[list[Picture], list[str]]:
    """Read the pictures in a folder, and one line about each file that is omitted.

    A caption is in a text file with the picture's name, in metadata.jsonl (``file_name`` and ``text``) or in
    train.jsonl (``image`` and ``prompt``). A folder ``10_name`` is repeated 10 times in an epoch, and its name is the
    caption of pictures without one. Of pictures with the same pixels only the first is used.

    Args:
        folder: the folder, which is searched with all its sub-folders, except hidden ones and links.
        resolution: side in pixels of a square with the training area; a quarter of this area is enough.
        caption: caption of pictures without one.
        trigger: word that is put before each caption that lacks it.

    Raises ValueError, one line, for a folder without usable pictures.
    """
    if not folder.is_dir():
        raise ValueError(f"the picture folder {folder} does not exist; check the path")
    pictures, lines = [], []
    default = caption if caption is not None or trigger is None else ""
    entries, seen = list(_entries(folder, Picture(folder, default), set(), lines)), {}
    pool = ThreadPoolExecutor(_THREADS)
    try:
        with warnings.catch_warnings():  # the one of ``open_image`` is not safe in threads by itself
            warnings.simplefilter("ignore")
            for future in [pool.submit(_open, entry, resolution) for entry in entries]:
                try:
                    picture = future.result()
                    if (first := seen.setdefault(picture.digest, picture.path)) != picture.path:
                        raise ValueError(f"{picture.path} is the same picture as {first.name}")
                    pictures.append(replace(picture, caption=_with_trigger(picture.caption, trigger)))
                except ValueError as error:
                    lines.append(f"{error}; it is omitted")
    finally:
        pool.shutdown(cancel_futures=True)
    if not pictures:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        reason = f": {lines[-1]}{more}" if lines else "; it needs PNG, JPEG or WebP files"
        raise ValueError(f"no picture in {folder} can be used{reason}")
    return pictures, lines


def _open(entry: Picture, resolution: int) -> Picture:
    """Decode a picture for its size and hash. Raises ValueError if it is damaged, too small or has no caption.

    Its pixels are not kept, since thousands of pictures do not fit into memory.
    """
    image = open_image(entry.path)
    width, height = image.size
    if width * height * _LARGEST_SCALE**2 < resolution**2:
        raise ValueError(f"{entry.path} has {width}x{height} pixels, too few for {resolution}x{resolution}")
    if entry.caption is None:
        raise ValueError(f"{entry.path} has no caption; write {entry.path.stem}.txt beside it")
    digest = hashlib.sha256(f"{width} {height} ".encode())
    digest.update(image.tobytes())
    return replace(entry, size=(width, height), digest=digest.hexdigest())


def _with_trigger(caption: str, trigger: str | None) -> str:
    """Return a caption in one line, with the trigger first unless it already contains this whole word."""
    words = " ".join(caption.split())
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", words, re.IGNORECASE):
        return words
    return f"{trigger}, {words}" if words else trigger


def _entries(folder: Path, default: Picture, named: set[str], lines: list[str]) -> Iterator[Picture]:
    """Iterate over the pictures of a folder, not opened yet, with their captions and repeats.

    ``default`` has the caption for pictures without one, and the repeats; ``named`` collects the files of lists.
    """
    if match := _REPEATS.fullmatch(folder.name):
        default = replace(default, repeats=int(match[1]), caption=match[2])
    try:
        files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    except OSError as error:
        lines.append(f"{folder} cannot be read ({error.strerror}); it is omitted")
        return
    if default.repeats == 0:
        lines.append(f"{folder} is omitted, because its name says 0 repeats")
        return
    images = [file for file in files if file.suffix.lower() in _READ + _REFUSED and not file.is_dir()]
    texts = {file.stem: file for suffix in _CAPTIONS[::-1] for file in files if file.suffix.lower() == suffix}
    names = {name for image in images for name in (image.stem, image.name)}  # also a.jpg.txt
    lines += [f"{text} is a caption without a picture" for stem, text in texts.items() if stem not in names]
    lists = [file for file in files if file.name in _LISTS]
    pairs: list[tuple[Path, Path | str | None]] = [pair for file in lists for pair in _listed(file, named, lines)]
    rest = [image for image in images if os.path.abspath(image) not in named]
    if pairs:
        lines += [f"{image} is omitted: {lists[0].name} does not name it" for image in rest]
    for image, text in pairs or [(image, texts.get(image.stem, texts.get(image.name))) for image in rest]:
        try:
            caption = read_text(text) if isinstance(text, Path) else text
            yield replace(default, path=image, caption=default.caption if caption is None else caption)
        except (OSError, ValueError) as error:
            lines.append(f"{error}; {image.name} is omitted")
    for child in (file for file in files if file.is_dir()):
        if child.is_symlink():
            lines.append(f"{child} is a link to a folder and is omitted; move the pictures here")
        else:
            yield from _entries(child, default, named, lines)


def _listed(listing: Path, named: set[str], lines: list[str]) -> Iterator[tuple[Path, str | None]]:
    folder = os.path.abspath(listing.parent)
    try:
        rows = read_text(listing).split("\n")
    except (OSError, ValueError) as error:
        lines.append(f"{error}; this list is ignored")
        return
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        where = f"line {number} of {listing}"
        try:
            entry = parse_json(row, where)
            name = next((entry[key] for key in ("file_name", "image", "file") if key in entry), None)
            caption = next((entry[key] for key in ("text", "prompt", "caption") if key in entry), None)
            if not isinstance(name, str) or not isinstance(caption, str | None):
                raise ValueError(f"{where} has no name or no text; write it like {_EXAMPLE}")
            path = os.path.abspath(os.path.join(folder, name))
            if not Path(path).is_relative_to(folder):
                raise ValueError(f"{where} names {name:.80}, which is outside of the folder; move it into the folder")
            if path in named:
                raise ValueError(f"{where} names {name:.80} again; the second line is omitted")
        except ValueError as error:
            lines.append(str(error))
        else:
            named.add(path)
            yield listing.parent / name, caption
