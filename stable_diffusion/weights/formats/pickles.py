"""Read weights in torch's own files (.ckpt, .pt, .pth, .bin) without torch, and without running anything in them.

Since torch 1.6 such a file is a zip archive: NAME/data.pkl is a pickle of the saved object, its tensors are views of
storages NAME/data/KEY. Older files are a row of pickles (a magic number, a version, facts about the machine, the saved
object, the keys), followed by the storages, each after its length.
A pickle is a program that calls the objects it names. Here nothing is imported: a name becomes one of the inert classes
below, or is refused. Storages are copied into a temporary safetensors file, which MLX reads lazily.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import namedtuple
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from .safetensors import BITS, ITEM_SIZES, MAX_LENGTH, cast_bits, load_copy, loading_stream

_MAX_STEPS = 1_000_000  # instructions; a checkpoint of 2,000 tensors takes 60,000
_MAX_READ = 1 << 24  # bytes of a pickle, or of a zip archive's list of entries
_MAX_REUSE = 4  # total size of all tensors over the size of the file: some share their storage
_SLACK = 1 << 20  # further bytes of tensors

# Each type's code in a safetensors header.
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "bool": "BOOL", "": "U8"}
_TYPES |= {f"{sign}int{8 * n}": f"{sign or 'i'}{8 * n}".upper() for sign in ("", "u") for n in (1, 2, 4, 8)}
_TYPES |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_SIZES = {dtype: ITEM_SIZES[code] for dtype, code in _TYPES.items()}
_STORAGES = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Double": "float64", "Bool": "bool"}
_STORAGES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
_STORAGES |= {"torch.storage.UntypedStorage": "", "torch.UntypedStorage": ""}
_DTYPES = {f"torch.{name}": name for name in _TYPES if name}
_OBJECTS = {"_.dict", "collections.OrderedDict", "torch.nn.modules.container.ParameterDict", "builtins.set"}
_OBJECTS |= {"__builtin__.set", "_codecs.encode", "numpy.dtype"}
_OBJECTS |= {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}
_NESTED = {"image_proj", "ip_adapter", "image_proj_model", "adapter_modules"}  # dicts of tensors in an IP-Adapter
_CALLBACKS = ("pytorch_lightning.callbacks.", "lightning.pytorch.callbacks.")  # classes saved by trainers as keys

_WRITTEN_BY_TORCH = """
    PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8
    SHORT_BINBYTES BINBYTES EMPTY_DICT EMPTY_LIST EMPTY_TUPLE MARK TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM
    SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""
_INSTRUCTIONS = set(_WRITTEN_BY_TORCH.split())
_REPLACED = {"EMPTY_DICT": b"c_\ndict\n)R", "FRAME": b""}  # every dict is an _Object, which checks its keys

_ERRORS = (ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError, RuntimeError, OSError)
_ERRORS += (struct.error, pickle.PickleError, zipfile.BadZipFile)  # of the standard library, for damaged files

_Storage = namedtuple("_Storage", "dtype size length key")  # size in bytes; for dtype "" the tensor has the type
_Tensor = namedtuple("_Tensor", "storage dtype offset shape strides")  # counted in values


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


class _Object(dict):
    """Replace a dict, a ParameterDict, a set or a numpy number; only items and parameters are kept."""

    def __init__(self, *args: Any):
        _need(len(args) <= 10, "it creates an object with too many arguments")

    def __setitem__(self, key: Any, value: Any) -> None:
        # A tuple could take years to hash, and numbers beyond 64 bits could collide on purpose.
        fits = isinstance(key, str | _Name) or (type(key) is int and abs(key) < 2**64)
        _need(fits, "it has a key that is neither text nor a number")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, _Object) and isinstance(state.get("_parameters"), _Object):
            self.update(state["_parameters"])


class _Name(NamedTuple):
    """Replace another global that a file names. A call applies its rule, or fails without one."""

    path: str

    def __call__(self, *args: Any) -> Any:
        _need(self.path in _RULES and len(args) <= 10, f"it calls {self.path}, which a weights file does not need")
        return _RULES[self.path](*args)


def _counts(numbers: Any) -> tuple[int, ...]:
    fits = isinstance(numbers, tuple | list) and len(numbers) <= 32
    _need(fits and all(type(n) is int and 0 <= n < 2**63 for n in numbers), "it gives a tensor an impossible size")
    return tuple(numbers)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    """Apply torch._utils._rebuild_tensor, _v2 or _v3; the last has a type after gradient and hooks."""
    _need(isinstance(storage, _Storage), "it builds a tensor from something else")
    dtype = storage.dtype or _DTYPES.get(getattr(rest[2], "path", None) if len(rest) > 2 else None)
    _need(dtype is not None, "it builds a tensor of an unknown type")
    (offset,), shape, strides = _counts([offset]), _counts(shape), _counts(strides)
    _need(max(math.prod(shape), *shape, 0) <= MAX_LENGTH, f"it describes a tensor of over {MAX_LENGTH:,} values")
    end = offset + 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    _need(0 in shape or end * _SIZES[dtype] <= storage.size, "it describes a tensor that reaches beyond its storage")
    return _Tensor(storage, dtype, 0 if 0 in shape else offset, shape, strides)


_RULES = {"torch.Size": _counts} | {f"torch._utils._rebuild_tensor{v}": _tensor for v in ("", "_v2", "_v3")}
_RULES |= {f"torch._utils._rebuild_parameter{v}": lambda tensor, *rest: tensor for v in ("", "_with_state")}
_KNOWN = {*_OBJECTS, *_RULES, *_STORAGES, *_DTYPES}


class _Reader(pickle.Unpickler):
    """Run the next pickle of a file. ``storages`` collects the storages that it names."""

    def __init__(self, stream: io.BytesIO, storages: dict[str, _Storage]):
        super().__init__(io.BytesIO(_checked(stream)))
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path not in _KNOWN and not path.startswith(_CALLBACKS):
            raise ValueError(f"it refers to {path[:100]}, which a weights file does not need")
        return _Object if path in _OBJECTS else _Name(path)

    def persistent_load(self, pid: Any) -> _Storage:
        fits = isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage" and pid[5:] in ((), (None,))
        fits = fits and isinstance(pid[1], _Name) and pid[1].path in _STORAGES and isinstance(pid[2], str)
        _need(fits, "it refers to something outside the file")
        dtype, (length,) = _STORAGES[pid[1].path], _counts([pid[4]])
        storage = _Storage(dtype, length * _SIZES[dtype], length, pid[2])
        _need(self.storages.setdefault(pid[2], storage) == storage, "it gives one storage two types or sizes")
        return storage


def _checked(stream: io.BytesIO) -> bytes:
    """Return the next pickle with our dicts. Refuses instructions that torch does not write, and too many."""
    data, pieces, begin = stream.getvalue(), [], stream.tell()
    for step, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if opcode.name not in _INSTRUCTIONS:
            raise ValueError(f"it uses the pickle instruction {opcode.name}")
        if step >= _MAX_STEPS or (opcode.name == "LONG_BINPUT" and argument > _MAX_STEPS):
            raise ValueError(f"its pickle has more than {_MAX_STEPS:,} instructions or values")
        if opcode.name in _REPLACED:
            pieces += [data[begin:position], _REPLACED[opcode.name]]
            begin = stream.tell()
    return b"".join([*pieces, data[begin : stream.tell()]])


class _File(io.BufferedReader):
    """Refuse to read much at once, as zipfile would for a long list of entries."""

    def read(self, size: int | None = -1) -> bytes:
        _need(size is None or size <= _MAX_READ, f"it has a part of {size:,} bytes; the limit is {_MAX_READ:,}")
        return super().read(size)


def _read_archive(file: _File) -> tuple[Any, dict[_Storage, int]]:
    """Return the saved object of a zip archive, and {storage: its first byte}."""
    with zipfile.ZipFile(file) as archive:

        def seek(name: str) -> int:
            info = archive.getinfo(name)
            is_stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
            _need(is_stored and not info.flag_bits & 1, "it is compressed or encrypted, which torch does not do")
            archive.open(info).close()  # reads and checks the entry's header
            return info.file_size

        def content(name: str) -> bytes:
            data = file.read(seek(name))
            checksums = (zlib.crc32(data), 0)  # torch has an option to write 0
            _need(archive.getinfo(name).CRC in checksums, "the checksum of its pickle is wrong")
            return data

        names = archive.namelist()
        roots = [n.removesuffix("data.pkl") for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        _need(len(roots) == 1, f"its archive has {len(roots)} entries data.pkl instead of one")
        order = f"{roots[0]}byteorder"
        _need(order not in names or content(order) == b"little", "its numbers are big-endian, which is not supported")
        storages: dict[str, _Storage] = {}
        value, places = _Reader(io.BytesIO(content(f"{roots[0]}data.pkl")), storages).load(), {}
        for storage in storages.values():
            size = seek(f"{roots[0]}data/{storage.key}")
            _need(size == storage.size, "it gives a storage a size that the file does not have")
            places[storage] = file.tell()
        return value, places


def _read_row(file: _File) -> tuple[Any, dict[_Storage, int]]:
    """Return the saved object of a file from before torch 1.6, and {storage: its first byte}."""
    stream, storages, places = io.BytesIO(file.read(_MAX_READ)), {}, {}
    magic, version, facts = (_Reader(stream, {}).load() for _ in range(3))
    is_little = isinstance(facts, dict) and facts.get("little_endian") is True
    is_torch = [magic, version, is_little] == [0x1950A86A20F9469CFC6C, 1001, True]
    _need(is_torch, "it was not written by torch, or is big-endian")
    value, keys = _Reader(stream, storages).load(), _Reader(stream, {}).load()
    fits = isinstance(keys, list) and all(isinstance(key, str) for key in keys) and set(keys) == storages.keys()
    _need(fits, "its list of storages does not match its tensors")
    position = stream.tell()
    for storage in map(storages.get, keys):
        file.seek(position)
        _need(file.read(8) == struct.pack("<q", storage.length), "a storage has another length than its pickle says")
        places[storage], position = position + 8, position + 8 + storage.size
    return value, places


def _copy(file: _File, storages: Collection[_Storage], places: dict[_Storage, int]) -> dict[_Storage, mx.array]:
    size = file.seek(0, io.SEEK_END)
    fits = sum(s.size for s in storages) <= size and all(places[s] + s.size <= size for s in storages)
    _need(fits, "it ends within a storage")
    rows = {str(i): (_TYPES[s.dtype], [s.length], places[s], s.size) for i, s in enumerate(storages)}
    return dict(zip(storages, map(load_copy(file, rows).get, rows), strict=True))


def _view(row: mx.array, tensor: _Tensor) -> mx.array:
    stream, code = loading_stream(mx.cpu), _TYPES[tensor.dtype]
    bits = BITS.get(code) or getattr(mx, tensor.dtype, mx.bool_)
    array = mx.as_strided(row.view(bits, stream=stream), tensor.shape, tensor.strides, tensor.offset, stream=stream)
    return cast_bits(array, code) if code in BITS else array


def read_pickle(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Return the lazy tensors of a file by name, and the texts beside them.

    A trainer's checkpoint has its tensors in "state_dict" or "model", an embedding in "string_to_param", an upscaler in
    "params_ema" or "params", a T2I-Adapter also in "adapter". The tensors of an IP-Adapter get the names of a
    safetensors file. float64 becomes float32, 8-bit floats become float16. Raises ValueError for a file that is
    damaged, has no tensors, or refers to objects that weights do not need.
    """
    with _File(path.open("rb", buffering=0)) as file:
        start = file.peek(4)[:4]
        try:
            _need(start.startswith((b"PK\3\4", b"\x80")), "it does not begin like a torch file")
            value, places = (_read_archive if start.startswith(b"PK") else _read_row)(file)
            weights = value = value if isinstance(value, dict) else {}
            for key in 3 * ("state_dict", "model", "string_to_param", "params_ema", "params", "adapter"):
                weights = weights[key] if isinstance(weights.get(key), dict) else weights
            for key in _NESTED & weights.keys():
                inner = weights[key] if isinstance(weights[key], dict) else {}
                weights = weights | {f"{key}.{k}": v for k, v in inner.items() if isinstance(k, str)}
            tensors = {k: v for k, v in weights.items() if isinstance(k, str) and isinstance(v, _Tensor)}
            sizes = (math.prod(tensor.shape) * _SIZES[tensor.dtype] for tensor in tensors.values())
            _need(sum(sizes) <= _MAX_REUSE * path.stat().st_size + _SLACK, "its tensors are far larger than the file")
            storages = _copy(file, dict.fromkeys(tensor.storage for tensor in tensors.values()), places)
            arrays = {name: _view(storages[tensor.storage], tensor) for name, tensor in tensors.items()}
        except _ERRORS as error:
            reason = ascii(str(error))[1:-1][:200]
            raise ValueError(f"{path} is not loaded: {reason}; download it again, or use .safetensors") from error
    _need(bool(arrays), f"{path} holds no tensors with names")
    return arrays, {key: text for key, text in value.items() if isinstance(key, str) and isinstance(text, str)}
