"""The names that torch's pickles contain, and what they mean here: rules over plain values, in place of functions.

A pickle names the functions that build its values. None of them is looked up: `CALLS` has, for each name that torch's
files need, a rule of this page that checks its arguments and gives a plain value or one of the records below. A rule
does a bounded amount of work, whatever a file gives it, and a name without a rule cannot be called.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_MAX_RANK = 32


class PickleError(ValueError):
    """What a pickle asks for that a weights file does not need, as the middle of a sentence."""


@dataclass(frozen=True)
class Name:
    """A global that the file names: "torch.FloatStorage". A string, not the thing."""

    path: str


@dataclass(frozen=True)
class Storage:
    """A row of numbers that lies outside the pickle, in the same file."""

    dtype: str  # "float32"; "" for bytes that a tensor gives a type
    key: str
    length: int  # values, or bytes where there is no type


@dataclass(frozen=True, eq=False)  # told apart by identity: a file could make them collide in a dict
class Tensor:
    """A view of a storage; offset and strides count values."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class Kind:
    """A numpy.dtype: "f8", and its byte order."""

    code: str
    order: str = "<"


@dataclass
class ParameterDict:
    """The torch.nn.ParameterDict of old embeddings: of its state only the parameters count."""

    parameters: dict


_STORAGES = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Double": "float64", "Bool": "bool"}
_STORAGES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
STORAGE_TYPES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
STORAGE_TYPES |= {"torch.storage.UntypedStorage": "", "torch.UntypedStorage": ""}
_DTYPES = {f"torch.{name}": name for name in (*_STORAGES.values(), "uint16", "uint32", "uint64")}
_NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "b1": "?", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u1": "B"}

# Lightning writes the classes of a trainer's callbacks as keys. They may stand there: nothing can be done with them.
_CALLBACK = re.compile(r"(pytorch_lightning|lightning\.pytorch)\.callbacks(\.\w+){1,4}", re.ASCII)


def need(condition: bool, what: str) -> None:
    """Raises PickleError unless the condition holds."""
    if not condition:
        raise PickleError(what)


def is_count(value: Any) -> bool:
    """Whether a value is a number of things that a file can have."""
    return type(value) is int and 0 <= value < 2**63


def _counts(value: Any) -> tuple[int, ...]:
    """A shape or strides: a tuple of numbers that are not negative."""
    need(type(value) in (tuple, list) and len(value) <= _MAX_RANK, "it describes a tensor's shape by something else")
    need(all(map(is_count, value)), "it gives a tensor a negative or impossible size")
    return tuple(value)


def _ordered_dict() -> dict:
    """collections.OrderedDict, which torch makes empty and then fills."""
    return {}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """torch._utils._rebuild_tensor, and _v2, whose further arguments (gradient, hooks) do not matter here."""
    need(isinstance(storage, Storage) and storage.dtype != "", "it builds a tensor from something else")
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v3: a tensor of a type that no class of storage is named after."""
    dtype = rest[2] if len(rest) > 2 else None  # behind gradient and hooks
    need(isinstance(storage, Storage) and isinstance(dtype, Name), "it builds a tensor from something else")
    need(dtype.path in _DTYPES and storage.dtype == "", f"it builds a tensor of type {dtype.path}")
    return _view(storage, _DTYPES[dtype.path], offset, shape, strides)


def _view(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> Tensor:
    need(is_count(offset), "it gives a tensor an impossible place")
    tensor = Tensor(storage, dtype, offset, _counts(shape), _counts(strides))
    need(len(tensor.shape) == len(tensor.strides), "it gives a tensor a shape and strides of different lengths")
    return tensor


def _parameter(tensor: Any, *rest: Any) -> Tensor:
    """torch._utils._rebuild_parameter: the tensor itself."""
    need(isinstance(tensor, Tensor), "it makes a parameter of something that is no tensor")
    return tensor


def _set(values: Any) -> list:
    need(type(values) is list, "it makes a set of something else than a list")
    return values


def _bytes(text: Any, encoding: Any) -> bytes:
    """_codecs.encode, by which protocol 2 writes the few bytes of a numpy number."""
    need(type(text) is str and len(text) <= 64 and encoding == "latin1", "it encodes something else than a number")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise PickleError("it encodes something else than a number") from error


def _kind(code: Any, *rest: Any) -> Kind:
    """numpy.dtype("f8", False, True); the byte order follows as a state."""
    need(type(code) is str and code in _NUMBERS, "it has a numpy value that is no plain number")
    return Kind(code)


def _number(kind: Any, data: Any) -> float | int | bool:
    """numpy.core.multiarray.scalar(dtype, bytes)"""
    need(isinstance(kind, Kind) and type(data) is bytes, "it has a numpy value that is no plain number")
    layout = kind.order + _NUMBERS[kind.code]
    need(len(data) == struct.calcsize(layout), "it has a numpy number of the wrong length")
    return struct.unpack(layout, data)[0]


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _counts,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "__builtin__.set": _set,
    "builtins.set": _set,
    "_codecs.encode": _bytes,
    "numpy.dtype": _kind,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
}
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"
_KNOWN = {PARAMETER_DICT, *CALLS, *STORAGE_TYPES, *_DTYPES}


def is_known(path: str) -> bool:
    """Whether a weights file may contain this name."""
    return path in _KNOWN or bool(_CALLBACK.fullmatch(path))
