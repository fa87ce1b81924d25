"""The files of a run: images as soon as they are finished, their grid, and a record of each for programs.

========================= =========================== =========== ========================
output                    images                      grid        of the next run
========================= =========================== =========== ========================
``cat.png``, one image    cat.png                                 cat-2.png
``cat.png``, several      cat_1.png, cat_2.png, ...   cat.png     cat-2_1.png, ..., cat-2.png
``{seed}.png``, a pattern 7.png, 8.png, ...           7_grid.png  7-2.png, ..., 7_grid-2.png
``cats/``, a folder       by the pattern ``{date}_{time}_{i}_{seed}.png`` in it
========================= =========================== =========== ========================

A run takes the next number if any file of another run has its number: after cat_1.png, ..., cat_3.png without a grid, a
single image is cat-2.png. Only a finished file occupies its name, so two processes may write into one folder.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from string import Formatter
from typing import Any

from PIL.Image import Image, frombytes, new

from ..diffusion.choice import guidance_scale
from ..images.files import SUFFIXES, WHITE, check_output, save
from ..images.image import grid
from ..lora.folders import fold
from ..pipeline import StableDiffusion
from .engine import Result
from .fingerprints import fingerprint
from .metadata import describe
from .plots import compare, draw
from .request import Request

_log = logging.getLogger("stable_diffusion")

Written = dict[str, Any]  # the record of a file, for programs

FIELDS = ("i", "seed", "prompt", "steps", "cfg", "sampler", "width", "height", "model", "date", "time")

_IN_A_FOLDER = "{date}_{time}_{i}_{seed}.png"
# Fields that only the model knows, before it is read.
_UNKNOWN = {"steps": 0, "cfg": 0.0, "sampler": "", "width": 0, "height": 0}
_LONGEST_FIELD, _LONGEST_NAME = 120, 220  # bytes: file systems end at 255, and marks and numbers follow
# Characters that some file systems refuse, blanks, and marks that change the direction of text.
_UNSAFE = re.compile(r"[\0-\x20\x7f-\xa0<>:\"/\\|?*\ud800-\udfff\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+")
_EDGES = " ._-\u200d"  # a name that begins or ends with these would be hidden or look like a flag


@dataclass(frozen=True)
class OutputSettings:
    """Hold the path and the format of images. ``output`` is a file, a folder or a pattern, see :class:`Outputs`."""

    output: str = "out.png"
    overwrite: bool = False
    no_grid: bool = False
    n_rows: int = 1
    quality: int | None = None
    no_metadata: bool = False
    full_paths: bool = False
    safety_check: bool = False
    safety_model: str | None = None


@dataclass(frozen=True)
class _Made:
    """Hold the record of a finished image, and its pixels if they are needed again."""

    record: Written
    text: dict[str, str] | None
    image: Image | None


class ResultWriter:
    """Write the images of ``requests``, one image each, and their grid, which has the first image's record.

    The constructor checks the output paths: raises ValueError or OSError, one line, before any work. ``error`` keeps
    the first failure to write an image; all other images are still written.
    """

    def __init__(self, requests: Sequence[Request], settings: OutputSettings, began: datetime | None = None):
        self._requests, self._settings = requests, settings
        self._fields = []  # of each image: the fields of its name that the request decides
        for i, request in enumerate(requests, start=1):
            model = re.sub(r"\.(safetensors|ckpt)$", "", Path(request.model).name)
            fields = {"i": i, "seed": request.seed, "prompt": request.text, "model": model}
            chosen = {name: value for name in _UNKNOWN if (value := request.value(name)) is not None}
            self._fields.append(fields | chosen)
        if settings.n_rows > 1 and (settings.no_grid or len(requests) == 1):
            _log.warning("n_rows %d has no effect: no grid is drawn", settings.n_rows)
        self._outputs = Outputs(settings.output, self._fields, settings.overwrite, began)
        self._made: dict[int, _Made] = {}  # by the number of the image
        self.draws_grid = self.keeps_images = len(requests) > 1 and not settings.no_grid
        self.error: OSError | None = None
        self.is_flagged: Callable[[Image], bool] | None = None  # by the safety check
        self.withheld: set[int] = set()  # numbers of flagged images, which are not written

    def choose_numbers(self, gather: Callable[[bytes], list[bytes]]) -> None:
        """Choose the numbers in all file names together with the other ranks, before any image is written.

        ``gather`` is that of :class:`stable_diffusion.app.sharing.Ranks`. Each number is free on all ranks.
        """
        lowest: list[int] = []
        while True:
            numbers = self._outputs.free_numbers(lowest)
            of_all = [json.loads(data) for data in gather(json.dumps(numbers).encode())]
            if of_all.count(numbers) == len(of_all):
                break
            lowest = [max(of_image) for of_image in zip(*of_all, strict=True)]
        self._outputs.numbers = numbers

    def add(self, result: Result, model: StableDiffusion, number: int) -> Iterator[Written]:
        """Write an image, the given ``number`` of ``requests``.

        ``model`` is the one of the request, even if a refiner finished the image.
        """
        request, image, settings = result.request, result.image, self._settings
        chosen = result.batch.defaults
        cfg = guidance_scale(request.options.sampler or chosen.sampler, None, chosen.cfg_weight)
        defaults = {"steps": chosen.num_steps, "cfg": cfg, "sampler": chosen.sampler}
        fields = defaults | self._fields[number] | {"width": image.width, "height": image.height}
        if self.is_flagged is not None and self.is_flagged(image):
            self._withhold(number, image.size)
            return
        mark = "partial" if result.partial else ""
        text = None
        if not settings.no_metadata:
            text = describe(model, result.batch, result.index, result.partial, settings.full_paths)
        try:
            path = self._outputs.write(image, fields, mark, text=text, quality=settings.quality)
        except NotWrittenError as error:
            self.error, path = self.error or error, error.kept
        record = {"kind": mark or "image", "path": str(path)} | fields
        record |= {"negative_prompt": request.negative_prompt, "seconds": result.seconds}
        record |= {"partial": result.partial} if result.partial else {}
        self._made[number] = _Made(record, text, image if self.keeps_images else None)
        if path is not None:
            yield record

    def _withhold(self, number: int, size: tuple[int, int]) -> None:
        """Replace a flagged image by a white one without a file."""
        self.withheld.add(number)
        self._made[number] = _Made({"path": None}, None, new("RGB", size, WHITE) if self.keeps_images else None)

    def gather(self, gather: Callable[[bytes], list[bytes]], is_first: bool) -> Iterator[Written]:
        """Send all images to the first rank, which writes those that are not on its disk. All ranks call it.

        ``gather`` is that of :class:`stable_diffusion.app.sharing.Ranks`: each call sends one image of each rank.
        """
        own = sorted(self._made)
        for i in count():
            parts = gather(self._packed(own[i]) if i < len(own) else b"")
            if not any(parts):
                return
            for part in filter(None, parts if is_first else ()):
                yield from self._unpack(part)

    @property
    def has_all(self) -> bool:
        """Return whether this rank has all images, generated or gathered."""
        return len(self._made) == len(self._requests)

    def _packed(self, number: int) -> bytes:
        """Return an image of this rank as bytes for :meth:`_unpack`."""
        made = self._made[number]
        header = {"number": number, "record": made.record, "text": made.text, "size": made.image.size}
        header |= {"file": {} if number in self.withheld else fingerprint(Path(made.record["path"]))}
        return json.dumps(header).encode() + b"\n" + made.image.tobytes()

    def _unpack(self, data: bytes) -> Iterator[Written]:
        """Write an image of another rank, unless that file is on this disk too."""
        header, _, pixels = data.partition(b"\n")
        values = json.loads(header)
        if (number := values["number"]) in self._made:
            return
        if values["record"]["path"] is None:
            return self._withhold(number, tuple(values["size"]))
        record, text, image = values["record"], values["text"], frombytes("RGB", tuple(values["size"]), pixels)
        self._made[number] = _Made(record, text, image)
        if values["file"] and values["file"] == fingerprint(Path(record["path"])):
            return
        mark = record["kind"].replace("image", "")
        record["path"] = str(self._outputs.write(image, record, mark, text=text, quality=self._settings.quality))
        yield record

    def finish(self) -> Iterator[Written]:
        """Draw the grids: those that compare swept settings, or the grid of several images of one size."""
        if not self.draws_grid or not self.has_all:
            return
        n_rows, made = self._settings.n_rows, [self._made[number] for number in range(len(self._requests))]
        plots, images = compare(self._requests), [one.image for one in made]
        grids = ((draw(plot, images, n_rows), sorted(plot.cells.values())) for plot in plots)
        if not plots and len({image.size for image in images}) > 1:
            _log.warning("no grid is drawn: the images differ in size")
        elif not plots:
            grids = iter([(grid(images, n_rows), range(len(images)))])
        for number, (image, numbers) in enumerate(grids, start=1):
            shown = [i for i in numbers if i not in self.withheld]
            if image is not None and shown:
                mark = "grid" if number == 1 else f"grid_{number}"
                options = {"text": made[shown[0]].text, "quality": self._settings.quality}
                path = self._outputs.write(image, made[shown[0]].record, mark, **options)
                record = {"kind": "grid", "path": str(path), "width": image.width, "height": image.height}
                yield record | {"images": [made[i].record["path"] for i in shown]}


def line_of(record: Written) -> str:
    """Return the line about a file for people: its path, and the seed of an image."""
    line = f"{record['path']} seed {record['seed']}" if "seed" in record else record["path"]
    return f"{line} partial: {record['partial']}" if "partial" in record else line


# --- names -----------------------------------------------------------------------------------------------------------


class NotWrittenError(OSError):
    """Report an image that could not be written. ``kept`` is its path instead, None if the image is lost."""

    def __init__(self, reason: Exception, kept: Path | None):
        super().__init__(f"{reason}; " + ("the image is lost" if kept is None else f"the image is saved as {kept}"))
        self.kept = kept


class Outputs:
    """Write the images of a run under names made from ``output``.

    Args:
        output: a file; a folder, which exists or ends in a slash; or a pattern with ``FIELDS`` in braces, with format
            specifications if needed, such as ``{i:03}``. Missing folders are created with the first image.
        images: the known fields of each, without date and time.
        began: when the run began, for {date} and {time}; None is now.
        overwrite: replace existing files, except those of this run. By default the next free number is added: if
            ``output`` is a file, one number for all files of the run, unused by other runs; else one for each file.

    Raises ValueError or OSError, one line with the remedy, for an unknown field and paths that are not writable.
    """

    def __init__(
        self,
        output: str,
        images: Sequence[Mapping[str, Any]],
        overwrite: bool = False,
        began: datetime | None = None,
    ):
        output = os.path.expanduser(output)
        if not output.strip():
            raise ValueError("the output path is empty; give one like image.png")
        is_folder = os.path.isdir(output)
        if is_folder:  # its braces are part of its name
            output = output.replace("{", "{{").replace("}", "}}")
        if is_folder or output.endswith(os.sep):
            output = os.path.join(output, _IN_A_FOLDER)
        elif Path(output).suffix.lower() not in SUFFIXES:
            known = f"choose one of {', '.join(SUFFIXES)}, or {output}/ for a folder"
            raise ValueError(f"the output {output} has the suffix {Path(output).suffix!r}; {known}")
        self._output, self._several, self._overwrite = output, len(images) > 1, overwrite
        self._is_pattern = "{" in output or "}" in output
        self._began = began or datetime.now()
        self.numbers: Sequence[int] = ()  # of the images, if chosen together with other ranks
        self._written: set[str] = set()
        self._images = [_UNKNOWN | dict(fields) for fields in images]
        try:
            paths = [self._path(fields) for fields in self._images]
        except ValueError as error:
            raise ValueError(f"the output {output} is not a valid pattern: {error}") from None
        for path in paths if self._is_pattern else [Path(output), *paths]:
            folder = next(parent for parent in path.parents if os.path.lexists(parent))
            if not os.path.isdir(folder):
                raise ValueError(f"the output folder {folder} is a file; choose another name")
            is_taken = not overwrite and os.path.isdir(folder / path.name)  # the next number is free
            check_output(folder / (f"another{path.suffix}" if is_taken else path.name))
        self._makes_folder = self._is_pattern or not os.path.isdir(path.parent)
        if self._makes_folder and not self._is_pattern:
            _log.warning("the folder %s does not exist: it is created with the first image", path.parent)
        self._folder = path.parent
        self._number = 1 if self._is_pattern or overwrite else self._first_free()

    def free_numbers(self, lowest: Sequence[int] = ()) -> list[int]:
        """Return the first free number of each image, from ``lowest`` on; for a file, the number of the run."""
        if not self._is_pattern:
            self._number = self._first_free(*lowest) if not self._overwrite else 1
            return [self._number]
        numbers, taken = [], set()
        for fields, first in zip(self._images, lowest or [1] * len(self._images), strict=True):
            for number in count(first):
                path = self._path(fields, number=number)
                if fold(str(path)) not in taken and (self._overwrite or not os.path.lexists(path)):
                    break
            numbers.append(number)
            taken.add(fold(str(path)))
        return numbers

    def _first_free(self, lowest: int = 1) -> int:
        """Return the first number without a file of any run: a single image would look like another's grid."""
        stem, suffix = (re.escape(fold(part)) for part in os.path.splitext(os.path.basename(self._output)))
        of_a_run = re.compile(rf"{stem}(?:-(\d+))?(?:_(?:grid_)?\d+)?(?:_partial)?{suffix}")
        with suppress(OSError):  # a new folder, or one that cannot be listed
            matches = filter(None, (of_a_run.fullmatch(fold(name)) for name in os.listdir(self._folder)))
            taken = {int(match[1] or 1) for match in matches}
            return next(number for number in count(lowest) if number not in taken)
        return lowest

    def write(self, image: Image, fields: Mapping[str, Any], mark: str = "", **options: Any) -> Path:
        """Write an image under its name, or the next free one, and return the path.

        ``fields`` are all of ``FIELDS`` without date and time. ``mark`` is appended to the name: "partial", or "grid"
        for the grid of all images. ``options`` are those of :func:`stable_diffusion.images.files.save`.

        Raises NotWrittenError, one line, if that fails. The image is then saved in the current folder or in the one for
        temporary files, if possible.
        """
        try:
            return self._write(image, fields, mark, options)
        except (OSError, ValueError) as error:
            raise NotWrittenError(error, _keep(image, self._path(fields, mark).name, options)) from error

    def _write(self, image: Image, fields: Mapping[str, Any], mark: str, options: Mapping[str, Any]) -> Path:
        folder = self._path(fields, mark).parent
        if self._makes_folder:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"the folder {folder} cannot be created ({error.strerror})") from error
        is_chosen = self._is_pattern and self.numbers and not mark
        first = self.numbers[fields["i"] - 1] if is_chosen else self._number
        for number in count(first):
            path = self._path(fields, mark, number)
            name = fold(str(path))
            if name in self._written or (not self._overwrite and os.path.lexists(path)):
                continue
            with suppress(FileExistsError):  # another process was faster
                save(image, path, overwrite=self._overwrite, **options)
                break
        if not self._is_pattern:
            self._number = number  # another process has begun with ours
        self._written.add(name)
        return path

    def _path(self, fields: Mapping[str, Any], mark: str = "", number: int = 1) -> Path:
        """Return the path of an image in a run with this number."""
        suffix = "" if number == 1 else f"-{number}"
        if not self._is_pattern:
            path = Path(self._output)
            words = [str(fields["i"])] if self._several and not mark.startswith("grid") else []
            words += [mark] if mark not in ("", "grid") else []
            return path.with_stem("_".join([path.stem + suffix, *words]))
        fields = {**fields, "date": f"{self._began:%Y-%m-%d}", "time": f"{self._began:%H-%M-%S}"}
        *folders, name = (_Filler().vformat(part, (), fields) for part in self._output.split(os.sep))
        stem, extension = os.path.splitext(name)
        name = f"{_cut(stem, _LONGEST_NAME)}{'_' if mark else ''}{mark}{suffix}{extension}"
        return Path(os.sep.join([*folders, name]))


class _Filler(Formatter):
    """Fill fields into a part of a path: numbers in short form, text without characters that file names forbid."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        if field_name not in FIELDS:
            known = ", ".join(FIELDS)
            raise ValueError(f"unknown field {{{field_name}}}; choose from {known}, and write {{{{ for a brace")
        return kwargs[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        text = format(value, format_spec or ("g" if isinstance(value, float) else ""))
        if not isinstance(value, str):
            return text
        return _cut(_UNSAFE.sub("_", text).strip(_EDGES), _LONGEST_FIELD).rstrip(_EDGES) or "_"


def _cut(text: str, limit: int) -> str:
    return text.encode(errors="surrogateescape")[:limit].decode(errors="ignore") if len(text) * 4 > limit else text


def _keep(image: Image, name: str, options: Mapping[str, Any]) -> Path | None:
    for folder in (os.getcwd, tempfile.gettempdir):
        with suppress(OSError, ValueError):
            return save_numbered(image, Path(folder(), name), **options)
    return None


def save_numbered(image: Image, path: Path, **options: Any) -> Path:
    """Write an image under its name or with the first free number after it; returns its path. See ``numbered``."""
    for free in numbered(path):
        with suppress(FileExistsError):
            save(image, free, overwrite=False, **options)
            break
    return free


def numbered(path: Path) -> Iterator[Path]:
    """Yield a path, then the same with a number after the name: a.png, a-2.png, a-3.png, ..."""
    yield path
    yield from (path.with_stem(f"{path.stem}-{number}") for number in count(2))
