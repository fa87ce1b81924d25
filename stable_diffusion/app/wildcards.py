"""Read folders of wildcards: ``__name__`` in a prompt is replaced by the lines of a text file."""

import os
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from ..files.text import read_text


def read_wildcards(folder: str | os.PathLike) -> Callable[[str], tuple[str, ...]]:
    """Return a function for ``alternatives.expand`` that reads wildcards: a name -> the lines of ``folder/name.txt``.

    A name may contain folders ("clothes/hats") and be a pattern for several files ("clothes/*"). If no file has the
    name, files in sub-folders are searched. The files are UTF-8, each read when it is first needed. Blanks around a
    line are removed. Empty lines, lines that begin with #, and repeated lines are omitted.

    Raises ValueError for a missing folder. A call raises it for a name outside the folder, an unknown name, or an
    unreadable file.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise ValueError(f"the folder of wildcards {root} does not exist; check the path")

    @cache
    def paths() -> dict[str, Path]:
        return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.txt"))}

    @cache
    def lines(name: str) -> tuple[str, ...]:
        name = name.replace("\\", "/")
        if not set(name.split("/")).isdisjoint({"", ".", ".."}):
            raise ValueError(f"the wildcard __{name}__ is outside the folder {root}; name a file in it")
        names = [other for other in paths() if fnmatchcase(other, name)]
        names = names or [other for other in paths() if fnmatchcase(other, f"*/{name}")]
        if not names:
            raise ValueError(f"unknown wildcard __{name:.60}__ in {root}; {_similar(name, [*paths()], root)}")
        return tuple(dict.fromkeys(line for other in names for line in _lines(paths()[other])))

    return lines


def _lines(path: Path) -> list[str]:
    try:
        text = read_text(path)
    except OSError as error:
        raise ValueError(f"the wildcard file {path} cannot be read ({error.strerror}); give a text file") from error
    return [line for line in map(str.strip, text.split("\n")) if line and not line.startswith("#")]


def _similar(name: str, names: list[str], root: Path) -> str:
    """Describe the known wildcards, similar names first, or files of another kind."""
    close = get_close_matches(name, names, cutoff=0.5)
    others = [path.name for path in sorted(root.rglob("*.*")) if path.suffix in (".json", ".yaml", ".yml")]
    if others and not close:
        return f"{others[0]} is not read: write each of its lists into a .txt file"
    shown = ", ".join(f"__{other}__" for other in close or names[:5])
    return f"{'similar' if close else 'some'} names: {shown}" if shown else "the folder has no .txt files"
