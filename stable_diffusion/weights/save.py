"""Write modules as files that diffusers reads too, tensor by tensor, in a folder that appears complete or not at all.

Nothing here holds a model: tensors come lazy, and each is computed, written and dropped before the next one.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .formats.safetensors import write_safetensors

# Linears that are 1×1 convolutions in diffusers' files; the projections are only where the config does not say Linear.
_CONVOLUTIONS = re.compile(r"(^|\.)(conv_shortcut|(post_)?quant_conv|controlnet_(down_blocks\.\d+|mid_block))\.weight$")
_PROJECTIONS = re.compile(r"\.attentions\.\d+\.proj_(in|out)\.weight$")


def stored_tensors(module: nn.Module) -> dict[str, mx.array]:
    """Return a module's weights, lazy, under the names and in the layout [out, in, h, w] of diffusers' files.

    Quantized layers have no such layout: they stay MLX's packed ``weight`` with ``scales`` and ``biases``. Attached
    LoRAs are left out.
    """
    tensors = {}
    for name, value in tree_flatten(module.parameters()):
        if ".loras." in name:  # beside the weights of a layer that is wrapped
            continue
        name = name.replace(".base.", ".")
        if value.ndim == 4:
            value = value.transpose(0, 3, 1, 2)
        elif value.dtype != mx.uint32 and is_convolution(module, name):
            value = value[..., None, None]
        tensors[name] = value
    return tensors


def is_convolution(module: nn.Module, name: str) -> bool:
    """Return whether the weight of a Linear is stored in the shape of a 1×1 convolution."""
    linear = getattr(getattr(module, "config", None), "use_linear_projection", True)
    return bool(_CONVOLUTIONS.search(name) or (_PROJECTIONS.search(name) and not linear))


def write_weights(folder: Path, stem: str, tensors: dict[str, mx.array], max_shard_size: int) -> list[Path]:
    """Write ``tensors`` as ``stem``.safetensors, or as shards of ``max_shard_size`` bytes at most and their index.

    They are taken out of the dictionary as they are written, so that no more than one is in memory. Returns the files.
    Raises ValueError for a tensor with values that are not finite, OSError when the disk is full.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # not before it is needed

    split = split_state_dict_into_shards_factory(
        {name: value.nbytes for name, value in tensors.items()},
        get_storage_size=int,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, names, tensors)
    return [folder / file for file in split.filename_to_tensors]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as diffusers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder to fill, which becomes ``path`` at the end of the block, or vanishes with an exception.

    It stands beside ``path`` until all of it is on the disk. What a killed run left of the same folder is removed.
    Raises ValueError as :func:`check_new`, and while another run is writing ``path``.
    """
    path = check_new(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # a network's file system without locks: two runs at once are not noticed there
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until this process ends, however it ends
            except BlockingIOError:
                raise ValueError(f"{path} is being written by another run: wait, or choose another name") from None
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


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give a path to write to, which becomes ``path`` at the end of the block, or vanishes with an exception.

    It is beside ``path``. What a killed run left there is overwritten.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def check_new(path: Path) -> Path:
    """Make ``path`` absolute. Raises ValueError unless it is free, or an empty folder, in a folder that exists."""
    path = Path(os.path.expanduser(path)).resolve()
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: choose another name, or remove it")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose another name for the folder")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to make {path.name} in: make it, or choose another place")
    return path


def check_space(path: Path, size: int) -> None:
    """Raise OSError when the disk of ``path`` has no room for ``size`` bytes."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        sizes = f"{path} needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left"
        raise OSError(f"{sizes}: make room, or choose another place")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
