"""Quantize a model's matrices lazily, so that the unquantized model never stands in memory."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .layout import Component
from .parts import PARTS

BITS = (2, 3, 4, 5, 6, 8)
_EMBEDDING_BITS = 8  # a prompt's words are looked up, not summed: fewer bits would show and save little
_MLX_GROUP_SIZES = (32, 64, 128)


def quantize(module: nn.Module, bits: int, group_size: int) -> nn.Module:
    """Quantize ``module`` in place: every Linear whose width divides by ``group_size``, and token embeddings at 8 bits.

    Convolutions (also the 1×1 ones that are Linears here), norms, position embeddings and quantized layers stay as they
    are. Nothing is read here: each matrix is quantized when it is evaluated, and its source dropped.
    Raises ValueError for a number of bits that MLX has no kernel for.
    """
    if bits not in BITS:
        raise ValueError(f"quantization to {bits} bits is not possible; choose one of {', '.join(map(str, BITS))}")

    def settings(path: str, layer: nn.Module) -> bool | dict[str, int]:
        if not hasattr(layer, "to_quantized") or layer.weight.shape[-1] % group_size:
            return False
        if isinstance(layer, nn.Linear):
            return not path.removesuffix(".base").endswith(("conv_shortcut", "quant_conv"))  # ".base" with a LoRA
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


def remaining_quantization(component: Component, bits: int | None) -> tuple[int, int] | None:
    """Return (bits, group size) to quantize a network to; None where its weights are stored in these ``bits``.

    None ``bits`` leave the weights as they are. Raises ValueError where they are stored in other bits.
    """
    if bits is None:
        return None
    stored = read_quantization(component.config)
    if stored is None:
        return bits, PARTS[component.name].group_size
    if stored[0] != bits:
        raise ValueError(
            f"{component.name} of {component.files[0].parent}: its weights are stored in {stored[0]} bits, "
            f"not in {bits}: leave them as they are, or take the model that they were made from"
        )
    return None


def prepare_quantized(module: nn.Module, tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> None:
    """Turn the layers of ``module`` whose ``tensors`` are quantized into quantized ones, to be filled with these.

    A layer is quantized where it has ``scales``; its bits follow from the width of its packed ``weight``. Layers whose
    shapes make no sense stay as they are, so that filling them names what is wrong.
    """
    _, group_size = read_quantization(config)

    def settings(path: str, layer: nn.Module) -> bool | dict[str, int]:
        packed, scales = tensors.get(f"{path}.weight"), tensors.get(f"{path}.scales")
        if not isinstance(layer, (nn.Linear, nn.Embedding)) or packed is None or scales is None or packed.ndim != 2:
            return False
        width = layer.weight.shape[-1]
        bits, rest = divmod(32 * packed.shape[1], width)
        return not rest and width % group_size == 0 and bits in BITS and {"bits": bits, "group_size": group_size}

    nn.quantize(module, group_size=group_size, class_predicate=settings)
