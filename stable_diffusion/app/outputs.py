"""Names for the images of a run: from ``--output`` to files that nobody else has.

========================= =========================== =========== ========================
``--output``              images                      grid        of the next run
========================= =========================== =========== ========================
``cat.png``, one image    cat.png                                 cat-2.png
``cat.png``, several      cat_1.png, cat_2.png, ...   cat.png     cat-2_1.png, ..., cat-2.png
``{seed}.png``, a pattern 7.png, 8.png, ...           7_grid.png  7-2.png, ..., 7_grid-2.png
``cats/``, a folder       by the pattern ``{date}_{time}_{i}_{seed}.png`` in it
========================= =========================== =========== ========================

No name is taken before the finished file gets it, so two processes may write into one folder.
"""

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from string import Formatter
from typing import Any

from PIL.Image import Image

from ..images.image import check_output, save

FIELDS = ("i", "seed", "prompt", "steps", "cfg", "sampler", "width", "height", "model", "date", "time")

_IN_A_FOLDER = "{date}_{time}_{i}_{seed}.png"
# What stands for a value that only the model knows, while it is not read yet.
_UNKNOWN = {"steps": 0, "cfg": 0.0, "sampler": "", "width": 0, "height": 0}
_LONGEST_VALUE, _LONGEST_NAME = 120, 220  # bytes: file systems end at 255, and marks and numbers follow
# What names cannot hold on one system or another, blanks, and marks that turn the direction of what is shown.
_UNSAFE = re.compile(r"[\0-\x20\x7f-\xa0<>:\"/\\|?*\ud800-\udfff\u2028-\u202e\u2066-\u2069]+")
_EDGES = " ._-\u200d"  # no value begins or ends so: its file would be hidden, or look like an option, or lose the dot


class NotWrittenError(OSError):
    """An image could not be written where it should be; ``kept`` is where it is instead, None where it is lost."""

    def __init__(self, reason: Exception, kept: Path | None):
        super().__init__(f"{reason}; " + ("it is lost" if kept is None else f"it is kept as {kept}"))
        self.kept = kept


class Outputs:
    """Where the images of a run go.

    Args:
        output: what ``--output`` says. A file; a folder, which exists or ends in a slash; or with braces a pattern of
            ``FIELDS``, with format specifications if they like, such as ``{i:03}``. The folder of a file must be there,
            those of the others are made when the first image is written.
        several: whether more than one image is made.
        overwrite: replace files that are there already, but never those of this run. Otherwise the next free number is
            taken: one for all files of the run where ``output`` is a file, one for each in the other cases.

    Raises ValueError, one line, for an unknown field and other mistakes.
    """

    def __init__(self, output: str, several: bool, overwrite: bool = False):
        folder = bool(output.strip()) and os.path.isdir(output)
        if folder:  # its braces are part of its name
            output = output.replace("{", "{{").replace("}", "}}")
        if folder or output.endswith(os.sep):
            output = os.path.join(output, _IN_A_FOLDER)
        self._output, self._several, self._overwrite = output, several, overwrite
        self._is_pattern = "{" in output or "}" in output
        if self._is_pattern:
            _check_pattern(output)
        self._began = datetime.now()
        self._number = 1
        self._written: set[tuple[int, int]] = set()

    def check(self, images: Sequence[Mapping[str, Any]]) -> None:
        """See before any work that the images can be written, and which number this run gets. Nothing is created.

        ``images`` are their values of the fields but date and time, as far as they are known. Raises ValueError or
        OSError, one line with the path and the remedy.
        """
        if not self._is_pattern:
            check_output(self._output)
        known = [_UNKNOWN | dict(values) for values in images]
        for path in (self._path(values, "", 1) for values in known):
            folder = path.parent
            if self._is_pattern:
                folder = next(parent for parent in path.parents if os.path.lexists(parent))
                if not os.path.isdir(folder):
                    raise ValueError(f"the output folder {folder} is a file; choose another name")
            in_the_way = not self._overwrite and os.path.isdir(folder / path.name)  # another number will be taken
            check_output(folder / (f"another{path.suffix}" if in_the_way else path.name))
        if not (self._is_pattern or self._overwrite):
            self._number = next(n for n in count(1) if not self._is_taken(known, n))

    def write(self, image: Image, values: Mapping[str, Any], *, mark: str = "", **options: Any) -> Path:
        """Write an image under its name, or the next that is free; returns the path.

        Args:
            values: of all fields but date and time.
            mark: what it is if not simply an image: "grid", "partial", or another word to stand behind the name.
            options: of ``image.save``.

        Raises NotWrittenError, one line, where that fails. What was made is not lost then: it is kept in the current
        folder, or in the one for temporary files, if either takes it, and the error says where.
        """
        try:
            return self._write(image, values, mark, options)
        except (OSError, ValueError) as error:
            raise NotWrittenError(error, _keep(image, self._path(values, mark, 1).name, options)) from error

    def _write(self, image: Image, values: Mapping[str, Any], mark: str, options: Mapping[str, Any]) -> Path:
        path = self._path(values, mark, self._number)
        if self._is_pattern:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"the folder {path.parent} could not be made ({error.strerror})") from error
        paths = (self._path(values, mark, number) for number in count(self._number))
        if self._overwrite:
            path = next(path for path in paths if _identity(path) not in self._written)
            save(image, path, **options)
        else:
            skipped, path = _write_new(image, paths, options)
            if not self._is_pattern:  # another process began with our number
                self._number += skipped
        self._written.add(_identity(path))
        return path

    def _is_taken(self, images: Iterable[Mapping[str, Any]], number: int) -> bool:
        """Whether one of the files of a run with that number is there."""
        paths = [self._path({}, "grid", number), *(self._path(values, "", number) for values in images)]
        return any(os.path.lexists(path) for path in paths)

    def _path(self, values: Mapping[str, Any], mark: str, number: int) -> Path:
        """The path of an image in a run of that ``number``."""
        again = "" if number == 1 else f"-{number}"
        if not self._is_pattern:
            path = Path(self._output)
            ends = [str(values["i"])] if self._several and not mark.startswith("grid") else []
            ends += [mark] if mark not in ("", "grid") else []
            return path.with_stem("_".join([path.stem + again, *ends]))
        values = {**values, "date": f"{self._began:%Y-%m-%d}", "time": f"{self._began:%H-%M-%S}"}
        *folders, name = (_fill(part, values) for part in self._output.split(os.sep))
        stem, suffix = os.path.splitext(name)
        return Path(os.sep.join([*folders, f"{_cut(stem, _LONGEST_NAME)}{'_' if mark else ''}{mark}{again}{suffix}"]))


def _check_pattern(pattern: str) -> None:
    try:
        for _, field, _, _ in Formatter().parse(pattern):
            if field is not None and field not in FIELDS:
                known = ", ".join(FIELDS)
                raise ValueError(f"there is no field {{{field}}}; choose of {known}, and write {{{{ for a brace")
        _fill(pattern, dict.fromkeys(FIELDS, "") | _UNKNOWN | {"i": 1, "seed": 1})
    except ValueError as error:
        raise ValueError(f"the output {pattern} is no pattern: {error}") from None


def _fill(pattern: str, values: Mapping[str, Any]) -> str:
    """A part of a path with its fields filled in."""
    done = ""
    for text, field, spec, _ in Formatter().parse(pattern):
        done += text
        if field is not None:
            value = values[field]
            value = format(value, spec or "g") if isinstance(value, float) else format(value, spec)
            done += _safe(value) if isinstance(values[field], str) else value
    return done


def _safe(value: str) -> str:
    """A text as a part of a file's name: no separators, no control characters, no blanks, and not too long."""
    return _cut(_UNSAFE.sub("_", value).strip(_EDGES), _LONGEST_VALUE).rstrip(_EDGES) or "_"


def _cut(text: str, most: int) -> str:
    """What of a text has room in ``most`` bytes."""
    return text.encode(errors="surrogateescape")[:most].decode(errors="ignore") if len(text) * 4 > most else text


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file has this name, also where the file system takes several spellings for one name."""
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def _write_new(image: Image, paths: Iterable[Path], options: Mapping[str, Any]) -> tuple[int, Path]:
    """Write an image under the first path that is free; returns how many were not, and the path."""
    for skipped, path in enumerate(paths):
        if os.path.lexists(path):
            continue
        try:
            save(image, path, overwrite=False, **options)
        except FileExistsError:  # another process was faster
            continue
        return skipped, path
    raise FileExistsError("no name is free")


def _keep(image: Image, name: str, options: Mapping[str, Any]) -> Path | None:
    """Where an image is kept that cannot be written where it should."""
    for folder in (os.getcwd, tempfile.gettempdir):
        with suppress(OSError, ValueError):
            first = Path(folder(), name)
            numbered = (first.with_stem(f"{first.stem}-{n}") if n > 1 else first for n in count(1))
            return _write_new(image, numbered, options)[1]
    return None
