"""Check and write safetensors files: a JSON header, then the values of each tensor one behind the other."""

import json
import math
import operator
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

# Bytes per value of the types that mx.load reads as themselves (it gives 8-bit floats as integers).
_ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
_ITEM_SIZES |= {f"{sign}{8 * size}": size for sign in "IU" for size in (1, 2, 4, 8)}
_MAX_HEADER = 100_000_000  # bytes; the format's own limit

_TYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int64: "I64"}
_CLEAR_EVERY = 2**28  # bytes; freed buffers that MLX keeps for later, of sizes that do not come again


def damaged(path: Path, reason: str, *, is_weights: bool = False) -> ValueError:
    """Return the error for a file that cannot be read.

    Only of what is a file of weights for certain it says what to delete: in the Hub's cache ``path`` is a link.
    """
    is_weights = is_weights and path.suffix == ".safetensors"
    remedy = f"delete {path.resolve()} and get it again" if is_weights else "get it again, or choose another file"
    return ValueError(f"{path} is damaged ({reason}): {remedy}")


@cache
def loading_stream(kind: mx.DeviceType) -> mx.Stream:
    """Return the stream of a kind of device that lazy weights belong to: unlike others, every thread can compute on it.

    Files are read and laid out on ``mx.cpu``; what is made of their tensors is computed on the default device's.
    """
    return mx.new_thread_unsafe_stream(mx.Device(kind, 0))


def check_safetensors(path: Path) -> None:
    """Raise ValueError unless the header describes exactly the bytes that follow it, in types that MLX reads.

    MLX reads lazily: without this, a file that was cut off would fail only in the middle of a run.
    """
    size = path.stat().st_size
    spans = []
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise damaged(path, f"its {size} bytes do not begin with a header")
        try:
            for name, tensor in json.loads(file.read(length)).items():
                if name != "__metadata__":
                    first, end = map(operator.index, tensor["data_offsets"])  # 1.5 and "1" are no sizes
                    spans.append((first, end, name, str(tensor["dtype"]), list(map(operator.index, tensor["shape"]))))
            spans.sort()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise damaged(path, "its header is not that of a safetensors file") from error
    position = 0
    for first, end, name, dtype, shape in spans:
        if dtype not in _ITEM_SIZES:
            raise ValueError(f"{path} holds {name} as {dtype}, which this library does not read: save it as F16 or F32")
        in_range = not shape or (min(shape) >= 0 and max(shape) < 2**31)  # MLX counts in 32 bits, and does not check
        if first != position or end - first != math.prod(shape) * _ITEM_SIZES[dtype] or not in_range:
            raise damaged(path, f"its header gives the wrong place for {name:.60}", is_weights=True)
        position = end
    if 8 + length + position != size:
        raise damaged(path, f"it has {size} bytes and should have {8 + length + position}", is_weights=True)


def header_of(rows: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """Return the beginning of a file whose tensors follow in this order: {name: (type, shape, bytes)}."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # the layout is the one of torch's programs
    position = 0
    for name, (dtype, shape, size) in rows.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the values begin at a multiple of their size
    return struct.pack("<Q", len(encoded)) + encoded


def write_safetensors(path: Path, names: Iterable[str], tensors: dict[str, mx.array]) -> None:
    """Write ``names`` out of ``tensors`` and take them out of the dictionary, so that one at a time is in memory.

    Raises ValueError for a tensor with values that are not finite.
    """
    rows = {name: (_TYPES[tensors[name].dtype], tensors[name].shape, tensors[name].nbytes) for name in names}
    with path.open("wb") as file:
        file.write(header_of(rows))
        freed = 0
        for name in names:
            value = mx.contiguous(tensors.pop(name))
            if not mx.isfinite(value).all().item():
                raise ValueError(f"{name} is not finite in {_TYPES[value.dtype]}: take float32, or another source")
            file.write(memoryview(value.reshape(-1).view(mx.uint8)))
            freed += value.nbytes
            if freed > _CLEAR_EVERY:
                mx.clear_cache()
                freed = 0
