"""Write modules as files that diffusers can read, tensor by tensor.

The model is never completely in memory: tensors are lazy, and each is computed, written and freed before the next one.
"""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .formats.safetensors import write_safetensors

# Linears that are 1×1 convolutions in diffusers' files; projections depend on the config.
_CONVOLUTIONS = re.compile(r"(^|\.)(conv_shortcut|(post_)?quant_conv|controlnet_(down_blocks\.\d+|mid_block))\.weight$")
_PROJECTIONS = re.compile(r"\.attentions\.\d+\.proj_(in|out)\.weight$")


def stored_tensors(module: nn.Module) -> dict[str, mx.array]:
    """Return a module's weights, lazy, under the names and in the layout [out, in, h, w] of diffusers' files.

    Quantized layers have no such layout: they stay MLX's packed ``weight`` with ``scales`` and ``biases``. Attached
    LoRAs are omitted.
    """
    tensors = {}
    for name, value in tree_flatten(module.parameters()):
        if ".loras." in name:  # factors of a wrapped layer
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

    Tensors are removed from the dictionary when they are written, so only one is in memory. Returns the files.
    Raises ValueError for a tensor with values that are not finite, OSError when the disk is full.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # imported only when needed

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
