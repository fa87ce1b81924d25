"""Identify model files by hashes, without reading all of a large one.

Files up to 256 MB, and files in the Hub's cache, which are named by it, have their SHA-256. For a larger file the hash
covers its size and 64 pieces of 64 kB spread over it: 4 MB are read instead of 7 GB.
"""

import hashlib
import re
import stat
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

HASHES = {"sha256", "sampled"}
_LARGEST = 256 * 10**6  # bytes of a file that is hashed completely
_PIECES, _PIECE = 64, 2**16
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)/")


def fingerprint(path: Path) -> dict[str, str]:
    """Return a file's "sha256" or "sampled" hash, and "hub", owner/name@commit, if known; {} without a file."""
    match = _SNAPSHOT.search(path.absolute().as_posix())
    hub = {"hub": f"{match[1]}/{match[2]}@{match[3]}"} if match else {}
    with suppress(OSError):
        path = path.resolve()
        if path.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", path.name):
            return {"sha256": path.name} | hub
        return _hash(path) | hub
    return {}


def model_hash(path: Path) -> str | None:
    """Return the hash by which other programs look up a model: ten digits of its SHA-256.

    For a large file it is AUTOMATIC1111's old hash: eight digits, for the 64 kB after the first megabyte.
    """
    if digest := fingerprint(path).get("sha256"):
        return digest[:10]
    with suppress(OSError), path.open("rb") as file:
        file.seek(2**20)
        return hashlib.sha256(file.read(2**16)).hexdigest()[:8]
    return None


def lora_hash(path: Path) -> str | None:
    """Return the hash by which other programs look up a LoRA, twelve digits; None for large files, which take long."""
    with suppress(OSError, struct.error):
        start = 0
        if path.suffix == ".safetensors":  # the hash excludes the header
            with path.open("rb") as file:
                start = 8 + struct.unpack("<Q", file.read(8))[0]
        if digest := _hash(path, start).get("sha256"):
            return digest[:12]
    return None


def _hash(path: Path, start: int = 0) -> dict[str, str]:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # pipes and devices have no end
        return {}
    return _hash_of_state(path, start, status.st_size, status.st_mtime_ns)


@cache
def _hash_of_state(path: Path, start: int, size: int, time: int) -> dict[str, str]:
    with path.open("rb") as file:
        if size <= _LARGEST:
            digest, left = hashlib.sha256(), size - start  # at most its size: files in /proc hold more
            file.seek(start)
            while left > 0 and (piece := file.read(min(2**20, left))):
                digest.update(piece)
                left -= len(piece)
            return {"sha256": digest.hexdigest()}
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for i in range(_PIECES):
            file.seek(i * (size - _PIECE) // (_PIECES - 1))
            digest.update(file.read(_PIECE))
        return {"sampled": digest.hexdigest()}
