"""Write files and folders that appear complete under their name, or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

UNFINISHED: set[Path] = set()  # files being written; a process that exits early removes them


@contextmanager
def new_file(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a path to write to, which is renamed to ``path`` at the end of the block, or removed by an exception.

    It is hidden beside ``path``, and complete on the disk before it is renamed, so a power cut leaves no partial file.
    If several processes write the same file, the last one wins. Files left by a killed process are overwritten. Without
    ``overwrite``, an existing name raises FileExistsError, also if another process creates it meanwhile.
    """
    partial, handle = _claim(path)
    UNFINISHED.add(partial)
    try:
        yield partial
        _sync(partial)
        (os.replace if overwrite else _rename_new)(partial, path)
    finally:
        if _is_at(partial, handle):
            with suppress(OSError):
                partial.unlink()
        UNFINISHED.discard(partial)
        os.close(handle)


def _claim(path: Path) -> tuple[Path, int]:
    """Create a hidden file beside ``path``, or reuse a killed process's; returns it and the handle that locks it."""
    # Not tempfile: only the owner could read its files, also after renaming.
    for number in count():
        partial = path.with_name(f".{path.name[:50]}.{number}.partial")
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT, 0o666)
        if _lock(handle) and _is_at(partial, handle):  # the process that held the lock may have renamed it
            return partial, handle
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock a file or folder until this process ends; returns False if another process holds the lock."""
    with suppress(OSError):  # a network file system without locks cannot detect two runs
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _is_at(path: Path, handle: int) -> bool:
    with suppress(OSError):  # it is gone, or its folder is
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _rename_new(partial: Path, path: Path) -> None:
    """Rename a complete file; FileExistsError if the name is taken."""
    try:
        os.link(partial, path)
    except OSError:  # taken, or no hard links: then an empty file reserves the name
        path.touch(exist_ok=False)
        try:
            os.replace(partial, path)
        except OSError:
            path.unlink()
            raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder to fill, which is renamed to ``path`` at the end of the block, or removed by an exception.

    It is beside ``path`` until all its files are on the disk. The remains of a killed run are removed. Raises
    ValueError as :func:`check_new` does, and while another run is writing ``path``.
    """
    path = check_new(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        if not _lock(handle):
            raise ValueError(f"{path} is being written by another run: wait, or choose another name")
        try:
            for child in partial.iterdir():
                shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
            yield partial
            for written in (*partial.rglob("*"), partial):
                _sync(written)
            partial.rename(check_new(path))
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def check_new(path: Path) -> Path:
    """Make ``path`` absolute. Raises ValueError unless it is free, or an empty folder, in a folder that exists."""
    path = Path(os.path.expanduser(path)).resolve()
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: choose another name, or remove it")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose another name for the folder")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} for {path.name} does not exist: create it, or choose another place")
    return path


def check_space(path: Path, size: int) -> None:
    """Raise OSError when the disk of ``path`` has no room for ``size`` bytes."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        sizes = f"{path} needs {size / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left"
        raise OSError(f"{sizes}: free disk space, or choose another place")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
