"""What tells files apart, without reading all of those that are large.

Files up to 256 MB, and those in the Hub's cache, which are named by it, have their SHA-256. Of a larger one 64 pieces
of 64 kB spread over it are hashed, with its size: 4 MB are read in place of 7 GB, and trained models differ all over.
"""

import hashlib
import re
import struct
from functools import cache
from pathlib import Path

KINDS = {"sha256", "sampled"}
_WHOLE = 256 * 10**6  # bytes of the largest file that is hashed as a whole
_PIECES, _PIECE = 64, 2**16
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([^/]+)/")


def fingerprint(path: Path) -> dict[str, str]:
    """ "sha256", or of large files "sampled"; and "hub", owner/name@commit, of one of the Hub. Empty without a file."""
    try:
        place = _SNAPSHOT.search(path.absolute().as_posix())
        hub = {"hub": f"{place[1]}/{place[2]}@{place[3]}"} if place else {}
        path = path.resolve()
        if path.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", path.name):
            return {"sha256": path.name} | hub
        return _hashed(*_state(path)) | hub
    except OSError:
        return {}


def model_hash(path: Path) -> str | None:
    """What other programs look models up by: ten digits of the SHA-256, or, where that is not known, their older eight.

    Those are of 64 kB from the second megabyte on, as AUTOMATIC1111's web UI had them at first.
    """
    if whole := fingerprint(path).get("sha256"):
        return whole[:10]
    try:
        with path.open("rb") as file:
            file.seek(2**20)
            return hashlib.sha256(file.read(2**16)).hexdigest()[:8]
    except OSError:
        return None


def lora_hash(path: Path) -> str | None:
    """What other programs look LoRAs up by: twelve digits of the SHA-256 of what follows a safetensors file's header.

    None of large files, which would take too long, and of those that are gone.
    """
    try:
        state = _state(path.resolve())
        return _tensors(*state)[:12] if state[1] <= _WHOLE else None
    except (OSError, struct.error):
        return None


def _state(path: Path) -> tuple[Path, int, int]:
    """A path and what changes with the file: while it stays as it is, it is read once in a process."""
    status = path.stat()
    return path, status.st_size, status.st_mtime_ns


@cache
def _hashed(path: Path, size: int, _: int) -> dict[str, str]:
    if size <= _WHOLE:
        return {"sha256": _sha256(path, 0)}
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for i in range(_PIECES):
            file.seek(i * (size - _PIECE) // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return {"sampled": digest.hexdigest()}


@cache
def _tensors(path: Path, size: int, _: int) -> str:
    if path.suffix != ".safetensors":
        return _sha256(path, 0)
    with path.open("rb") as file:
        header = struct.unpack("<Q", file.read(8))[0]
    return _sha256(path, 8 + header)


def _sha256(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
