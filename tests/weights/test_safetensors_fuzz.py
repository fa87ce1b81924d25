"""Damaged safetensors files: each is refused in one line, or read with the shapes that its header gives."""

import json
import random
import struct
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mutations import mutate
from stable_diffusion.weights.files import Component, read_tensors

TENSORS = {
    "down_blocks.0.weight": ("F32", [4, 3], np.arange(12, dtype="<f4").tobytes()),
    "down_blocks.0.bias": ("F16", [5], np.arange(5, dtype="<f2").tobytes()),
    "ids": ("I64", [1, 2], np.arange(2, dtype="<i8").tobytes()),
    "number": ("BF16", [], b"\x80\x3f"),
    "none": ("U8", [0, 7], b""),
}


def header() -> bytes:
    entries, place = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in TENSORS.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(data)]}
        place += len(data)
    return json.dumps(entries).encode()


def whole(head: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head + b"".join(data for _, _, data in TENSORS.values())


def damaged_anywhere(rng: random.Random) -> bytes:
    return mutate(whole(header()), rng)


def damaged_header(rng: random.Random) -> bytes:
    """With a length that is right, as an attacker makes it."""
    return whole(mutate(header(), rng))


def other_values(rng: random.Random) -> bytes:
    """A header that is JSON, in which one value is something else."""
    entries = json.loads(header())
    name = rng.choice(list(TENSORS))
    telling = [-1, 0, 1, 2, 3, 2**31, 2**32, 2**63, 2**64, 2**64 - 8, 1e300, 1.5, "4", None, True, [], {}, [[1]], "F32"]
    key = rng.choice(["dtype", "shape", "data_offsets"])
    match rng.randrange(6):
        case 0:
            entries[name][key] = rng.choice(telling)
        case 1 if entries[name]["shape"]:
            entries[name]["shape"][rng.randrange(len(entries[name]["shape"]))] = rng.choice(telling)
        case 2:
            entries[name]["data_offsets"][rng.randrange(2)] = rng.choice(telling)
        case 3:
            entries[name]["dtype"] = rng.choice(["F64", "F8_E4M3", "C64", "BOOL", "I16", "F32", "", "x"])
        case 4:
            entries[rng.choice(["new", "", "\n", "__metadata__"])] = rng.choice([entries[name], *telling])
        case _:
            del entries[name]
    return whole(json.dumps(entries).encode())


def test_the_undamaged_file(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(whole(header()))
    ours = read_tensors(Component("unet", {}, (tmp_path / "x.safetensors",)))
    assert {name: list(value.shape) for name, value in ours.items()} == {name: t[1] for name, t in TENSORS.items()}
    assert ours["ids"].tolist() == [[0, 1]] and ours["number"].item() == 1


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damaged", [damaged_anywhere, damaged_header, other_values])
def test_damaged_files(tmp_path: Path, damaged, count):
    rng = random.Random(count)
    path, read = tmp_path / "x.safetensors", 0
    for _ in range(count):
        data = damaged(rng)
        path.write_bytes(data)
        try:
            ours = read_tensors(Component("unet", {}, (path,)))
            mx.eval(ours)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        read += 1
        entries = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])
        entries.pop("__metadata__", None)
        assert ours.keys() == entries.keys()
        for name, value in ours.items():
            first, end = entries[name]["data_offsets"]
            assert list(value.shape) == entries[name]["shape"]
            assert value.nbytes == end - first == prod(entries[name]["shape"]) * value.itemsize
            begin = len(data) - len(whole(b"")) + 8
            stored = data[begin + first : begin + end]
            assert np.array(mx.contiguous(value).reshape(-1).view(mx.uint8)).tobytes() == stored
    print(f"{count} damaged files: {read} were read")
    assert count / 100 < read < count / 2
