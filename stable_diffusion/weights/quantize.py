"""Quantize a model's matrices lazily, so that the unquantized model is never completely in memory."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .layout import Component
from .parts import PARTS

BITS = (2, 3, 4, 5, 6, 8)
# Low-bit floats with an 8-bit scale for each group: (bits, group size). mxfp are the Open Compute Project's
# Microscaling Formats (2023), nvfp4 is NVIDIA's.
MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
FORMATS: tuple[int | str, ...] = (*BITS, *MODES)
_EMBEDDING_BITS = 8  # embeddings are looked up, not summed: fewer bits would be visible and save little
_MLX_GROUP_SIZES = (32, 64, 128)


def in_words(bits: int | str) -> str:
    """Format bits, or the name of a mode, for messages."""
    return f"{bits} bits" if bits in BITS else f"{bits}"


def quantize(module: nn.Module, bits: int | str, group_size: int) -> nn.Module:
    """Quantize ``module`` in place: every Linear whose width divides by ``group_size``, and token embeddings at 8 bits.

    Convolutions (also 1×1 ones that are Linears here), norms, position embeddings and quantized layers are unchanged.
    ``bits`` may be one of MODES, which set the group size; embeddings are always affine. Nothing is read here: each
    matrix is quantized when it is evaluated, and its source is freed.
    Raises ValueError for a number of bits without a kernel in MLX.
    """
    if bits not in FORMATS:
        raise ValueError(f"quantization to {bits} bits is not supported; choose one of {', '.join(map(str, FORMATS))}")
    mode = bits if bits in MODES else "affine"
    bits, group_size = MODES.get(bits, (bits, group_size))

    def settings(path: str, layer: nn.Module) -> bool | dict[str, int]:
        if not hasattr(layer, "to_quantized") or layer.weight.shape[-1] % group_size:
            return False
        if isinstance(layer, nn.Linear):
            return not path.removesuffix(".base").endswith(("conv_shortcut", "quant_conv"))  # ".base" with a LoRA
        if isinstance(layer, nn.Embedding) and path.endswith("token_embedding"):
            return {"bits": max(bits, _EMBEDDING_BITS), "group_size": max(group_size, _MLX_GROUP_SIZES[0])}
        return False

    nn.quantize(module, group_size=group_size, bits=bits, mode=mode, class_predicate=settings)
    return module


def read_quantization(config: Mapping[str, Any]) -> tuple[int | str, int] | None:
    """Return (bits or mode, group size) of the weights of a ``config.json``, None when they are not quantized.

    The key is ``"quantization": {"bits": 8, "group_size": 32}``, with a ``"mode"`` if it is not affine. Raises
    ValueError for unsupported values.
    """
    value = config.get("quantization")
    if value is None:
        return None
    values = value if isinstance(value, dict) else {"mode": None}
    bits, group_size, mode = values.get("bits"), values.get("group_size"), values.get("mode", "affine")
    if isinstance(mode, str) and MODES.get(mode) == (bits, group_size):
        return mode, group_size
    if mode != "affine" or bits not in BITS or group_size not in _MLX_GROUP_SIZES:
        known = f"bits {', '.join(map(str, BITS))} with group_size {', '.join(map(str, _MLX_GROUP_SIZES))}"
        raise ValueError(f"quantization={value!r} is not supported ({known}): convert the model again")
    return bits, group_size


def quantization_config(bits: int | str, group_size: int) -> dict[str, Any]:
    """Return the entry of a ``config.json`` for ``read_quantization``."""
    mode = {"mode": bits} if bits in MODES else {}
    return {"bits": MODES[bits][0] if mode else bits, "group_size": group_size} | mode


def remaining_quantization(component: Component, bits: int | str | None) -> tuple[int | str, int] | None:
    """Return (bits or mode, group size) to quantize a network to; None if its weights are stored in these ``bits``.

    Without ``bits`` the weights stay unchanged. Raises ValueError for weights that are stored in other bits.
    """
    if bits is None:
        return None
    stored = read_quantization(component.config)
    if stored is None:
        return bits, MODES[bits][1] if bits in MODES else PARTS[component.name].group_size
    if stored[0] != bits:
        remedy = "omit the bits, or use the unquantized model"
        which = f"{component.name} of {component.files[0].parent}: its weights are stored"
        raise ValueError(f"{which} in {in_words(stored[0])}, not in {bits}: {remedy}")
    return None


def prepare_quantized(module: nn.Module, tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> None:
    """Replace the layers of ``module`` with quantized ``tensors`` by quantized layers, to be filled with them.

    A layer is quantized if it has ``scales``; its bits follow from the width of its packed ``weight``. Layers with
    impossible shapes are unchanged, so that filling them reports the error.
    """
    kind, group_size = read_quantization(config)

    def settings(path: str, layer: nn.Module) -> bool | dict[str, int]:
        packed, scales = tensors.get(f"{path}.weight"), tensors.get(f"{path}.scales")
        if not isinstance(layer, (nn.Linear, nn.Embedding)) or packed is None or scales is None or packed.ndim != 2:
            return False
        width = layer.weight.shape[-1]
        bits, rest = divmod(32 * packed.shape[1], width)
        if kind in MODES and f"{path}.biases" not in tensors:
            fits = width % group_size == 0 and bits == MODES[kind][0]
            return fits and {"bits": bits, "group_size": group_size, "mode": kind}
        size = max(group_size, _MLX_GROUP_SIZES[0])
        return not rest and width % size == 0 and bits in BITS and {"bits": bits, "group_size": size}

    nn.quantize(module, group_size=group_size, class_predicate=settings)
