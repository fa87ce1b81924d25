"""Quantize a model's matrices, one at a time, so that the unquantized model never stands in memory."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = {"unet": 32, "text_encoder": 64, "text_encoder_2": 64}  # values of each part that share a scale

_EMBEDDING_BITS = 8  # a prompt's words are looked up, not summed: fewer bits would show and save little
_MLX_GROUP_SIZES = (32, 64, 128)


def quantize(module: nn.Module, bits: int, group_size: int) -> nn.Module:
    """Quantize ``module`` in place: every Linear whose width divides by ``group_size``, and token embeddings at 8 bits.

    Convolutions (also the 1×1 ones that are Linears here), norms and position embeddings keep their type. Weights that
    are still lazy are read, quantized and dropped one by one. What is quantized already stays as it is. Raises
    ValueError for a number of bits that MLX has no kernel for.
    """
    quantize_lazily(module, bits, group_size)
    for _, m in module.named_modules():
        if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            mx.eval(m.parameters())  # one matrix at a time bounds the peak; its unquantized source is freed here
    return module


def quantize_lazily(module: nn.Module, bits: int, group_size: int) -> nn.Module:
    """The same without reading or computing anything: each matrix is quantized when it is evaluated."""
    if bits not in BITS:
        raise ValueError(f"quantization to {bits} bits is not possible; choose one of {', '.join(map(str, BITS))}")

    def choose(path: str, m: nn.Module) -> bool | dict[str, int]:
        if isinstance(m, nn.Linear):
            return m.weight.shape[-1] % group_size == 0 and not path.endswith(("conv_shortcut", "quant_conv"))
        if isinstance(m, nn.Embedding) and path.endswith("token_embedding") and m.weight.shape[-1] % group_size == 0:
            return {"bits": max(bits, _EMBEDDING_BITS), "group_size": group_size}
        return False

    nn.quantize(module, group_size=group_size, bits=bits, class_predicate=choose)
    return module


def read_quantization(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """(bits, group size) of the weights that a part's ``config.json`` belongs to, None when they are not quantized.

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


def still_to_do(config: Mapping[str, Any], asked: tuple[int, int] | None) -> tuple[int, int] | None:
    """What of the ``asked`` (bits, group size) is left to do: nothing for weights that are stored in so many bits.

    Raises ValueError for weights that are stored in others.
    """
    stored = read_quantization(config)
    if stored and asked and stored[0] != asked[0]:
        raise ValueError(
            f"its weights are stored in {stored[0]} bits, not in the {asked[0]} asked for: "
            "leave them as they are, or take the model that they were made from"
        )
    return None if stored else asked


def prepare_quantized(module: nn.Module, tensors: Mapping[str, mx.array], group_size: int) -> nn.Module:
    """Turn the layers of ``module`` whose ``tensors`` are quantized into quantized ones, to be filled with these.

    A layer is quantized where it has ``scales``; its bits follow from the width of its packed ``weight``. Layers whose
    shapes make no sense stay as they are, so that filling them names what is wrong.
    """

    def choose(path: str, m: nn.Module) -> bool | dict[str, int]:
        packed, scales = tensors.get(f"{path}.weight"), tensors.get(f"{path}.scales")
        if not isinstance(m, (nn.Linear, nn.Embedding)) or packed is None or scales is None or packed.ndim != 2:
            return False
        width = m.weight.shape[-1]
        bits, rest = divmod(32 * packed.shape[1], width)
        return (
            {"bits": bits, "group_size": group_size} if not (rest or width % group_size or bits not in BITS) else False
        )

    nn.quantize(module, group_size=group_size, class_predicate=choose)
    return module


def size_in_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters as they are stored."""
    return sum(value.nbytes for _, value in tree_flatten(module.parameters()))
