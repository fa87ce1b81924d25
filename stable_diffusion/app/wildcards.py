"""Read folders of wildcards: text files whose lines a word like ``__name__`` in a prompt stands for."""

import os
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path


def read_wildcards(folder: str | os.PathLike) -> Callable[[str], tuple[str, ...]]:
    """Return a function for ``prompt.expand`` that reads wildcards: a name -> the lines of ``folder/name.txt``.

    The files are UTF-8, each read when it is first needed. Blanks around a line are left out, and so are empty lines
    and those that begin with #. A name may hold folders ("clothes/hats").

    Raises ValueError where there is no folder, and on a call for a name that leaves it, that no file in it has, or
    whose file cannot be read.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise ValueError(f"there is no folder of wildcards at {root}; check the path")

    @cache
    def lines(name: str) -> tuple[str, ...]:
        if not set(name.split("/")).isdisjoint({"", ".", ".."}):
            raise ValueError(f"the wildcard __{name}__ leaves the folder {root}; name a file in it")
        path = root / f"{name}.txt"
        try:
            text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"there is no wildcard __{name}__ in {root}; {_similar(name, root)}") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"the wildcard file {path} cannot be read ({error}); give a text file in UTF-8") from error
        return tuple(line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#"))

    return lines


def _similar(name: str, root: Path) -> str:
    """Describe the wildcards there are, those with names like ``name`` first."""
    names = sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.txt"))
    close = get_close_matches(name, names, cutoff=0.5)
    shown = ", ".join(f"__{other}__" for other in close or names[:5])
    return f"{'similar' if close else 'some'} there: {shown}" if shown else "it holds no .txt files"
