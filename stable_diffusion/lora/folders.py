"""Find LoRAs in folders by their names in prompts: <lora:bob:0.8>, <lora:people/bob:0.8>."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from ..models.config import listed
from ..weights.layout import SUFFIXES
from .files import FOLDER_FILES

_OUTPUT_NAME = re.compile(rb'"ss_output_name"\s*:\s*"([^"\\]+)"')  # in the header of a file by kohya's scripts
_HEADER = 2**20  # bytes that are searched for it


def find_in(folders: str | os.PathLike | Sequence[str | os.PathLike], name: str) -> Path:
    """Find a LoRA in folders and their sub-folders by its name; ValueError for no match, or several.

    The name is that of a file, with or without suffix, of a folder of diffusers or PEFT, or the end of a path. An exact
    path in a folder comes first, then a file in a sub-folder. Names in other case follow, then the name that kohya's
    scripts store in a file. Hidden files are ignored. Links are followed.
    """
    folders = [folders] if isinstance(folders, str | os.PathLike) else folders
    roots = [Path(os.path.abspath(os.path.expanduser(folder))) for folder in folders]
    if missing := [folder for folder, root in zip(folders, roots, strict=True) if not root.is_dir()]:
        raise ValueError(f"the LoRA folder {missing[0]} does not exist; check the path")
    files = {file: root for root in roots for file in files_in(root)}
    wanted = tuple(re.split(r"[/\\]", name))
    for spell in (str, fold):
        spelled = tuple(map(spell, wanted))
        named = {f: n for f in files if (n := [n for n in _names(f, spell) if n[-len(spelled) :] == spelled])}
        at_path = [f for f, n in named.items() if any(len(x) == len(files[f].parts) + len(spelled) for x in n)]
        if found := at_path or list(named):
            return _only(found, name)
    if found := [file for file in files if _output_name(file) == name]:
        return _only(found, name)
    similar = get_close_matches(name, {file.stem for file in files}, n=1)
    guess = f"did you mean {similar[0]}? " if similar else ""
    raise ValueError(
        f"there is no LoRA {name} in {listed(folders)}: {guess}write the name of a file there, as in <lora:name:0.8>"
    )


def files_in(root: Path) -> Iterator[Path]:
    """Iterate over the weights files in a folder; a file reached by several links is listed once."""
    seen = set()
    for place, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for name in sorted(names):
            if name.endswith(SUFFIXES) and not name.startswith("."):
                yield Path(place, name)


def _names(file: Path, spell: Callable[[str], str]) -> list[tuple[str, ...]]:
    """Return the names of a file as parts of a path: with and without suffix, and for some files their folder."""
    *parents, last = map(spell, file.parts)
    names = [(*parents, last), (*parents, last.removesuffix(spell(file.suffix)))]
    return [*names, tuple(parents)] if file.name in FOLDER_FILES else names


def fold(text: str) -> str:
    """Return a name as case-insensitive file systems compare it; on a Mac, accents are decomposed."""
    return unicodedata.normalize("NFC", text).casefold()


def _output_name(file: Path) -> str | None:
    with suppress(OSError), file.open("rb") as opened:
        if file.suffix == SUFFIXES[0] and (match := _OUTPUT_NAME.search(opened.read(_HEADER))):
            return match[1].decode(errors="replace")
    return None


def _only(found: Sequence[Path], name: str) -> Path:
    """Return the only file. Of files that differ only in the suffix, return the safest; ValueError for several."""
    found = sorted(found, key=lambda file: SUFFIXES.index(file.suffix))
    distinct = {os.path.realpath(file.with_suffix("")): file for file in reversed(found)}
    if len({os.path.realpath(file) for file in distinct.values()}) > 1:
        places = listed(sorted(map(str, distinct.values())))
        remedy = "write more of the path, as in <lora:people/bob>"
        raise ValueError(f"{len(distinct)} LoRAs are called {name}: {places}; {remedy}")
    return found[0]
