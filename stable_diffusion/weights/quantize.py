"""Quantize a model's matrices, one at a time, so that the unquantized model never stands in memory."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .parts import PARTS

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = {name: PARTS[name].group_size for name in ("unet", "text_encoder", "text_encoder_2")}

_EMBEDDING_BITS = 8  # a prompt's words are looked up, not summed: fewer bits would show and save little
_MLX_GROUP_SIZES = (32, 64, 128)


def quantize(module: nn.Module, bits: int, group_size: int) -> nn.Module:
    """Quantize ``module`` in place: every Linear whose width divides by ``group_size``, and token embeddings at 8 bits.

    Convolutions (also the 1×1 ones that are Linears here), norms and position embeddings keep their type. Weights that
    are still lazy are read, quantized and dropped one by one. What is quantized already stays as it is. Raises
    ValueError for a number of bits that MLX has no kernel for.
    """
    quantize_lazily(module, bits, group_size)
    for _, layer in module.named_modules():
        if isinstance(layer, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            mx.eval(layer.parameters())  # one matrix at a time bounds the peak; its unquantized source is freed here
    return module


def quantize_lazily(module: nn.Module, bits: int, group_size: int) -> nn.Module:
    """Quantize as ``quantize`` does without reading anything: each matrix is quantized when it is evaluated."""
    if bits not in BITS:
        raise ValueError(f"quantization to {bits} bits is not possible; choose one of {', '.join(map(str, BITS))}")

    def settings(path: str, layer: nn.Module) -> bool | dict[str, int]:
        if not hasattr(layer, "to_quantized") or layer.weight.shape[-1] % group_size:
            return False
        if isinstance(layer, nn.Linear):
            return not path.endswith(("conv_shortcut", "quant_conv"))
        if isinstance(layer, nn.Embedding) and path.endswith("token_embedding"):
            return {"bits": max(bits, _EMBEDDING_BITS), "group_size": group_size}
        return False

    nn.quantize(module, group_size=group_size, bits=bits, class_predicate=settings)
    return module


def read_quantization(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (bits, group size) of the weights that a ``config.json`` belongs to, None when they are not quantized.

    The key is ``"quantization": {"bits": 8, "group_size": 32}``. Raises ValueError for values that MLX does not have.
    """
    value = config.get("quantization")
    if value is None:
        return None
    bits, group_size = (value.get("bits"), value.get("group_size")) if isinstance(value, dict) else (None, None)
    if bits not in BITS or group_size not in _MLX_GROUP_SIZES:
        raise ValueError(
            f"quantization={value!r} is not one that this library reads: bits of {', '.join(map(str, BITS))} "
            f"and a group_size of {', '.join(map(str, _MLX_GROUP_SIZES))}; convert the model again"
        )
    return bits, group_size


def remaining_quantization(config: Mapping[str, Any], quantization: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return ``quantization``, (bits, group size), or None for weights that are stored in that number of bits.

    Raises ValueError for weights that are stored in another one.
    """
    stored = read_quantization(config)
    if stored and quantization and stored[0] != quantization[0]:
        raise ValueError(
            f"its weights are stored in {stored[0]} bits, not in {quantization[0]}: "
            "leave them as they are, or take the model that they were made from"
        )
    return None if stored else quantization


def prepare_quantized(module: nn.Module, tensors: Mapping[str, mx.array], group_size: int) -> nn.Module:
    """Turn the layers of ``module`` whose ``tensors`` are quantized into quantized ones, to be filled with these.

    A layer is quantized where it has ``scales``; its bits follow from the width of its packed ``weight``. Layers whose
    shapes make no sense stay as they are, so that filling them names what is wrong.
    """

    def settings(path: str, layer: nn.Module) -> bool | dict[str, int]:
        packed, scales = tensors.get(f"{path}.weight"), tensors.get(f"{path}.scales")
        if not isinstance(layer, (nn.Linear, nn.Embedding)) or packed is None or scales is None or packed.ndim != 2:
            return False
        width = layer.weight.shape[-1]
        bits, rest = divmod(32 * packed.shape[1], width)
        return not rest and width % group_size == 0 and bits in BITS and {"bits": bits, "group_size": group_size}

    nn.quantize(module, group_size=group_size, class_predicate=settings)
    return module


def size_in_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters as they are stored."""
    return sum(value.nbytes for _, value in tree_flatten(module.parameters()))
