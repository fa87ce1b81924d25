"""Download files from the Hub into the cache of ``huggingface_hub``. A complete cache needs no network.

The client is imported where it is used, so that local files do not need it.
"""

import errno
import glob
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..models.config import listed
from .layout import files_in

_log = logging.getLogger("stable_diffusion")

FILE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<file>.+))?")  # a repository, or a file in one
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@dataclass(frozen=True)
class DownloadSpec:
    """Describe which files of a repository are needed.

    ``missing_files`` lists the files that its folder lacks: first small ones, then the weights. It raises ValueError
    for a repository that is not supported.
    """

    what: str  # the kind of repository, for messages
    entries: tuple[str, ...]  # files that list the others; the first existing one is used
    missing_files: Callable[[Path, set[str], str], list[str]]  # (folder, names of all files, repository)
    remedy: str  # without network and cache, for messages
    best_files: frozenset[str] = frozenset()  # with these files, the repository need not be listed


class NotOnHub(ValueError):
    """Report a repository that does not exist for this user; a mirror may exist."""


def fetch(repos: tuple[str, ...], spec: DownloadSpec, revision: str | None = None) -> tuple[str, Path]:
    """Return (repository, folder) of the first one that is complete in the cache, else of the first on the Hub.

    Raises:
        ValueError: unknown repository or revision, no access, or required files are missing.
        OSError: no network and not in the cache, no space on the disk.
    """
    for repo in repos:
        folder, missing = _cached(repo, spec, revision)
        if folder is not None and not missing:
            return repo, folder
    errors: list[Exception] = []
    for repo in repos:
        try:
            return repo, _download(repo, spec, revision)
        except (NotOnHub, ConnectionError) as error:  # a mirror may exist, or be cached in either precision
            errors.append(error)
    raise next((error for error in errors if isinstance(error, ConnectionError)), errors[-1])


def is_cached(repo: str, revision: str | None = None) -> bool:
    """Return whether the cache holds a revision, or any, of a repository, complete or not; no network call."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}")
    if revision is None:
        return (folder / "snapshots").is_dir()
    is_inside = {"..", os.sep}.isdisjoint(Path(revision).parts)
    return is_inside and any((folder / kind / revision).exists() for kind in ("refs", "snapshots"))


def _cached(repo: str, spec: DownloadSpec, revision: str | None) -> tuple[Path | None, list[str]]:
    """Return the folder of a revision in the client's cache, and the files that it lacks, without a network call.

    The client stores the list of a repository's files when it downloads them. Without this list (an older client, or
    single files) the repository may have better files than the cache, so the best ones are assumed.
    """
    from huggingface_hub import try_to_load_from_cache

    entries = ((try_to_load_from_cache(repo, entry, revision=revision), entry) for entry in spec.entries)
    folder = next((Path(path.removesuffix(entry)) for path, entry in entries if isinstance(path, str)), None)
    if folder is None:
        return None, ["everything"]
    names = files_in(folder) | spec.best_files
    with suppress(ImportError):  # older clients do not store the listing
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        with suppress(CachedRepoTreeNotFoundError):
            names = {file.path for file in get_cached_repo_tree(repo, revision=folder.name)}
    return folder, spec.missing_files(folder, names, repo)


def _download(repo: str, spec: DownloadSpec, revision: str | None) -> Path:
    """Download the missing files of a repository into the cache: the small files, then the weights."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{"disable": None} | kwargs)  # shown only on terminals, as the client's other bars

    try:
        with one_line_errors(repo, revision):
            names = {file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings}
            entry = next((entry for entry in spec.entries if entry in names), None)
            if entry is not None:
                folder = Path(hf_hub_download(repo, entry, revision=revision).removesuffix(entry))
        if entry is None:
            single = min((name for name in names if name.endswith((".safetensors", ".ckpt"))), default=None)
            remedy = f"; give one of its files, such as {repo}/{single}" if single else ""
            raise ValueError(f"{repo} is not {spec.what}: it has no {' or '.join(spec.entries)}{remedy}")
        for _ in ("small files", "weights"):
            missing = spec.missing_files(folder, names, repo)
            if unknown := [file for file in missing if file not in names]:
                raise ValueError(f"{repo} is incomplete: it has no {listed(unknown)}")
            if missing:
                with one_line_errors(repo, revision):  # from one commit, so that all files belong together
                    patterns = [glob.escape(file) for file in missing]
                    snapshot_download(repo, revision=folder.name, allow_patterns=patterns, tqdm_class=Bar)
        return folder
    except ConnectionError as error:
        folder, missing = _cached(repo, spec, revision)
        with suppress(ValueError):  # no weights of either precision
            if folder is not None and not spec.missing_files(folder, files_in(folder), repo):
                _log.warning("%s: using the cached weights, which may have the other precision", error)
                return folder
        remedy = f"the cache on this machine lacks {listed(missing)}: {spec.remedy}"
        raise ConnectionError(f"{error}; {remedy}") from error


@contextmanager
def one_line_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn every exception of the Hub client into one line with the reason and the remedy."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(f"{repo} is gated: accept its licence at {page} and run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        reason = f"{repo} is neither a folder here nor a public repository on the Hub"
        raise NotOnHub(f"{reason}: check {page}, or run `hf auth login`") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo} has no revision {revision!r}: see the list at {page}/tree/main") from error
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            remedy = "run `hf auth login` with a token that can read it"
            raise ValueError(f"{repo}: the Hub refuses access ({status}): {remedy}") from error
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            remedy = "free disk space, or set HF_HOME to another disk"
            reason = f"cannot be saved in {constants.HF_HUB_CACHE} ({error.strerror})"
            raise OSError(f"{repo} {reason}: {remedy}") from error
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ConnectionError(f"{repo} cannot be downloaded ({first_line})") from error
