"""Quantize a model's matrices, one at a time, so that the unquantized model never stands in memory."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

BITS = (2, 3, 4, 5, 6, 8)

_EMBEDDING_BITS = 8  # a prompt's words are looked up, not summed: fewer bits would show and save little


def quantize(module: nn.Module, bits: int, group_size: int) -> nn.Module:
    """Quantize ``module`` in place: every Linear whose width divides by ``group_size``, and token embeddings at 8 bits.

    Convolutions (also the 1×1 ones that are Linears here), norms and position embeddings keep their type. Weights that
    are still lazy are read, quantized and dropped one by one. What is quantized already stays as it is. Raises
    ValueError for a number of bits that MLX has no kernel for.
    """
    if bits not in BITS:
        raise ValueError(f"quantization to {bits} bits is not possible; choose one of {', '.join(map(str, BITS))}")

    def choose(path: str, m: nn.Module) -> bool | dict[str, int]:
        if isinstance(m, nn.Linear):
            return m.weight.shape[-1] % group_size == 0 and not path.endswith(("conv_shortcut", "quant_conv"))
        if isinstance(m, nn.Embedding) and path.endswith("token_embedding") and m.weight.shape[-1] % group_size == 0:
            return {"bits": max(bits, _EMBEDDING_BITS), "group_size": group_size}
        return False

    nn.quantize(module, group_size=group_size, bits=bits, class_predicate=choose)
    for _, m in module.named_modules():
        if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            mx.eval(m.parameters())  # one matrix at a time bounds the peak; its unquantized source is freed here
    return module


def size_in_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters as they are stored."""
    return sum(value.nbytes for _, value in tree_flatten(module.parameters()))
