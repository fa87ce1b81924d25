"""Damaged files of torch: each is refused in one line, or read as torch reads it."""

import io
import pickle
import random
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mutations import mutate
from stable_diffusion.weights.formats.pickles import read_pickle


def checkpoint() -> dict:
    """A small checkpoint with what pickles of torch consist of."""
    grid = torch.arange(24.0).reshape(4, 6)
    weights = {"a.weight": grid, "b.weight": grid.T, "half": grid[1:, 2].half(), "parameter": torch.nn.Parameter(grid)}
    return {"state_dict": weights | {"number": torch.tensor(7)}, "step": 470000, "rate": [1e-4, None, True]}


def saved(zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(checkpoint(), buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def with_damaged_pickle(data: bytes, rng: random.Random) -> bytes:
    """An archive whose pickle is damaged and whose checksums are right, as an attacker makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, mutate(content, rng) if name.endswith("data.pkl") else content)
    return buffer.getvalue()


class Describing(pickle.Unpickler):
    """Python's own reader, for which a tensor is its shape. Knows no names but those of the checkpoint."""

    def find_class(self, module: str, name: str) -> object:
        if name.startswith("_rebuild_tensor"):
            return lambda storage, offset, shape, strides, *rest: np.empty(shape)
        return {"_rebuild_parameter": lambda tensor, *rest: tensor, "OrderedDict": lambda *pairs: {}}.get(name, name)

    def persistent_load(self, place: object) -> object:
        return place


def described(data: bytes) -> dict[str, tuple[int, ...]]:
    """The shapes that the pickle in a file gives, read by Python."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            (name,) = (name for name in file.namelist() if name.endswith("data.pkl"))
            return shapes(Describing(io.BytesIO(file.read(name))).load())
    stream = io.BytesIO(data)
    *_, value = (Describing(stream).load() for _ in range(4))
    return shapes(value)


def shapes(value: object) -> dict[str, tuple[int, ...]]:
    value = value["state_dict"] if isinstance(value.get("state_dict"), dict) else value
    return {
        name: array.shape for name, array in value.items() if isinstance(array, np.ndarray) and isinstance(name, str)
    }


def as_torch(path: Path) -> dict[str, torch.Tensor] | None:
    """What torch reads, or None where it refuses."""
    try:
        value = torch.load(path, weights_only=True)
        value = value["state_dict"] if isinstance(value.get("state_dict"), dict) else value
    except Exception:
        return None
    return {name: tensor.detach() for name, tensor in value.items() if isinstance(tensor, torch.Tensor)}


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "whole, damaged",
    [(saved(), mutate), (saved(), with_damaged_pickle), (saved(zipped=False), mutate)],
    ids=["archive", "pickle", "older"],
)
def test_damaged_files(tmp_path, whole, damaged, count):
    rng = random.Random(count)
    path = tmp_path / "x.ckpt"
    read, compared = 0, 0
    for _ in range(count):
        data = damaged(whole, rng)
        path.write_bytes(data)
        try:
            ours, _ = read_pickle(path)
            mx.eval(ours)
        except ValueError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()
            continue
        read += 1
        if (theirs := as_torch(path)) is not None:
            compared += 1
            for name, tensor in theirs.items():
                assert np.array_equal(np.array(ours[name]), tensor.numpy(), equal_nan=True), name
        else:
            assert {name: value.shape for name, value in ours.items()} == described(data)
    print(f"{count} damaged files: {read} were read, {compared} of them also by torch")
    assert count / 50 < read < count / 2 and compared > read / 2
