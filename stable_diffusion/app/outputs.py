"""Name the image files of a run, and write them without replacing anybody else's.

========================= =========================== =========== ========================
output                    images                      grid        of the next run
========================= =========================== =========== ========================
``cat.png``, one image    cat.png                                 cat-2.png
``cat.png``, several      cat_1.png, cat_2.png, ...   cat.png     cat-2_1.png, ..., cat-2.png
``{seed}.png``, a pattern 7.png, 8.png, ...           7_grid.png  7-2.png, ..., 7_grid-2.png
``cats/``, a folder       by the pattern ``{date}_{time}_{i}_{seed}.png`` in it
========================= =========================== =========== ========================

A name is taken by the finished file only, so two processes may write into one folder.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from string import Formatter
from typing import Any

from PIL.Image import Image

from ..images.files import check_output, save

FIELDS = ("i", "seed", "prompt", "steps", "cfg", "sampler", "width", "height", "model", "date", "time")

_IN_A_FOLDER = "{date}_{time}_{i}_{seed}.png"
# Fields that only the model knows, before it is read.
_UNKNOWN = {"steps": 0, "cfg": 0.0, "sampler": "", "width": 0, "height": 0}
_LONGEST_FIELD, _LONGEST_NAME = 120, 220  # bytes: file systems end at 255, and marks and numbers follow
# Characters that some file system refuses, blanks, and marks that change the direction of text.
_UNSAFE = re.compile(r"[\0-\x20\x7f-\xa0<>:\"/\\|?*\ud800-\udfff\u2028-\u202e\u2066-\u2069]+")
_EDGES = " ._-\u200d"  # a name that begins or ends with these would be hidden or look like a flag


def _cut(text: str, limit: int) -> str:
    """Cut text between letters to at most ``limit`` bytes."""
    return text.encode(errors="surrogateescape")[:limit].decode(errors="ignore") if len(text) * 4 > limit else text


class _Filler(Formatter):
    """Fill fields into a part of a path: numbers in their short form, text as a file name can hold it."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        if field_name not in FIELDS:
            known = ", ".join(FIELDS)
            raise ValueError(f"there is no field {{{field_name}}}; choose of {known}, and write {{{{ for a brace")
        return kwargs[field_name], field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, float):
            return format(value, format_spec or "g")
        text = format(value, format_spec)
        if not isinstance(value, str):
            return text
        return _cut(_UNSAFE.sub("_", text).strip(_EDGES), _LONGEST_FIELD).rstrip(_EDGES) or "_"


_fill = _Filler().vformat


class NotWrittenError(OSError):
    """Report an image that could not be written. ``kept`` is the path it has instead, None if it is lost."""

    def __init__(self, reason: Exception, kept: Path | None):
        super().__init__(f"{reason}; " + ("it is lost" if kept is None else f"it is kept as {kept}"))
        self.kept = kept


class Outputs:
    """Write the images of a run under names made from ``output``.

    Args:
        output: a file; a folder, which exists or ends in a slash; or a pattern with ``FIELDS`` in braces, with format
            specifications if needed, such as ``{i:03}``. The folder of a file must exist. Those of the others are
            created with the first image.
        several: there is more than one image.
        overwrite: replace existing files, except those of this run. Otherwise the next free number is taken: one for
            all files of the run if ``output`` is a file, else one for each.

    Raises ValueError, one line, for an unknown field and other mistakes.
    """

    def __init__(self, output: str, several: bool, overwrite: bool = False):
        is_folder = bool(output.strip()) and os.path.isdir(output)
        if is_folder:  # its braces are part of its name
            output = output.replace("{", "{{").replace("}", "}}")
        if is_folder or output.endswith(os.sep):
            output = os.path.join(output, _IN_A_FOLDER)
        self._output, self._several, self._overwrite = output, several, overwrite
        self._is_pattern = "{" in output or "}" in output
        try:
            if self._is_pattern:
                _fill(output, (), dict.fromkeys(FIELDS, "") | _UNKNOWN | {"i": 1, "seed": 1})
        except ValueError as error:
            raise ValueError(f"the output {output} is no pattern: {error}") from None
        self._began = datetime.now()
        self._number = 1
        self._written: set[tuple[int, int, int] | None] = set()

    def check(self, images: Sequence[Mapping[str, Any]]) -> None:
        """Check before any work that the images can be written, and choose the number of this run. Nothing is created.

        ``images`` are the known fields of each, without date and time. Raises ValueError or OSError, one line with the
        path and the remedy.
        """
        if not self._is_pattern:
            check_output(self._output)
        images = [_UNKNOWN | dict(fields) for fields in images]
        for path in (self._path(fields, "", 1) for fields in images):
            folder = path.parent
            if self._is_pattern:
                folder = next(parent for parent in path.parents if os.path.lexists(parent))
                if not os.path.isdir(folder):
                    raise ValueError(f"the output folder {folder} is a file; choose another name")
            is_taken = not self._overwrite and os.path.isdir(folder / path.name)  # the next number is free
            check_output(folder / (f"another{path.suffix}" if is_taken else path.name))
        if not (self._is_pattern or self._overwrite):
            self._number = next(n for n in count(1) if not self._is_taken(images, n))

    def write(self, image: Image, fields: Mapping[str, Any], *, mark: str = "", **options: Any) -> Path:
        """Write an image under its name, or the next free one, and return the path.

        Args:
            fields: all of ``FIELDS`` without date and time.
            mark: a word to stand behind the name, such as "partial". "grid" is the grid of all images.
            options: of :func:`stable_diffusion.images.files.save`.

        Raises NotWrittenError, one line, if that fails. The image is then kept in the current folder or in the one for
        temporary files, if possible.
        """
        try:
            return self._write(image, fields, mark, options)
        except (OSError, ValueError) as error:
            raise NotWrittenError(error, _keep(image, self._path(fields, mark, 1).name, options)) from error

    def _write(self, image: Image, fields: Mapping[str, Any], mark: str, options: Mapping[str, Any]) -> Path:
        folder = self._path(fields, mark, self._number).parent
        if self._is_pattern:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"the folder {folder} could not be made ({error.strerror})") from error
        paths = (self._path(fields, mark, number) for number in count(self._number))
        if self._overwrite:
            _, path = _save_first(image, paths, lambda path: _identity(path) in self._written, **options)
        else:
            skipped, path = _save_first(image, paths, overwrite=False, **options)
            if not self._is_pattern:  # another process has begun with our number
                self._number += skipped
        self._written.add(_identity(path))
        return path

    def _is_taken(self, images: Iterable[Mapping[str, Any]], number: int) -> bool:
        """Return True if a file of a run with this number exists."""
        paths = [self._path({}, "grid", number), *(self._path(fields, "", number) for fields in images)]
        return any(os.path.lexists(path) for path in paths)

    def _path(self, fields: Mapping[str, Any], mark: str, number: int) -> Path:
        """Return the path of an image in a run with this number."""
        suffix = "" if number == 1 else f"-{number}"
        if not self._is_pattern:
            path = Path(self._output)
            words = [str(fields["i"])] if self._several and not mark.startswith("grid") else []
            words += [mark] if mark not in ("", "grid") else []
            return path.with_stem("_".join([path.stem + suffix, *words]))
        fields = {**fields, "date": f"{self._began:%Y-%m-%d}", "time": f"{self._began:%H-%M-%S}"}
        *folders, name = (_fill(part, (), fields) for part in self._output.split(os.sep))
        stem, extension = os.path.splitext(name)
        name = f"{_cut(stem, _LONGEST_NAME)}{'_' if mark else ''}{mark}{suffix}{extension}"
        return Path(os.sep.join([*folders, name]))


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Identify the file of this name: some file systems have several spellings for it, and use an inode again."""
    with suppress(OSError):
        status = path.stat()
        return status.st_dev, status.st_ino, status.st_mtime_ns
    return None


def _save_first(
    image: Image, paths: Iterable[Path], is_taken: Callable[[Path], bool] = os.path.lexists, **options: Any
) -> tuple[int, Path]:
    """Write an image to the first path that is not taken; return how many were, and the path."""
    for skipped, path in enumerate(paths):
        if not is_taken(path):
            with suppress(FileExistsError):  # another process was faster
                save(image, path, **options)
                return skipped, path
    raise FileExistsError("no name is free")


def _keep(image: Image, name: str, options: Mapping[str, Any]) -> Path | None:
    """Write an image to the current folder or the temporary one, and return its path."""
    for folder in (os.getcwd, tempfile.gettempdir):
        with suppress(OSError, ValueError):
            path = Path(folder(), name)
            numbered = (path.with_stem(f"{path.stem}-{n}") if n > 1 else path for n in count(1))
            return _save_first(image, numbered, overwrite=False, **options)[1]
    return None
