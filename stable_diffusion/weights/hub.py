"""Files from the Hub, through the cache of `huggingface_hub`: what is complete there needs no network.

What to bring from a repository is said by a `Want`; here is how. The client is imported where it is used: who reads
local files never needs it.
"""

import errno
import glob
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .layout import files_in

_log = logging.getLogger("stable_diffusion")

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


@dataclass(frozen=True)
class Want:
    """What to bring from a repository.

    Attributes:
        what: the kind of thing, for messages.
        entries: files that say what else is needed; the first that a repository has counts.
        lacking: (folder, all files of the repository, repository) -> the files still to bring: small ones, and when
            these are there the weights. Raises ValueError for what this library does not read.
        assumed: the files that a repository at best has. Where the client kept no listing and these are at hand, no
            listing could offer better ones.
        remedy: what to do where there is neither network nor cache, for messages.
    """

    what: str
    entries: tuple[str, ...]
    lacking: Callable[[Path, set[str], str], list[str]]
    remedy: str
    assumed: frozenset[str] = frozenset()


class NotOnHub(ValueError):
    """The repository does not exist, or not for this user: a mirror may."""


def fetch(repos: tuple[str, ...], want: Want, revision: str | None = None) -> tuple[str, Path]:
    """(repository, folder) of the first that is complete in the cache, else of the first one that is on the Hub.

    Raises:
        ValueError: no such repository or revision, no access to it, or it has not what is wanted.
        OSError: no network and not in the cache, no space on the disk.
    """
    return _first_cached(repos, want, revision) or _first_on_hub(repos, want, revision)


def _first_cached(repos: tuple[str, ...], want: Want, revision: str | None) -> tuple[str, Path] | None:
    for repo in repos:
        folder = _snapshot(repo, want, revision)
        if folder and not want.lacking(folder, _listing(folder, repo, want), repo):
            return repo, folder
    return None


def _first_on_hub(repos: tuple[str, ...], want: Want, revision: str | None) -> tuple[str, Path]:
    *others, last = repos
    unreachable: ConnectionError | None = None
    for repo in others:
        try:
            return repo, _download(repo, want, revision)
        except NotOnHub:
            continue
        except ConnectionError as error:  # the cache may hold another of them, in either precision
            unreachable = unreachable or error
    try:
        return last, _download(last, want, revision)
    except ConnectionError as error:
        raise unreachable or error from error


def _snapshot(repo: str, want: Want, revision: str | None) -> Path | None:
    """The folder in the client's cache that holds this revision, perhaps not all of it. Makes no network call."""
    from huggingface_hub import try_to_load_from_cache

    for entry in want.entries:
        path = try_to_load_from_cache(repo, entry, revision=revision)
        if isinstance(path, str):
            return _root(path, entry)
    return None


def _root(path: str, name: str) -> Path:
    """The folder of a repository's files, from the path of the file that it calls ``name``."""
    return Path(path).parents[len(PurePosixPath(name).parts) - 1]


def _listing(folder: Path, repo: str, want: Want) -> set[str]:
    """The files of a repository, as the client noted them when it downloaded `folder`. Makes no network call.

    Where there is no note (an older client, or one that fetched single files) the repository may have better files
    than the cache, so the best ones are assumed.
    """
    with suppress(ImportError):  # of clients that do not keep the listing
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        with suppress(CachedRepoTreeNotFoundError):
            return {file.path for file in get_cached_repo_tree(repo, revision=folder.name)}
    return files_in(folder) | want.assumed


def _download(repo: str, want: Want, revision: str | None) -> Path:
    """Bring what is missing of one repository into the cache: first the small files, then the weights they call for."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **{"disable": None} | kwargs)  # shown on terminals only, as the client's others

    try:
        with one_line_errors(repo, revision):
            names = {file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings}
            entry = next((entry for entry in want.entries if entry in names), None)
            if entry is not None:
                folder = _root(hf_hub_download(repo, entry, revision=revision), entry)
        if entry is None:
            single = min((name for name in names if name.endswith((".safetensors", ".ckpt"))), default=None)
            remedy = f"; its files can be given by themselves, such as {repo}/{single}" if single else ""
            raise ValueError(f"{repo} is not {want.what}: it has no {' or '.join(want.entries)}{remedy}")
        for _ in ("small files", "weights"):
            missing = want.lacking(folder, names, repo)
            if unknown := [file for file in missing if file not in names]:
                raise ValueError(f"{repo} is not complete: it has no {', '.join(unknown)}")
            if missing:
                with one_line_errors(repo, revision):  # of one commit, so that all files belong together
                    wanted = [glob.escape(file) for file in missing]
                    snapshot_download(repo, revision=folder.name, allow_patterns=wanted, tqdm_class=Bar)
    except ConnectionError as error:
        return _without_network(repo, want, revision, error)
    return folder


def _without_network(repo: str, want: Want, revision: str | None, error: ConnectionError) -> Path:
    """What the cache holds, of either precision; when that is not enough, raises `error` with what is missing."""
    folder = _snapshot(repo, want, revision)
    missing = ["everything"]
    if folder:
        with suppress(ValueError):  # no weights of either precision
            if not want.lacking(folder, files_in(folder), repo):
                _log.warning("%s: using the weights in the cache, which may be of the other precision", error)
                return folder
        missing = want.lacking(folder, _listing(folder, repo, want), repo)
    raise ConnectionError(f"{error}; the cache on this machine lacks {', '.join(missing)}: {want.remedy}") from error


@contextmanager
def one_line_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the Hub client raises into one line that gives the reason and the remedy."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(f"{repo} is gated: accept its licence at {page} and run `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        raise NotOnHub(
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
