"""The files, folders and networks of a request: short names in a record, found and checked when it is repeated.

A record has the name of a file without its folder, and its hash. A stranger may have written the record. So a file is
used only if the record has its hash, which proves that the writer knew its content. A network of the Hub is used only
if it is in the cache. All other sources need a flag, or --trust.
"""

import os
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..lora.files import locate
from ..models.config import listed
from ..weights import catalog, hub
from ..weights.layout import SUFFIXES
from ..weights.parts import NETWORKS
from .fingerprints import HASHES, fingerprint
from .request import UPSCALERS, Request

_NETWORKS = ("model", "refiner", *NETWORKS, "controlnet", "ip_adapter", "lora", "upscale", "hires_upscaler")
PICTURES = ("image", "mask", "depth", "control_image", "ip_image", "ip_mask")
FIELDS = (*_NETWORKS, *PICTURES, "embedding", "tokenizer", "lora_dir", "wildcards")


def split_embedding(embedding: str) -> tuple[str, str | None]:
    """Return the file of an embedding, and its word if given: FILE or FILE=WORD."""
    path, equals, word = embedding.rpartition("=")
    return (embedding, None) if not equals or os.path.isfile(os.path.expanduser(embedding)) else (path, word)


def map_sources(request: Request, change: Callable[[str, str], str], fields: Collection[str] = FIELDS) -> Request:
    """Return a request with each source in ``fields`` replaced by ``change(field, source)``."""

    def mapped(field: str, value: Any) -> Any:
        if field == "hires_upscaler" and value in UPSCALERS:
            return value
        if isinstance(value, str):
            file, word = split_embedding(value) if field == "embedding" else (value, None)
            return change(field, file) + ("" if word is None else f"={word}")
        return tuple(mapped(field, one) for one in value) if isinstance(value, tuple) else value

    return request.with_values(**{field: mapped(field, request.value(field)) for field in FIELDS if field in fields})


def short_names(request: Request) -> dict[str, str]:
    """Return names without folders for the sources whose path is absolute or contains "..".

    The names differ from each other, and from the aliases of models.
    """
    names: dict[str, str] = {}

    def shorten(field: str, source: str) -> str:
        path = Path(source).expanduser()
        if (path.is_absolute() or ".." in path.parts) and source not in names:
            name = f"./{path.name}" if path.name.lower() in catalog.ALIASES else path.name
            names[source] = f"{path.parent.name}/{name}" if name in names.values() else name
        return source

    map_sources(request, shorten)
    return names


def find_sources(
    request: Request, fields: Collection[str], picture: str, files: Any, folders: Sequence[str], *, trust: bool = False
) -> Request:
    """Return a request with the paths of the sources that a record names.

    Args:
        fields: the fields whose values come from the record.
        picture: the path of the image; files are searched beside it, in the current folder, and in ``folders``.
        files: the record's {name: hashes}.
        trust: also use sources without a matching hash.

    Raises ValueError, one line, for sources that are not found or not trusted.
    """
    files = files if isinstance(files, dict) else {}
    hashes = {known for entry in files.values() for known in _hashes(entry)}
    fields = [field for field in fields if field != "lora_dir" or request.prompt_loras]
    refused: list[str] = []

    def find(field: str, source: str) -> str:
        is_alias = field in _NETWORKS and source.lower() in catalog.ALIASES
        path = os.path.expanduser(source)
        places = [os.path.join(folder, path) for folder in ("", os.path.dirname(picture), *folders)]
        here = [] if is_alias else [place for place in places if os.path.lexists(place)]
        for place in here:
            with suppress(ValueError, OSError):
                paths = _files(field, Path(place), [key.removeprefix(f"{source} ") for key in files], request)
                if paths and all(_hashes(fingerprint(path)) & hashes for path in paths):
                    return place
        repos = _repos(source) if field in _NETWORKS and not here else None
        revision = request.revision if field == "model" else None
        is_cached = repos is not None and (not repos or any(hub.is_cached(repo, revision) for repo in repos))
        if not (trust or is_cached):
            reason = "another hash" if here else "not here" if repos is None else "a download"
            refused.append(f"--{field} {listed([source])} ({reason})")
        return here[0] if here else source

    request = map_sources(request, find, fields)
    if refused:
        remedy = "give these flags yourself, or use --without or --trust"
        raise ValueError(f"{picture} names {listed(refused)}; {remedy}")
    return request


def _hashes(entry: Any) -> set[str]:
    entry = entry if isinstance(entry, dict) else {}
    return {entry[key] for key in HASHES & entry.keys() if isinstance(entry[key], str)}


def _files(field: str, place: Path, names: Sequence[str], request: Request) -> list[Path]:
    """Return the files of a found source; of a folder, the files with ``names`` of the record."""
    if field == "lora_dir":  # no search in sub-folders: the folder may be a whole disk
        tags = [name for name, _ in request.prompt_loras]
        titles = {Path(tag).name for tag in tags}
        names = [name for name in names if name.endswith(SUFFIXES) and {Path(name).stem, Path(name).name} & titles]
        names += [f"{tag}{suffix}" for tag in tags for suffix in ("", *SUFFIXES)]
        return [path for path in (place / name.lstrip("/") for name in names if ".." not in name) if path.is_file()]
    if field == "lora":
        return [locate(place)]
    if not place.is_dir():
        return [place]
    inside = [Path(*Path(name).parts[-depth:]) for name in names for depth in (1, 2)]
    return [path for path in (place / name for name in inside if ".." not in name.parts) if path.is_file()]


def _repos(source: str) -> tuple[str, ...] | None:
    """Return the possible Hub repositories of a source: () for the bundled model, None for other sources."""
    if source.endswith(SUFFIXES) and ":" not in source and source.count("/") < 2:
        return None  # a file; on the Hub it would be owner/name/file
    with suppress(ValueError):
        return catalog.find("/".join(source.partition(":")[0].split("/")[:2])).repos
    return None
