"""Checkpoints as files: an alias, a Hub id or a folder -> configs, weight files and lazy tensors by name.

Only the files that this library reads are downloaded. The cache of `huggingface_hub` is asked first: a model that is
complete there is opened without a network call. The client is imported where it is used; a folder never needs it.
"""

import errno
import glob
import json
import logging
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .. import catalog
from . import layout

_log = logging.getLogger("stable_diffusion")

# Bytes per value of the types that mx.load reads as themselves (it gives 8-bit floats as integers).
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
_ITEM_SIZES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
_MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@dataclass(frozen=True)
class Component:
    """One network of a checkpoint."""

    name: str  # "unet", "vae", "text_encoder", "text_encoder_2"
    config: dict  # config.json
    files: tuple[Path, ...]  # its safetensors, several when it is sharded


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are all on this machine."""

    name: str  # what was asked for, for messages
    folder: Path
    pipeline: str  # `_class_name` of model_index.json
    index: dict  # model_index.json
    scheduler: dict  # scheduler_config.json
    components: dict[str, Component]
    tokenizers: dict[str, Path]  # "tokenizer", "tokenizer_2" -> folder
    steps: int  # the model's own defaults
    guidance: float


class _NotOnHub(ValueError):
    """The repository does not exist, or not for this user: a mirror may."""


def open_checkpoint(model: str | os.PathLike, *, float16: bool = False, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint, download what is missing of it, and read its configuration. No tensor is read.

    Args:
        model: a folder in diffusers layout, an alias of the catalog, or a Hub id. What starts with `./`, `../`, `/` or
            `~` is a folder; an alias means its model, unless a folder of that name holds a checkpoint.
        float16: prefer weight files in half precision (`*.fp16.safetensors`). Where only one kind exists it is taken.
        revision: a branch, tag or commit of the Hub repository.

    Raises:
        ValueError: unknown model, unsupported pipeline or component, a file that is missing or not readable, a
            repository that does not exist, is private or gated.
        OSError: no such folder, no network and not in the cache, no space on the disk.
    """
    name = os.fspath(model)
    folder = _local_folder(model)
    entry = None if folder else catalog.find(name)
    if revision is not None and (entry is None or entry.folder):
        raise ValueError(f"{name} is a folder on this machine and has no revision {revision!r}: leave it out")
    if folder is None:
        folder = entry.folder or _from_hub(entry, float16, revision)
    return _read_folder(folder, name, float16, entry)


def _local_folder(model: str | os.PathLike) -> Path | None:
    """`model` as a folder, or None when it is a name. Raises OSError for a path that is not a folder."""
    path = os.path.expanduser(os.fspath(model))
    if os.path.isdir(path):
        is_alias = isinstance(model, str) and model.lower() in catalog.ALIASES
        if not is_alias or os.path.isfile(os.path.join(path, layout.INDEX)):
            return Path(path)
    elif os.path.isfile(path):
        raise NotADirectoryError(f"{model} is a file: give the folder of a checkpoint in diffusers layout")
    elif isinstance(model, os.PathLike) or model.startswith(("./", "../", "/", "~")):
        raise FileNotFoundError(f"{model}: no such folder; give one that holds {layout.INDEX}, or a model's name")
    return None


def _read_folder(folder: Path, name: str, float16: bool, entry: catalog.Entry | None) -> Checkpoint:
    """Read the configuration of a complete folder and choose its weight files."""
    present = layout.files_in(folder)
    if layout.INDEX not in present:
        raise ValueError(f"{name} is not a checkpoint in diffusers layout: {folder} has no {layout.INDEX}")
    if missing := layout.lacking(folder, present, float16, name):
        raise ValueError(f"{name} is not complete: {folder} has no {', '.join(missing)}")
    index = layout.read_json(folder / layout.INDEX)
    networks, tokenizers = layout.parts(index, name)
    components = {}
    for part in networks:
        files = layout.weight_files(folder, part, present, float16, name)
        config = layout.read_json(folder / part / "config.json")
        components[part] = Component(part, config, tuple(folder / file for file in files))
    scheduler = {"_class_name": index["scheduler"][-1]} | layout.read_json(folder / layout.SCHEDULER)
    steps, guidance = catalog.defaults_for(index["_class_name"], scheduler)
    return Checkpoint(
        name=name,
        folder=folder,
        pipeline=index["_class_name"],
        index=index,
        scheduler=scheduler,
        components=components,
        tokenizers={part: folder / part for part in tokenizers},
        steps=steps if entry is None or entry.steps is None else entry.steps,
        guidance=guidance if entry is None or entry.guidance is None else entry.guidance,
    )


# --- tensors -----------------------------------------------------------------------------------------------------


def read_tensors(component: Component) -> dict[str, mx.array]:
    """The tensors of a component, named as in its files. They are read from the disk only when they are evaluated.

    Raises:
        ValueError: a file is corrupt, truncated or of a type that MLX cannot read, or two files hold the same tensor.
    """
    tensors: dict[str, mx.array] = {}
    for path in component.files:
        _check_safetensors(path)
        try:
            part = mx.load(str(path))
        except RuntimeError as error:
            raise layout.damaged(path, str(error).partition("\n")[0]) from error
        if twice := sorted(tensors.keys() & part.keys()):
            raise ValueError(f"{path} repeats tensors of another file of {component.name}: {', '.join(twice[:3])}")
        tensors.update(part)
    return tensors


def _check_safetensors(path: Path) -> None:
    """Compare the header of a safetensors file with the size of the file.

    MLX reads lazily: without this, a file that was cut off would fail only in the middle of a run.

    Raises:
        ValueError: the header is not readable, or does not describe exactly the bytes that follow it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise layout.damaged(path, f"its {size} bytes do not begin with a header")
        try:
            spans = sorted(_spans(json.loads(file.read(length))))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise layout.damaged(path, "its header is not that of a safetensors file") from error
    position = 0
    for first, end, name, dtype, shape in spans:
        if dtype not in _ITEM_SIZES:
            raise ValueError(f"{path} holds {name} as {dtype}, which this library does not read: save it as F16 or F32")
        if first != position or end - first != math.prod(shape) * _ITEM_SIZES[dtype] or min(shape, default=0) < 0:
            raise layout.damaged(path, f"its header gives the wrong place for {name}")
        position = end
    if 8 + length + position != size:
        raise layout.damaged(path, f"it has {size} bytes and should have {8 + length + position}")


def _spans(header: dict) -> Iterator[tuple[int, int, str, str, list[int]]]:
    """(first byte, end, name, type, shape) of each tensor in a safetensors header. Raises whatever is wrong with it."""
    for name, tensor in header.items():
        if name != "__metadata__":
            first, end = tensor["data_offsets"]
            yield int(first), int(end), name, str(tensor["dtype"]), [int(length) for length in tensor["shape"]]


# --- the Hub -----------------------------------------------------------------------------------------------------


def _from_hub(entry: catalog.Entry, float16: bool, revision: str | None) -> Path:
    """The folder of the first repository that is complete in the cache, else of the first one that is on the Hub."""
    repo, folder = _first_cached(entry.repos, float16, revision) or _first_on_hub(entry.repos, float16, revision)
    asked = entry.removed or entry.repos[0]
    if repo != asked:
        _log.warning("%s is no longer on the Hub: using its mirror %s", asked, repo)
    return folder


def _first_cached(repos: tuple[str, ...], float16: bool, revision: str | None) -> tuple[str, Path] | None:
    for repo in repos:
        folder = _snapshot(repo, revision)
        if folder and not layout.lacking(folder, _listing(folder, repo, float16), float16, repo):
            return repo, folder
    return None


def _first_on_hub(repos: tuple[str, ...], float16: bool, revision: str | None) -> tuple[str, Path]:
    *others, last = repos
    unreachable: ConnectionError | None = None
    for repo in others:
        try:
            return repo, _download(repo, float16, revision)
        except _NotOnHub:
            continue
        except ConnectionError as error:  # the cache may hold another of them, in either precision
            unreachable = unreachable or error
    try:
        return last, _download(last, float16, revision)
    except ConnectionError as error:
        raise unreachable or error from error


def _snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder in the client's cache that holds this revision, perhaps not all of it. Makes no network call."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(repo, layout.INDEX, revision=revision)
    return Path(index).parent if isinstance(index, str) else None


def _listing(folder: Path, repo: str, float16: bool) -> set[str]:
    """The files of a repository, as the client noted them when it downloaded `folder`. Makes no network call.

    Where there is no note (an older client, or one that fetched single files) the repository may have better files
    than the cache, so the best ones are assumed.
    """
    with suppress(ImportError):  # of clients that do not keep the listing
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        with suppress(CachedRepoTreeNotFoundError):
            return {file.path for file in get_cached_repo_tree(repo, revision=folder.name)}
    return layout.files_in(folder) | layout.assumed_names(float16)


def _download(repo: str, float16: bool, revision: str | None) -> Path:
    """Bring what is missing of one repository into the cache: first the small files, then the weights they call for."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{"disable": None} | kwargs)  # shown on terminals only, as the client's others

    try:
        with _one_line_errors(repo, revision):
            names = {file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings}
            if layout.INDEX in names:
                folder = Path(hf_hub_download(repo, layout.INDEX, revision=revision)).parent
        if layout.INDEX not in names:
            raise ValueError(f"{repo} is not a checkpoint in diffusers layout: it has no {layout.INDEX}")
        for _ in ("small files", "weights"):
            missing = layout.lacking(folder, names, float16, repo)
            if unknown := [file for file in missing if file not in names]:
                raise ValueError(f"{repo} is not complete: it has no {', '.join(unknown)}")
            if missing:
                with _one_line_errors(repo, revision):  # of one commit, so that all files belong together
                    wanted = [glob.escape(file) for file in missing]
                    snapshot_download(repo, revision=folder.name, allow_patterns=wanted, tqdm_class=Bar)
    except ConnectionError as error:
        return _without_network(repo, float16, revision, error)
    return folder


def _without_network(repo: str, float16: bool, revision: str | None, error: ConnectionError) -> Path:
    """What the cache holds, of either precision; when that is not enough, raises `error` with what is missing."""
    folder = _snapshot(repo, revision)
    missing = ["everything"]
    if folder:
        with suppress(ValueError):  # no weights of either precision
            if not layout.lacking(folder, layout.files_in(folder), float16, repo):
                _log.warning("%s: using the weights in the cache, which may be of the other precision", error)
                return folder
        missing = layout.lacking(folder, _listing(folder, repo, float16), float16, repo)
    raise ConnectionError(
        f"{error}; the cache on this machine lacks {', '.join(missing)}: "
        "connect once, or use a local folder or --model tiny"
    ) from error


@contextmanager
def _one_line_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the Hub client raises into one line that gives the reason and the remedy."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(f"{repo} is gated: accept its licence at {page} and run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        raise _NotOnHub(
            f"{repo} is no folder here and not on the Hub, or is private: check {page}, or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no revision {revision!r}: see the list at {page}/tree/main") from error
    except Exception as error:
        raise _other_error(repo, error) from error


def _other_error(repo: str, error: Exception) -> Exception:
    """A refusal or a full disk; all else that a client raises is trouble with the connection."""
    from huggingface_hub import constants

    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403):
        return ValueError(
            f"{repo}: the Hub refuses access ({status}): run `hf auth login` with a token that may read it"
        )
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        where = constants.HF_HUB_CACHE
        return OSError(
            f"{repo} cannot be saved in {where} ({error.strerror}): make room, or set HF_HOME to another disk"
        )
    return ConnectionError(f"{repo} cannot be downloaded ({_first_line(cause)})")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
