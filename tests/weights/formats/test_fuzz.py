"""Small damages to files, as disks, connections and attackers do them: refused in one line, or read rightly."""

import io
import json
import random
import struct
import zipfile
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from hub_server import safetensors
from stable_diffusion.weights.files import read_file

COUNTS = pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
_TELLING = [b"\0", b"\xff", b"\x7f", b"\x80", b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\xff" * 8, b"\0" * 8]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to three changes: flipped bits, other bytes, a piece moved, left out, doubled, or cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place, other = rng.randrange(len(changed) + 1), rng.randrange(len(changed) + 1)
        length = rng.choice([1, 2, 4, 8, 16, 64])
        match rng.randrange(8):
            case 0 | 1 | 2:
                if place < len(changed):
                    changed[place] ^= 1 << rng.randrange(8)
            case 3:
                telling = rng.choice(_TELLING)
                changed[place : place + len(telling)] = telling
            case 4:
                changed[place : place + length] = changed[other : other + length]
            case 5:
                del changed[place : place + length]
            case 6:
                changed[place:place] = changed[other : other + length]
            case 7:
                del changed[place:]
    return bytes(changed)


def read(path: Path, data: bytes) -> dict[str, mx.array] | None:
    """The tensors of a file with this content, or None where it is refused in one line with its name."""
    path.write_bytes(data)
    try:
        ours, _ = read_file(path)
        mx.eval(ours)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        assert path.suffix != ".ckpt" or str(error).isprintable()
        return None
    return ours


# --- safetensors -----------------------------------------------------------------------------------------------------


def whole(head: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(head)) + head + data


TENSORS = {"down_blocks.0.weight": mx.arange(12.0).reshape(4, 3), "down_blocks.0.bias": mx.arange(5).astype(mx.float16)}
TENSORS |= {"ids": mx.array([[0, 1]]), "number": mx.array(1.0, dtype=mx.bfloat16), "none": mx.zeros((0, 7), mx.uint8)}
TENSORS |= {"flag": mx.array([True, False])}
GOOD = safetensors(**TENSORS)
LENGTH = struct.unpack_from("<Q", GOOD)[0]
HEADER, DATA = GOOD[8 : 8 + LENGTH], GOOD[8 + LENGTH :]


def with_other_values(rng: random.Random) -> bytes:
    """A header that is JSON, in which one value is something else."""
    entries = json.loads(HEADER)
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
    return whole(json.dumps(entries).encode(), DATA)


DAMAGES = {
    "anywhere": lambda rng: mutate(GOOD, rng),
    "the header": lambda rng: whole(mutate(HEADER, rng), DATA),  # with a length that is right, as an attacker makes it
    "its values": with_other_values,
}


@COUNTS
@pytest.mark.parametrize("damaged", DAMAGES.values(), ids=DAMAGES)
def test_safetensors(tmp_path, damaged, count):
    path, good, rng = tmp_path / "x.safetensors", 0, random.Random(count)
    assert read(path, GOOD).keys() == TENSORS.keys()
    for _ in range(count):
        data = damaged(rng)
        if (ours := read(path, data)) is None:
            continue
        good += 1
        entries = json.loads(data[8 : 8 + struct.unpack_from("<Q", data)[0]])
        entries.pop("__metadata__", None)
        assert ours.keys() == entries.keys()
        begin = len(data) - len(DATA)
        for name, value in ours.items():
            first, end = entries[name]["data_offsets"]
            assert list(value.shape) == entries[name]["shape"]
            if entries[name]["dtype"] in ("F64", "F8_E4M3", "F8_E5M2"):  # which are cast
                continue
            assert value.nbytes == end - first == prod(entries[name]["shape"]) * value.itemsize
            stored = data[begin + first : begin + end]
            assert np.array(mx.contiguous(value).reshape(-1).view(mx.uint8)).tobytes() == stored
    assert count / 100 < good < count / 2


# --- torch's files ---------------------------------------------------------------------------------------------------


def saved(zipped: bool = True) -> bytes:
    """A small checkpoint with what pickles of torch consist of."""
    grid, buffer = torch.arange(24.0).reshape(4, 6), io.BytesIO()
    weights = {"a.weight": grid, "b.weight": grid.T, "half": grid[1:, 2].half(), "parameter": torch.nn.Parameter(grid)}
    value = {"state_dict": weights | {"number": torch.tensor(7)}, "step": 470000, "rate": [1e-4, None, True]}
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def with_damaged_pickle(data: bytes, rng: random.Random) -> bytes:
    """An archive whose pickle is damaged and whose checksums are right, as an attacker makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, mutate(content, rng) if name.endswith("data.pkl") else content)
    return buffer.getvalue()


def as_torch(path: Path) -> dict[str, torch.Tensor] | None:
    """What torch reads, or None where it refuses."""
    try:
        value = torch.load(path, weights_only=True)
        value = value["state_dict"] if isinstance(value.get("state_dict"), dict) else value
    except Exception:
        return None
    return {name: tensor.detach() for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}


@COUNTS
@pytest.mark.parametrize(
    "data, damaged",
    [(saved(), mutate), (saved(), with_damaged_pickle), (saved(zipped=False), mutate)],
    ids=["archive", "pickle", "older"],
)
def test_pickles(tmp_path, data, damaged, count):
    path, good, compared, rng = tmp_path / "x.ckpt", 0, 0, random.Random(count)
    for _ in range(count):
        changed = damaged(data, rng)
        if (ours := read(path, changed)) is None:
            continue
        good += 1
        if (theirs := as_torch(path)) is not None:
            compared += 1
            for name, tensor in theirs.items():
                assert np.array_equal(np.array(ours[name]), tensor.numpy(), equal_nan=True), name
    assert count / 50 < good < count / 2 and compared > good / 2
