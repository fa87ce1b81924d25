"""Identify a file by its first bytes, independent of its name."""

import struct
from pathlib import Path

# Other files that may have the name of a weights file: their first bytes and their kind.
_OTHERS = (
    (b"version https://git-lfs", "only a Git LFS pointer: fetch the file with `git lfs pull`"),
    (b"<", "a web page, not the file: download it again, perhaps after logging in"),
    ((b"{", b"["), "JSON text, perhaps the error message of a server: download the file again"),
    (b"\x89HDF\r\n", "an HDF5 file (Keras): use the .safetensors version"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"RIFF", "a WebP image or a sound"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a RAR archive: unpack it"),
    (b"BZh", "a bzip2 archive: unpack it"),
    (b"\xfd7zXZ", "an xz archive: unpack it"),
    (b"#!", "a script"),
    (b"Invalid username", "a server's request to log in: run `hf auth login`, then download the file"),
    (b"Entry not found", "a server's message that the file does not exist: check its name"),
    (b"Access to model", "a server's request to accept a licence: accept it, then download the file"),
)


def kind_of(path: Path) -> str:
    """Return "safetensors", "pickle", "gguf" or "" by the first bytes of a file; ValueError for other known kinds."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} is empty: download it again")
    length = struct.unpack("<Q", start[:8])[0] if len(start) > 8 else 0
    if start[8:9] == b"{" and length < 1 << 40:
        return "safetensors"
    if start.startswith((b"PK\3\4", b"\x80")):
        return "pickle"
    if start.startswith(b"GGUF"):
        return "gguf"
    if start[:1] == b"\x08" and b"\x12" in start[2:4]:  # the version of the format, then the name of the program
        raise ValueError(f"{path} is an ONNX model: use the .safetensors version")
    for beginning, what in _OTHERS:
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(beginning):
            raise ValueError(f"{path} is {what}")
    return ""
