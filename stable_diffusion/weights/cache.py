"""Cache arrays that take long to compute, in memory or in a folder that several runs share."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..files.whole import check_space, new_file
from .formats.safetensors import read_safetensors, write_safetensors

_log = logging.getLogger("stable_diffusion")


@dataclass(frozen=True)
class CacheEntry:
    """Describe cached arrays: ``key`` identifies them, ``size`` is in bytes, ``compute`` returns them by name."""

    key: tuple
    size: int
    compute: Callable[[], dict[str, mx.array]]


class ArrayCache:
    """Compute arrays once and keep them in float16, in memory or in ``folder``, under a hash of their key.

    Several runs may share a folder. Raises OSError if it cannot be created.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._kept: dict[tuple, dict[str, mx.array]] = {}
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"the cache {folder} cannot be created ({error.strerror}); choose another folder") from None

    def check_room(self, entries: Iterable[CacheEntry]) -> None:
        """Raise OSError if the disk has no room for the missing entries."""
        if self.folder is not None:
            missing = (entry for entry in entries if not self._has(entry))
            check_space(self.folder / "cache", sum(entry.size for entry in missing))

    def get(self, entry: CacheEntry) -> dict[str, mx.array]:
        """Return the arrays of an entry, evaluated. A damaged file is computed again, and the log says so."""
        path = self._path(entry)
        if entry.key in self._kept:
            return self._kept[entry.key]
        if path is not None and path.is_file():
            try:
                arrays, _ = read_safetensors(path)
                mx.eval(arrays)
                return arrays
            except ValueError as error:
                _log.warning("%s; computing it again", error)
        arrays = {name: array.astype(mx.float16) for name, array in entry.compute().items()}
        mx.eval(arrays)
        self._keep(entry, arrays)
        return arrays

    def exchange(self, entries: Sequence[CacheEntry], group: mx.distributed.Group) -> None:
        """Send every entry to all processes, bit for bit. Of N processes, number i % N provides entry i.

        This is a collective operation: all processes of the group call it with the same entries. A process keeps the
        entries that its folder already has.
        """
        for number, entry in enumerate(entries):
            is_own, content = number % group.size() == group.rank(), BytesIO()
            if is_own:
                mx.save_safetensors(content, self.get(entry))
            size = mx.distributed.all_sum(mx.array(content.tell()), group=group).item()
            sent = mx.array(content.getbuffer()) if is_own else mx.zeros(size, dtype=mx.uint8)
            received = bytes(memoryview(mx.distributed.all_sum(sent, group=group)))
            if not is_own and not self._has(entry):
                arrays = mx.load(BytesIO(received), format="safetensors")
                mx.eval(arrays)
                self._keep(entry, arrays)

    def _keep(self, entry: CacheEntry, arrays: dict[str, mx.array]) -> None:
        path = self._path(entry)
        if path is None:
            self._kept[entry.key] = arrays
            return
        with new_file(path) as partial:
            write_safetensors(partial, list(arrays), dict(arrays))

    def _has(self, entry: CacheEntry) -> bool:
        path = self._path(entry)
        return entry.key in self._kept if path is None else path.is_file()

    def _path(self, entry: CacheEntry) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(repr(entry.key).encode()).hexdigest()[:40]}.safetensors"


def hash_arrays(tree: Any, *about: object) -> str:
    """Return a hash of the arrays in a tree, with their paths, and of the values in ``about``."""
    digest = hashlib.sha256(repr(about).encode())
    for path, array in sorted(tree_flatten(tree)):
        digest.update(f"{path} {array.shape} {array.dtype}".encode())
        digest.update(memoryview(array.reshape(-1).view(mx.uint8)))
    return digest.hexdigest()
