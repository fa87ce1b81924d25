"""Weights in torch's own files (.ckpt, .pt, .pth, .bin), read without torch and without running anything in them.

Since torch 1.6 such a file is a zip archive whose entries are stored as they are:

    NAME/data.pkl          a pickle of what was saved; its tensors name storages by their keys
    NAME/data/0, 1, 2...   the storages
    NAME/byteorder         "little"

Before, it was a row of parts: pickles of a magic number, a version and facts about the machine, the pickle of what was
saved, a pickle of the storages' keys; then the storages, each behind its length in eight bytes.

`unpickle` says what the pickle describes, `archive` where entries lie. This page compares every size with the file and
gives MLX the places. Nothing is unpacked, and a name in the file is a key and never a path.
"""

import io
import json
import math
import os
import struct
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from .. import layout
from .archive import Entry, read_entries
from .torch_names import Kind, Name, ParameterDict, PickleError, Storage, Tensor
from .unpickle import Machine

_MAX_PICKLE = 1 << 25  # bytes; that of a checkpoint with its optimizer takes a few million
_MAX_DEPTH = 40  # of dicts and lists within one another
_MAX_LENGTH = 2**31 - 1  # values of a tensor: MLX counts in 32 bits
_MAX_REUSE = 4  # times the size of the file that all tensors may have together: a few share their storage
_SMALL = 1 << 20  # bytes that they may have in any case

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001

# Each type's code in a safetensors header, and its bytes. MLX reads no F64: the bits are taken, and converted here.
_TYPES = {"float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "float64": ("U64", 8)}
_TYPES |= {f"int{8 * size}": (f"I{8 * size}", size) for size in (1, 2, 4, 8)}
_TYPES |= {f"uint{8 * size}": (f"U{8 * size}", size) for size in (1, 2, 4, 8)}
_TYPES |= {"bool": ("BOOL", 1), "": ("U8", 1)}

_Places = dict[str, tuple[int, int]]  # of each storage: its first byte in the file, and how many it has
_Row = tuple[str, int, int]  # values that lie in a row in the file: the code of their type, first byte, end


def read_pickle(path: str | os.PathLike) -> dict[str, mx.array]:
    """The tensors of a checkpoint by name. They are read from the disk only when they are evaluated.

    A trainer's checkpoint has its weights under "state_dict" or "model": they are taken from there. What is not a
    tensor with a name is left out. float64 becomes float32; all other types stay.

    Raises:
        ValueError: the file is damaged or holds no tensors, or its pickle asks for what no weights need; one line.
        OSError: there is no such file.
    """
    value = load_pickle(path)
    while isinstance(value, dict) and (inner := _weights_in(value)) is not None:
        value = inner
    found = value.items() if isinstance(value, dict) else ()
    tensors = {name: v for name, v in found if isinstance(name, str) and isinstance(v, mx.array)}
    if not tensors:
        raise ValueError(f"{path} is not a checkpoint: it holds no tensors with names")
    return tensors


def _weights_in(checkpoint: dict) -> dict | None:
    return next((checkpoint[key] for key in ("state_dict", "model") if isinstance(checkpoint.get(key), dict)), None)


def load_pickle(path: str | os.PathLike) -> Any:
    """What was saved: dicts, lists, tuples, strings, bytes, numbers, None, and arrays that are read when evaluated.

    A class that the file names without using it is given as its name. Raises what `read_pickle` raises.
    """
    path = Path(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            value, machine, places = _read(file, size, path)
            tensors = _checked(machine.tensors, places, size)
            rows = _read_rows(file, size, [_row(tensor, places) for tensor in tensors])
            arrays = {tensor: _view(row, tensor) for tensor, row in zip(tensors, rows, strict=True)}
            return _plain(value, arrays, {}, 0)
    except PickleError as error:
        raise ValueError(f"{path} is not loaded: {error}; take a .safetensors file of these weights") from error


def _plain(value: Any, arrays: dict[Tensor, mx.array], done: dict[int, Any], depth: int) -> Any:
    """`value` with an array for each tensor. What is referred to twice is converted once, or a file could double it."""
    if isinstance(value, Tensor):
        return arrays[value]
    if isinstance(value, Name | Kind):
        return value.path if isinstance(value, Name) else value.code
    if isinstance(value, Storage):
        raise PickleError("it holds a storage without a tensor")
    value = value.parameters if isinstance(value, ParameterDict) else value
    if not isinstance(value, dict | list | tuple):
        return value
    if depth > _MAX_DEPTH:
        raise PickleError("its values are nested too deeply, or contain themselves")
    if id(value) not in done:
        items = value.values() if isinstance(value, dict) else value
        items = [_plain(item, arrays, done, depth + 1) for item in items]
        keys = [key.path if isinstance(key, Name) else key for key in value] if isinstance(value, dict) else ()
        done[id(value)] = dict(zip(keys, items, strict=True)) if isinstance(value, dict) else type(value)(items)
    return done[id(value)]


# --- the two formats -----------------------------------------------------------------------------------------------


def _read(file: BinaryIO, size: int, path: Path) -> tuple[Any, Machine, _Places]:
    """What the pickle describes, and where its storages are."""
    start = file.read(9)
    if start.startswith(b"PK\3\4"):
        return _read_archive(file, size, path)
    if start.startswith(b"\x80"):
        return _read_parts(file, size, path)
    if start.endswith(b"{"):
        raise ValueError(f"{path} is a safetensors file: give it a name that ends in .safetensors")
    raise layout.damaged(path, "it does not begin as torch's files do")


def _read_archive(file: BinaryIO, size: int, path: Path) -> tuple[Any, Machine, _Places]:
    try:
        entries = read_entries(file, size)
    except ValueError as error:
        raise layout.damaged(path, str(error)) from error
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise ValueError(f"{path} is an archive of something else: it has {len(roots)} entries data.pkl instead of one")
    (root,) = roots
    if (order := entries.get(f"{root}byteorder")) and _content(file, order, path) != b"little":
        raise PickleError("its numbers have the byte order of other machines")
    data = _content(file, entries[f"{root}data.pkl"], path)
    machine = Machine(data)
    value = machine.run()
    if machine.position != len(data):
        raise PickleError("something follows its pickle")
    places = {}
    for key in machine.storages:
        entry = entries.get(f"{root}data/{key}")
        if entry is None:
            raise layout.damaged(path, "a storage that its pickle names is missing")
        if not entry.stored:
            raise PickleError("a storage is compressed, encrypted or a folder, which torch does not do")
        places[key] = entry.first, entry.size
    return value, machine, places


def _content(file: BinaryIO, entry: Entry, path: Path) -> bytes:
    """The bytes of a small entry."""
    if not entry.stored:
        raise PickleError("its pickle is compressed, encrypted or a folder, which torch does not do")
    if entry.size > _MAX_PICKLE:
        raise PickleError(f"its pickle has {entry.size:,} bytes and may have {_MAX_PICKLE:,}")
    file.seek(entry.first)
    data = file.read(entry.size)
    if entry.checksum not in (zlib.crc32(data), 0):  # torch writes 0 when it is told not to compute it
        raise layout.damaged(path, "the checksum of its pickle is wrong")
    return data


def _read_parts(file: BinaryIO, size: int, path: Path) -> tuple[Any, Machine, _Places]:
    file.seek(0)
    machine = Machine(file.read(_MAX_PICKLE))
    if machine.run() != _MAGIC or machine.run() != _VERSION:
        raise PickleError("it is a pickle, but not one that torch wrote")
    facts = machine.run()
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise PickleError("its numbers have the byte order of other machines")
    value, keys = machine.run(), machine.run()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("its list of storages is not a list of keys")
    if len(keys) != len(machine.storages) or set(keys) != machine.storages.keys():
        raise PickleError("its list of storages is not that of its tensors")
    places, position = {}, machine.position
    for key in keys:
        file.seek(position)
        length = file.read(8)
        if len(length) != 8 or struct.unpack("<q", length)[0] != machine.storages[key].length:
            raise layout.damaged(path, "a storage has not the length that its pickle gives")
        places[key] = position + 8, machine.storages[key].length * _TYPES[machine.storages[key].dtype][1]
        position = sum(places[key])
        if position > size:
            break
    if position != size:
        raise layout.damaged(path, f"it has {size} bytes, and its storages end at {position}")
    return value, machine, places


# --- from descriptions to arrays -----------------------------------------------------------------------------------


def _checked(tensors: list[Tensor], places: _Places, size: int) -> list[Tensor]:
    """The tensors, when each lies within its storage, each storage is as long as it says, and all are not too many."""
    total = 0
    for tensor in tensors:
        storage, (_, length) = tensor.storage, places[tensor.storage.key]
        if storage.length * _TYPES[storage.dtype][1] != length:
            raise PickleError(f"it gives a storage {storage.length:,} values, which the file does not have")
        values, extent, item = math.prod(tensor.shape), _extent(tensor), _TYPES[tensor.dtype][1]
        if values > _MAX_LENGTH or max(tensor.shape, default=0) > _MAX_LENGTH:
            raise PickleError(f"it describes a tensor of {values:,} values; at most {_MAX_LENGTH:,} are read")
        if (tensor.offset + extent) * item > length:
            raise PickleError("it describes a tensor that reaches beyond its storage")
        total += max(values, extent) * item
        if total > _MAX_REUSE * size + _SMALL:
            raise PickleError("its tensors have far more values than the file")
    return tensors


def _extent(tensor: Tensor) -> int:
    """How many values lie between the first and the last of a tensor, with them."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))


def _row(tensor: Tensor, places: _Places) -> _Row:
    code, item = _TYPES[tensor.dtype]
    first = places[tensor.storage.key][0] + tensor.offset * item
    return code, first, first + _extent(tensor) * item


def _view(row: mx.array, tensor: Tensor) -> mx.array:
    """A tensor out of the row of values between its first and its last."""
    if tensor.dtype == "float64":  # no GPU has it
        row = row.view(mx.float64, stream=mx.cpu).astype(mx.float32, stream=mx.cpu)
    expected = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if length != 1 and stride != expected and 0 not in tensor.shape:
            return mx.as_strided(row, tensor.shape, tensor.strides)
        expected *= length
    return row.reshape(tensor.shape)


def _read_rows(file: BinaryIO, size: int, rows: list[_Row]) -> list[mx.array]:
    """Each row as an array, lazy where that is possible: the few at the very beginning of the file are read at once."""
    arrays: dict[_Row, mx.array] = {}
    with suppress(OSError):  # no room for a temporary file, or no list of open ones
        arrays = _read_later(file, size, rows)
    for row in rows:
        if row not in arrays:
            file.seek(row[1])
            content = file.read(row[2] - row[1])
            header = _header([(row[0], 0, len(content))], 0)
            arrays[row] = mx.load(io.BytesIO(header + content), format="safetensors")["0"]
    return [arrays[row] for row in rows]


def _read_later(file: BinaryIO, size: int, rows: list[_Row]) -> dict[_Row, mx.array]:
    """Lazy arrays for the rows that lie far enough from the beginning. Raises OSError where that does not work.

    MLX reads lazily from one kind of file, safetensors, which begins with a header. It keeps the file open, and reads
    values from that descriptor, each at its place. So it is given a file that has the header, the length of the
    checkpoint and nothing else; then the checkpoint itself is put under the descriptor, and the other file goes.
    The last bytes are a probe: they differ in the two files, so they tell which of them MLX reads.
    """
    probe = ("U8", size - min(size, 16), size)
    begin = len(_header([*rows, probe], 0))  # without an offset its numbers are the longest
    rows = [row for row in dict.fromkeys(rows) if row[1] >= begin]
    if not rows or probe[1] < begin:
        return {}
    file.seek(probe[1])
    want = file.read(16)
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as stand_in:
        stand_in.write(_header([*rows, probe], begin).ljust(begin))
        stand_in.seek(probe[1])
        stand_in.write(bytes(255 - byte for byte in want))
        stand_in.flush()
        arrays = mx.load(stand_in.name)
        descriptors = [n for n in map(int, os.listdir("/dev/fd")) if n != stand_in.fileno() and _same(n, stand_in)]
        if len(descriptors) != 1:
            raise OSError(f"MLX has opened {stand_in.name} {len(descriptors)} times")
        os.dup2(file.fileno(), descriptors[0], inheritable=False)
    if bytes(arrays.pop(str(len(rows))).tolist()) != want:
        raise OSError(f"MLX does not read from the descriptor of {stand_in.name}")
    return {row: arrays[str(index)] for index, row in enumerate(rows)}


def _same(descriptor: int, file: BinaryIO) -> bool:
    """Whether a descriptor is one of that file; one that was closed meanwhile is not."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.fstat(file.fileno()))
    except OSError:
        return False


def _header(rows: list[_Row], begin: int) -> bytes:
    """The beginning of a safetensors file that has the rows, of which the first `begin` bytes are the header.

    Where the header is shorter, spaces follow; they count as part of it.
    """
    items = dict(_TYPES.values())
    text = json.dumps(
        {
            str(index): {
                "dtype": code,
                "shape": [(end - first) // items[code]],
                "data_offsets": [first - begin, end - begin],
            }
            for index, (code, first, end) in enumerate(rows)
        },
        separators=(",", ":"),
    ).encode()
    return struct.pack("<Q", max(len(text), begin - 8)) + text
