"""Read and write safetensors files: a JSON header, then the values of all tensors in order."""

import json
import math
import operator
import re
import struct
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

# Bytes per value of each type. ``cast_bits`` converts F64 and 8-bit floats; mx.load gives F8_E4M3 as bits.
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
ITEM_SIZES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
BITS = {"F64": mx.uint64, "F8_E4M3": mx.uint8, "F8_E5M2": mx.uint8}
_MAX_HEADER = 1 << 24  # bytes; SDXL's header has 300,000, LoRA headers list all training tags
_MAX_TENSORS = 20_000  # SDXL has 2,500, a LoRA for all of its layers 4,000
MAX_LENGTH = 2**31 - 1  # values of a tensor: MLX counts in 32 bits without a check
_MAX_LISTS = 200_000  # and objects, also inside the metadata texts
_CHUNK = 1 << 20  # bytes per copy

_TYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int64: "I64"}
_TYPES |= {mx.uint8: "U8", mx.uint64: "U64"}
# Signed and unsigned integers of a floating-point type's size, and the bits of its infinity.
_INFINITIES = {
    mx.float32: (mx.int32, mx.uint32, 0x7F80_0000),
    mx.float16: (mx.int16, mx.uint16, 0x7C00),
    mx.bfloat16: (mx.int16, mx.uint16, 0x7F80),
}
Row = tuple[str, Sequence[int], int, int]  # a tensor's type, shape, first byte in the file, and bytes
_CLEAR_EVERY = 2**28  # bytes of freed buffers, which MLX would keep for reuse


def damaged(path: Path, reason: str, *, is_weights: bool = False) -> ValueError:
    """Return the error for a file that cannot be read.

    Only for a file that certainly holds weights it recommends deleting: in the Hub's cache ``path`` is a link.
    """
    is_weights = is_weights and path.suffix == ".safetensors"
    remedy = f"delete {path.resolve()} and download it again" if is_weights else "download it again, or choose another"
    return ValueError(f"{path} is damaged ({reason}): {remedy}")


@cache
def loading_stream(kind: mx.DeviceType) -> mx.Stream:
    """Return the stream of a device for lazy weights: unlike other streams, every thread can compute on it.

    Files are read and laid out on ``mx.cpu``; further operations run on the default device's stream.
    """
    return mx.new_thread_unsafe_stream(mx.Device(kind, 0))


def read_safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the lazy tensors of a file by name, and its metadata.

    float64 becomes float32; 8-bit floats become float16, multiplied by their stored scale. Raises ValueError for a file
    that is damaged or has other types.
    """
    metadata, rows = check_safetensors(path)
    types = {name: code for name, (code, *_) in rows.items()}
    try:
        if {"F64", "F8_E5M2"}.isdisjoint(types.values()):
            tensors = mx.load(str(path), format="safetensors", stream=loading_stream(mx.cpu))
        else:  # types that mx.load refuses
            with path.open("rb") as file:
                tensors = load_copy(file, rows)
    except RuntimeError as error:
        raise damaged(path, str(error).partition("\n")[0], is_weights=True) from error
    tensors |= {name: cast_bits(tensors[name], code) for name, code in types.items() if code in BITS}
    return _scaled(path, tensors, {name for name, code in types.items() if code.startswith("F8")}), metadata


def check_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Row]]:
    """Return the metadata and the rows of a file's header, after checking them against the file.

    MLX reads lazily: without this check, an incomplete file would fail in the middle of a run. Raises ValueError for
    damaged and other files, for sizes above the limits, and for unsupported types.
    """
    size = path.stat().st_size
    spans = []
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= size - 8:
            raise damaged(path, f"its {size} bytes do not begin with a header")
        if length > _MAX_HEADER:
            raise ValueError(f"{path} has a header of {length:,} bytes; the limit is {_MAX_HEADER:,}")
        try:
            text = file.read(length)
            if text.count(b"[") + text.count(b"{") > _MAX_LISTS:
                raise ValueError("too many lists")
            header = json.loads(text)
            metadata = header.pop("__metadata__", None) or {}
            if not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("metadata that is not text")
            for name, tensor in header.items():
                first, end = map(operator.index, tensor["data_offsets"])  # refuses 1.5 and "1"
                spans.append((first, end, name, str(tensor["dtype"]), list(map(operator.index, tensor["shape"]))))
            spans.sort()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise damaged(path, "its safetensors header is invalid") from error
    if len(spans) > _MAX_TENSORS:
        raise ValueError(f"{path} holds {len(spans):,} tensors; the limit is {_MAX_TENSORS:,}")
    position, rows = 0, {}
    for first, end, name, dtype, shape in spans:
        if dtype not in ITEM_SIZES:
            raise ValueError(f"{path} holds {name} as {dtype}, which is not supported: save it as F16 or F32")
        in_range = not shape or (min(shape) >= 0 and max(shape) <= MAX_LENGTH)
        if first != position or end - first != math.prod(shape) * ITEM_SIZES[dtype] or not in_range:
            raise damaged(path, f"its header gives the wrong position for {name:.60}", is_weights=True)
        rows[name] = dtype, shape, 8 + length + first, end - first
        position = end
    if 8 + length + position != size:
        raise damaged(path, f"it has {size} bytes instead of {8 + length + position}", is_weights=True)
    return metadata, rows


def cast_bits(bits: mx.array, code: str) -> mx.array:
    """Convert the bits of a type that MLX does not compute in: F64 to float32, others to float16.

    float16 represents every 8-bit float; F8_E5M2 is the upper half of a float16.
    """
    with mx.stream(loading_stream(mx.cpu)):
        if code == "F64":
            return bits.view(mx.float64).astype(mx.float32)
        if code == "F8_E4M3":
            return mx.from_fp8(bits, mx.float16)
        return mx.left_shift(bits.astype(mx.uint16), mx.array(8, mx.uint16)).view(mx.float16)


# Tensors that ComfyUI stores beside 8-bit weights: scales, activation scales, and a mark for the format.
_SCALE = re.compile(r"(.*\.)?(scale_weight|weight_scale)$")
_SCALING = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)$")


def _scaled(path: Path, tensors: dict[str, mx.array], eights: Collection[str]) -> dict[str, mx.array]:
    """Multiply 8-bit weights by their scales. Raises ValueError for another kind of quantization."""
    for name in [name for name in tensors if _SCALE.match(name) or _SCALING.match(name)] if eights else ():
        layer, _, kind = name.rpartition(".")
        scale, weight = tensors.pop(name), f"{layer}.weight"
        if kind == "comfy_quant" and weight not in eights:
            raise ValueError(f"{path} holds {weight} in an unsupported quantization: use float16 or F8_E4M3")
        if not _SCALE.match(name):
            continue
        if weight not in eights or scale.size not in (1, *tensors[weight].shape[:1]):
            raise ValueError(f"{path} holds {name}, which does not scale F8 values: use the float16 version")
        with mx.stream(loading_stream(mx.cpu)):
            shape = (scale.size, *[1] * (tensors[weight].ndim - 1))
            tensors[weight] = tensors[weight] * scale.astype(mx.float32).reshape(shape)
    return tensors


def load_copy(file: BinaryIO, rows: Mapping[str, Row]) -> dict[str, mx.array]:
    """Load tensors from a temporary copy, which is deleted with their arrays. Types in BITS are loaded as bits."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as copy:
        copy.write(_header_of(rows))
        for _, _, first, size in rows.values():
            file.seek(first)
            for done in range(0, size, _CHUNK):
                copy.write(file.read(min(_CHUNK, size - done)))
        copy.flush()
        return mx.load(copy.name, stream=loading_stream(mx.cpu))


def _header_of(rows: Mapping[str, Row], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the header of a file whose tensors follow in this order."""
    texts = {"format": "pt"} | dict(metadata or {})  # the layout of torch programs
    header: dict[str, Any] = {"__metadata__": texts}
    position = 0
    for name, (code, shape, _, size) in rows.items():
        code = _TYPES[BITS[code]] if code in BITS else code
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # aligns the values
    return struct.pack("<Q", len(encoded)) + encoded


def all_finite(value: mx.array) -> bool:
    """Return whether a row-contiguous array has neither infinite values nor NaN.

    Floats of one sign are ordered like their bits, so the largest integers of both signs are enough. On a CPU this
    takes a thirtieth of the time of ``mx.isfinite`` in half precision, which was half of a conversion's.
    """
    if value.dtype not in _INFINITIES or not value.size:
        return True
    signed, unsigned, infinity = _INFINITIES[value.dtype]
    flat = value.reshape(-1)
    positive, negative = flat.view(signed).max(), flat.view(unsigned).max()
    return positive.item() < infinity and negative.item() < infinity + (1 << 8 * value.itemsize - 1)


def write_safetensors(
    path: Path,
    names: Iterable[str],
    tensors: dict[str, mx.array],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the ``names`` of ``tensors`` and remove them from the dictionary, so that only one is in memory.

    Raises ValueError for a tensor with values that are not finite, OSError when the disk is full.
    """
    rows = {name: (_TYPES[tensors[name].dtype], tensors[name].shape, 0, tensors[name].nbytes) for name in names}
    with path.open("wb") as file:
        file.write(_header_of(rows, metadata))
        freed = 0
        for name in names:
            value = mx.contiguous(tensors.pop(name))
            if not all_finite(value):
                raise ValueError(f"{name} is not finite in {_TYPES[value.dtype]}: use float32, or another source")
            file.write(memoryview(value.reshape(-1).view(mx.uint8)))
            freed += value.nbytes
            if freed > _CLEAR_EVERY:
                mx.clear_cache()
                freed = 0
