"""Read GGUF files of stable-diffusion.cpp and ComfyUI-GGUF: a header, then the values of each tensor.

Quantized matrices stay quantized: a block of 32 values with a half-precision scale is a group of MLX's affine
quantization, in another order of bits. Other quantized tensors become float32. The header is checked here, because
MLX's GGUF reader does not check it. The values are copied into a temporary safetensors file, which MLX reads lazily.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import mlx.core as mx

from .safetensors import MAX_LENGTH, Row, damaged, load_copy, loading_stream

_MAX_HEADER = 1 << 24  # bytes; the header of XL has 150,000
_MAX_TENSORS, _MAX_KEYS, _MAX_DIMENSIONS = 20_000, 20_000, 4
GROUP = 32  # values of a block

# Each type's name, the values of a block, and its bytes.
_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8)}
_TYPES |= {2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}
_REFUSED = {6: "Q5_0", 7: "Q5_1"} | {10 + i: f"Q{i + 2}_K" for i in range(5)}  # common unsupported ones
_KEY_TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_PREFIXES = (("te.1.", "text_encoder_2."), ("te.", "text_encoder."))  # of folders converted by stable-diffusion.cpp
_SHAPE = "comfy.gguf.orig_shape."  # in metadata: the shape before reshaping for quantization


def _take(header: BytesIO, kinds: str) -> tuple:
    return struct.unpack(f"<{kinds}", header.read(struct.calcsize(f"<{kinds}")))


def _text(header: BytesIO) -> str:
    (length,) = _take(header, "Q")
    return _take(header, f"{length}s")[0].decode()


def _value(header: BytesIO) -> Any:
    (kind,) = _take(header, "I")
    inner, length = _take(header, "IQ") if kind == _LIST else (kind, 1)
    values = [_text(header) for _ in range(length)] if inner == _TEXT else _take(header, f"{length}{_KEY_TYPES[inner]}")
    return values if kind == _LIST else values[0]


def read_gguf(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the lazy tensors of a file by name, and no metadata.

    A quantized matrix NAME.weight becomes MLX's packed values, with NAME.scales and NAME.biases. Raises ValueError for
    a file that is damaged or has unsupported types.
    """
    rows, quantized = _check_header(path)
    with path.open("rb") as file, mx.stream(loading_stream(mx.cpu)):
        tensors = load_copy(file, rows)
        for name, (kind, shape) in quantized.items():
            tensors |= _unpacked(name, kind, shape, tensors.pop(name))
        if any("label_emb." in name for name in tensors):  # XL's matrices are 1x1 convolutions for stable-diffusion.cpp
            for name in [n for n, v in tensors.items() if ".proj_" in n and v.shape[2:] == (1, 1)]:
                tensors[name] = tensors[name].flatten(1)
    return tensors, {}


def _check_header(path: Path) -> tuple[dict[str, Row], dict[str, tuple[int, tuple[int, ...]]]]:
    """Return the rows of a file's tensors, quantized ones as blocks of bytes, and {name: (type, shape)} of these."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = BytesIO(file.read(_MAX_HEADER))
    try:
        magic, version, n_tensors, n_keys = _take(header, "4sIQQ")
        if magic != b"GGUF" or version not in (2, 3) or n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
            raise ValueError(f"version {version} with {n_tensors:,} tensors and {n_keys:,} keys")
        keys = {_text(header): _value(header) for _ in range(n_keys)}
        infos = [_tensor(header, keys) for _ in range(n_tensors)]
        start = -(-header.tell() // (alignment := int(keys.get("general.alignment", 32)))) * alignment
    except (struct.error, ValueError, KeyError, TypeError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        raise damaged(path, f"its GGUF header is invalid: {reason:.80}") from error
    rows, quantized, total = {}, {}, 0
    for name, kind, shape, offset in infos:
        if kind not in _TYPES:
            found = _REFUSED.get(kind, f"type {kind}")
            text = f"{path} holds {name:.60} as {found}, which is not supported"
            raise ValueError(f"{text}: use a file of Q8_0, Q4_0, Q4_1, F16 or F32")
        code, values, size_of_block = _TYPES[kind]
        blocks, rest = divmod(math.prod(shape), values)
        total += (n_bytes := blocks * size_of_block)
        is_inside = 0 <= start <= size - offset - n_bytes and total <= size
        if rest or math.prod(shape) > MAX_LENGTH or not is_inside or name in rows:
            raise damaged(path, f"{name:.60} does not fit into its {size} bytes")
        rows[name] = code, shape, start + offset, n_bytes
        if values > 1:
            rows[name] = "U8", (blocks, size_of_block), start + offset, n_bytes
            quantized[name] = kind, shape
    return rows, quantized


def _tensor(header: BytesIO, keys: dict[str, Any]) -> tuple[str, int, tuple[int, ...], int]:
    """Read (name, type, shape, offset) of a tensor. The shape is stored from the last dimension to the first."""
    name, (dimensions,) = _text(header), _take(header, "I")
    name = next((new + name.removeprefix(old) for old, new in _PREFIXES if name.startswith(old)), name)
    if dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    shape = _take(header, f"{dimensions}Q")[::-1]
    kind, offset = _take(header, "IQ")
    original = tuple(keys.get(f"{_SHAPE}{name}", shape))
    if math.prod(original) != math.prod(shape) or not all(type(n) is int and n >= 0 for n in original):
        raise ValueError(f"{name:.40} has the wrong original shape, {original}")
    return name, kind, original, offset


def _unpacked(name: str, kind: int, shape: tuple[int, ...], blocks: mx.array) -> dict[str, mx.array]:
    """Unpack a quantized tensor from its blocks [n, bytes], into MLX's affine groups of 32 or float32.

    A value is scale * (q - 8) in Q4_0, scale * q + minimum in Q4_1, and scale * signed q in Q8_0.
    """
    scales = mx.contiguous(blocks[:, :2]).view(mx.float16)
    if kind == 8:
        bits, levels, biases = 8, blocks[:, 2:] ^ mx.array(0x80, mx.uint8), -128 * scales
    else:
        first = 2 if kind == 2 else 4
        biases = -8 * scales if kind == 2 else mx.contiguous(blocks[:, 2:4]).view(mx.float16)
        pairs = blocks[:, first:]  # of the values i and i + 16
        values = mx.concatenate([pairs & mx.array(15, mx.uint8), pairs >> mx.array(4, mx.uint8)], axis=1)
        bits, levels = 4, values[:, ::2] | (values[:, 1::2] << mx.array(4, mx.uint8))
    weight = mx.contiguous(levels).view(mx.uint32)
    if len(shape) == 2 and shape[1] % GROUP == 0 and name.endswith(".weight") and "embed" not in name:
        layer = name.removesuffix(".weight")
        parts = {"weight": weight, "scales": scales, "biases": biases}
        return {f"{layer}.{part}": value.reshape(shape[0], -1) for part, value in parts.items()}
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return {name: mx.dequantize(weight, scales, biases, group_size=GROUP, bits=bits).reshape(shape)}


def unpack(tensors: Mapping[str, mx.array]) -> tuple[dict[str, mx.array], int | None]:
    """Return tensors with packed matrices in float16, and their most frequent bits or None; all is lazy."""
    plain, found = dict(tensors), []
    for layer in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        parts = [tensors.get(f"{layer}.{part}") for part in ("weight", "scales", "biases")]
        if any(part is None or part.ndim != 2 for part in parts) or parts[1].shape != parts[2].shape:
            continue
        rows, groups = parts[1].shape
        if bits := next((bits for bits in (4, 8) if parts[0].shape == (rows, bits * groups)), None):
            del plain[f"{layer}.scales"], plain[f"{layer}.biases"]
            plain[f"{layer}.weight"] = mx.dequantize(*parts, group_size=GROUP, bits=bits)
            found.append(bits)
    return plain, max(set(found), key=found.count, default=None)
