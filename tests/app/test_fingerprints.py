"""Hashes of files: what they cover, what is read for them, and which other programs know."""

import hashlib
import os

import numpy as np
import pytest

from cli.test_images import write_lora
from stable_diffusion.app import fingerprints
from stable_diffusion.app.fingerprints import fingerprint, lora_hash, model_hash


def test_hashes_of_small_files(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    for data in (b"abc" * 1000, b"abd" * 1000):
        path.write_bytes(data)
        whole = hashlib.sha256(data).hexdigest()
        assert fingerprint(path) == {"sha256": whole} and model_hash(path) == whole[:10]
    assert fingerprint(tmp_path / "none") == fingerprint(tmp_path) == {} and model_hash(tmp_path / "none") is None
    monkeypatch.setattr(hashlib, "sha256", None)  # a file is read once
    assert fingerprint(path) == {"sha256": whole}


@pytest.mark.parametrize("name", ["/dev/zero", "/proc/self/pagemap", "/dev/stdin", "pipe", "."])
def test_what_has_no_end_is_not_read(tmp_path, name):
    """A file of /proc has 0 bytes by its size, and gives terabytes."""
    if name == "pipe":
        os.mkfifo(tmp_path / name)
    empty = {"sha256": hashlib.sha256().hexdigest()}
    assert fingerprint(tmp_path / name) in ({}, empty) and lora_hash(tmp_path / name) in (None, empty["sha256"][:12])


def test_hashes_of_large_files(tmp_path, monkeypatch):
    """Not all of them is read; a change of a few hundred kB shows wherever it is."""
    monkeypatch.setattr(fingerprints, "_LARGEST", 10**6)
    data = np.random.default_rng(0).integers(0, 256, 12 * 2**20, dtype=np.uint8)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data.tobytes())
    first = fingerprint(path)
    assert first.keys() == {"sampled"} and lora_hash(path) is None
    assert model_hash(path) == hashlib.sha256(data[2**20 : 2**20 + 2**16].tobytes()).hexdigest()[:8]
    for place in (0, 5 * 2**20, len(data) - 1):
        changed = data.copy()
        changed[place : place + 2**18] += 1
        path.write_bytes(changed.tobytes())
        os.utime(path, ns=(1, place))
        assert fingerprint(path)["sampled"] != first["sampled"]
    path.write_bytes(data.tobytes() + b"\0")
    assert fingerprint(path)["sampled"] != first["sampled"]


def test_files_of_the_hub_are_not_read(tmp_path):
    digest, folder = "0123456789abcdef" * 4, tmp_path / "models--some--one"
    snapshot = folder / "snapshots" / "abc123" / "unet"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    # Small files are named by another hash.
    for name, blob, sha256 in (("a", digest, digest), ("b", "short", hashlib.sha256(b"x").hexdigest())):
        (folder / "blobs" / blob).write_bytes(b"x")
        (snapshot / name).symlink_to(folder / "blobs" / blob)
        assert fingerprint(snapshot / name) == {"sha256": sha256, "hub": "some/one@abc123"}


def test_hashes_of_loras_are_of_what_follows_the_header(tmp_path):
    path = tmp_path / "more.safetensors"
    write_lora(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert lora_hash(path) == hashlib.sha256(data[start:]).hexdigest()[:12]
    for name, expected in (("a.pt", hashlib.sha256(b"xyz").hexdigest()[:12]), ("short.safetensors", None)):
        (tmp_path / name).write_bytes(b"xyz")
        assert lora_hash(tmp_path / name) == expected
    assert lora_hash(tmp_path / "none.safetensors") is None
