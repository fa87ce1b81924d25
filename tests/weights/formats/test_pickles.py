"""torch's files without torch: equal to what torch reads, and nothing in them runs, whatever they hold."""

import gc
import os
import sys
import time
import types
from collections import OrderedDict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from stable_diffusion.weights.formats import pickles

ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["archive", "older"])
DTYPES = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
LATER = ["uint16", "uint32", "uint64"]  # torch does not read these back from the older format


def read_pickle(path: Path) -> dict[str, mx.array]:
    return pickles.read_pickle(path)[0]


def save(path: Path, value: object, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(ours: mx.array, theirs: torch.Tensor) -> None:
    """Equal shapes, types (but float64, which becomes float32) and bits."""
    theirs = theirs.detach()
    theirs = theirs.float() if theirs.dtype == torch.float64 else theirs
    assert tuple(ours.shape) == tuple(theirs.shape)
    assert str(ours.dtype).removeprefix("mlx.core.").rstrip("_") == str(theirs.dtype).removeprefix("torch.")
    bits = mx.contiguous(ours).reshape(-1).view(mx.uint8)
    assert np.array(bits).tobytes() == theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_as_torch_reads(path: Path) -> None:
    theirs = torch.load(path, weights_only=True)
    ours = read_pickle(path)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert_same(ours[name], tensor)


def varied(dtypes: list[str] = DTYPES) -> dict[str, torch.Tensor]:
    """Tensors of every type, and every way in which one can lie in its storage."""
    values = torch.randn(60, generator=torch.Generator().manual_seed(1)) * 50
    grid = values.reshape(4, 15)
    tensors = {f"type {name}": values.abs().to(getattr(torch, name)) for name in dtypes}
    tensors |= {"transposed": grid.T, "columns": grid[:, 3:9:2], "row": grid[2], "whole": values, "rows": grid[1:3]}
    tensors |= {"permuted": values.reshape(3, 4, 5).permute(2, 0, 1), "channels last": torch.randn(2, 3, 4, 5)}
    tensors["channels last"] = tensors["channels last"].to(memory_format=torch.channels_last)
    tensors |= {"repeated": torch.ones(1).expand(3, 4), "number": torch.tensor(3.5), "none": torch.empty(0, 3)}
    tensors |= {"narrow double": torch.arange(10.0, dtype=torch.float64)[2:9:3], "one": values[7:8, None]}
    tensors["parameter"] = torch.nn.Parameter(torch.ones(2, 3))
    return tensors


@ZIPPED
def test_every_type_and_every_view(tmp_path, zipped):
    assert_as_torch_reads(save(tmp_path / "x.ckpt", varied(DTYPES + LATER if zipped else DTYPES), zipped))


@ZIPPED
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_protocol_that_torch_can_be_told_to_use(tmp_path, protocol, zipped):
    tensors = {"a": torch.ones(2), "b": torch.arange(6).reshape(2, 3).T}
    torch.save(tensors, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    for name, value in read_pickle(tmp_path / "x.pt").items():
        assert_same(value, tensors[name])


@ZIPPED
def test_the_weights_of_a_module(tmp_path, zipped):
    """An OrderedDict with the versions of the modules as an attribute; two names for one tensor; buffers."""
    linear = torch.nn.Linear(4, 4)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), linear, linear)
    assert_as_torch_reads(save(tmp_path / "x.bin", module.state_dict(), zipped))
    assert_as_torch_reads(save(tmp_path / "x.bin", OrderedDict(module.named_parameters()), zipped))


@ZIPPED
def test_the_checkpoint_of_a_trainer(tmp_path, monkeypatch, zipped):
    """As PyTorch Lightning writes it: weights beside callbacks (whose class is a key), optimizer and counters."""
    path = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(path)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": path})
    with monkeypatch.context() as patched:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", path):
            patched.setitem(sys.modules, name, module)
        weight = torch.nn.Parameter(torch.randn(3, 4))
        optimizer = torch.optim.AdamW([weight])
        weight.sum().backward()
        optimizer.step()
        score = {"best_model_score": np.float64(0.25), "kept": np.int64(7), "seen": np.bool_(True), "last": None}
        checkpoint = {
            "epoch": 3,
            "global_step": 470000,
            "callbacks": {module.ModelCheckpoint: {"monitor": "val/loss", "scale": np.float32(1.5), **score}},
            "optimizer_states": [optimizer.state_dict()],
            "lr_schedulers": [{"last": [1e-4], "big": 2**40}],
            "state_dict": OrderedDict({"model.weight": weight, "model.half": torch.ones(3).half()}),
        }
        save(tmp_path / "x.ckpt", checkpoint, zipped)
    ours = read_pickle(tmp_path / "x.ckpt")
    assert list(ours) == ["model.weight", "model.half"]
    assert_same(ours["model.weight"], weight)
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)


@pytest.mark.parametrize("outer", [("state_dict",), ("model",), ("model", "state_dict"), ()])
def test_wrappers(tmp_path, outer):
    value = {"weight": torch.ones(2), "step": 7, "more": {"x": torch.ones(1)}, 3: torch.ones(1)}
    for name in reversed(outer):
        value = {"epoch": 1, name: value, "other": torch.zeros(3)}
    ours = read_pickle(save(tmp_path / "x.ckpt", value))
    assert list(ours) == ["weight"] and ours["weight"].tolist() == [1, 1]


def test_texts_beside_the_tensors(tmp_path):
    value = {"list": [1, -2, 2**40, -(2**70), 1.5, True, None, "ü", b"xyz"], "name": "ü", "x": torch.ones(1)}
    value |= {"tuple": (1, (2,)), "size": torch.Size([2, 3]), "dtype": torch.float16, 3: "no name"}
    for zipped in (True, False):
        tensors, texts = pickles.read_pickle(save(tmp_path / "x.pt", value, zipped))
        assert texts == {"name": "ü"} and list(tensors) == ["x"]


def test_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        assert_as_torch_reads(save(tmp_path / "x.ckpt", varied()))
    finally:
        torch.serialization.set_crc32_options(before)


# --- laziness --------------------------------------------------------------------------------------------------------


def large(path: Path, zipped: bool) -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": torch.arange(i, i + 250_000, dtype=torch.float32).reshape(500, 500) for i in range(10)}
    tensors["transposed"] = tensors["t3"].T
    save(path, tensors, zipped)
    return tensors


@ZIPPED
def test_nothing_is_read_before_it_is_needed(tmp_path, zipped):
    tensors = large(tmp_path / "x.ckpt", zipped)
    gc.collect()
    before, descriptors = mx.get_active_memory(), len(os.listdir("/dev/fd"))
    ours = read_pickle(tmp_path / "x.ckpt")
    assert mx.get_active_memory() - before < 10_000
    assert len(os.listdir("/dev/fd")) == descriptors + 1  # one file is open, whatever the number of tensors
    os.unlink(tmp_path / "x.ckpt")  # what is open can still be read
    mx.eval(ours["t5"])
    assert 1_000_000 <= mx.get_active_memory() - before < 1_100_000
    assert_same(ours["t5"], tensors["t5"])
    assert_same(ours["transposed"], tensors["transposed"])
    del ours
    gc.collect()
    for _ in range(100):  # MLX's thread may not have let go of what it has just read
        if len(os.listdir("/dev/fd")) > descriptors:
            time.sleep(0.02)
    assert len(os.listdir("/dev/fd")) == descriptors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_a_disk_without_room_for_the_copy(tmp_path, monkeypatch):
    large(tmp_path / "x.ckpt", zipped=True)
    full = Path("/dev/full").open("w+b")  # noqa: SIM115  (the reader closes it)
    monkeypatch.setattr("tempfile.NamedTemporaryFile", lambda **options: full)
    with pytest.raises(ValueError, match=r"x\.ckpt is not loaded: .*No space left on device; download it again"):
        read_pickle(tmp_path / "x.ckpt")
