"""Pickles read as data: an interpreter of the instructions that torch writes, which imports nothing and calls nothing.

A pickle is a small program for a stack machine. Python's own reader looks up every function that the program names and
calls it with what the program likes, so whoever wrote the file runs code here. This reader cannot do that: a name in
the file becomes a `Name`, which is a string, and is never looked up. The names that torch's files need are those of
`_KNOWN`; "calling" one of them runs a rule of this page over plain values. Every other name, and every instruction that
torch does not write, ends the reading with an error that says which. (The opcodes: Lib/pickletools.py of CPython.)

The values are dicts, lists, tuples, strings, bytes, numbers, booleans and None, and the records below.

A file may also try to cost much. Each instruction does a bounded amount of work, whatever its arguments: nothing is
copied but what stands in the file itself, keys are short, and the number of instructions has a limit.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pickletools import code2op
from typing import Any, ClassVar

_MAX_STEPS = 1_000_000  # instructions; a checkpoint of 2,000 tensors takes 60,000
_MAX_NAME = 1000  # characters of a key or of a global's name
_MAX_RANK = 32
_MAX_ARGUMENTS = 10


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


# --- what the known names mean -------------------------------------------------------------------------------------

_STORAGES = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Double": "float64", "Bool": "bool"}
_STORAGES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
_STORAGE_TYPES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
_STORAGE_TYPES |= {"torch.storage.UntypedStorage": "", "torch.UntypedStorage": ""}
_DTYPES = {f"torch.{name}": name for name in (*_STORAGES.values(), "uint16", "uint32", "uint64")}
_NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "b1": "?", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u1": "B"}

# Lightning writes the classes of a trainer's callbacks as keys. They may stand there: nothing can be done with them.
_CALLBACK = re.compile(r"(pytorch_lightning|lightning\.pytorch)\.callbacks(\.\w+){1,4}", re.ASCII)


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise PickleError(what)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _counts(value: Any) -> tuple[int, ...]:
    """A shape or strides: a tuple of numbers that are not negative."""
    _need(type(value) in (tuple, list) and len(value) <= _MAX_RANK, "it describes a tensor's shape by something else")
    _need(all(map(_is_count, value)), "it gives a tensor a negative or impossible size")
    return tuple(value)


def _ordered_dict() -> dict:
    """collections.OrderedDict, which torch makes empty and then fills."""
    return {}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """torch._utils._rebuild_tensor, and _v2, whose further arguments (gradient, hooks) do not matter here."""
    _need(isinstance(storage, Storage) and storage.dtype != "", "it builds a tensor from something else")
    return _view(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    """torch._utils._rebuild_tensor_v3: a tensor of a type that no class of storage is named after."""
    dtype = rest[2] if len(rest) > 2 else None  # behind gradient and hooks
    _need(isinstance(storage, Storage) and isinstance(dtype, Name), "it builds a tensor from something else")
    _need(dtype.path in _DTYPES and storage.dtype == "", f"it builds a tensor of type {dtype.path}")
    return _view(storage, _DTYPES[dtype.path], offset, shape, strides)


def _view(storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any) -> Tensor:
    _need(_is_count(offset), "it gives a tensor an impossible place")
    tensor = Tensor(storage, dtype, offset, _counts(shape), _counts(strides))
    _need(len(tensor.shape) == len(tensor.strides), "it gives a tensor a shape and strides of different lengths")
    return tensor


def _parameter(tensor: Any, *rest: Any) -> Tensor:
    """torch._utils._rebuild_parameter: the tensor itself."""
    _need(isinstance(tensor, Tensor), "it makes a parameter of something that is no tensor")
    return tensor


def _set(values: Any) -> list:
    _need(type(values) is list, "it makes a set of something else than a list")
    return values


def _bytes(text: Any, encoding: Any) -> bytes:
    """_codecs.encode, by which protocol 2 writes the few bytes of a numpy number."""
    _need(type(text) is str and len(text) <= 64 and encoding == "latin1", "it encodes something else than a number")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError as error:
        raise PickleError("it encodes something else than a number") from error


def _kind(code: Any, *rest: Any) -> Kind:
    """numpy.dtype("f8", False, True); the byte order follows as a state."""
    _need(type(code) is str and code in _NUMBERS, "it has a numpy value that is no plain number")
    return Kind(code)


def _number(kind: Any, data: Any) -> float | int | bool:
    """numpy.core.multiarray.scalar(dtype, bytes)"""
    data = data.encode("latin1", "replace") if type(data) is str and len(data) <= 8 else data  # as of Python 2
    _need(isinstance(kind, Kind) and type(data) is bytes, "it has a numpy value that is no plain number")
    layout = kind.order + _NUMBERS[kind.code]
    _need(len(data) == struct.calcsize(layout), "it has a numpy number of the wrong length")
    return struct.unpack(layout, data)[0]


_CALLS: dict[str, Callable[..., Any]] = {
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
_PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"
_KNOWN = {_PARAMETER_DICT, *_CALLS, *_STORAGE_TYPES, *_DTYPES}


# --- the machine ---------------------------------------------------------------------------------------------------

_LITERALS = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY = {ord("}"): dict, ord("]"): list, ord(")"): tuple}
_FIXED = {ord("J"): "<i", ord("K"): "<B", ord("M"): "<H", ord("G"): ">d"}  # BININT, BININT1, BININT2, BINFLOAT
_STRINGS = {ord("X"): "<I", 0x8C: "<B", 0x8D: "<Q"}  # BINUNICODE, SHORT_BINUNICODE, BINUNICODE8
_OLD_STRINGS = {ord("U"): "<B", ord("T"): "<I"}  # SHORT_BINSTRING, BINSTRING: strings of Python 2
_BYTES = {ord("C"): "<B", ord("B"): "<I"}  # SHORT_BINBYTES, BINBYTES
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_PUT = {ord("q"): "<B", ord("r"): "<I"}
_GET = {ord("h"): "<B", ord("j"): "<I"}


class Machine:
    """Runs the pickles of one file, which lie one behind the other in `data`; `tensors` gathers what they describe."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.steps = 0
        self.tensors: list[Tensor] = []
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """The value of the next pickle. Raises PickleError for whatever is not a plain pickle of torch."""
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open mark
        self.memo: dict[int, Any] = {}
        while (code := self._take(1)[0]) != ord("."):
            self.steps += 1
            _need(self.steps <= _MAX_STEPS, f"its pickle has more than {_MAX_STEPS:,} instructions")
            self._step(code)
        _need(len(self.stack) == 1 and not self.below, "its pickle does not end with one value")
        return self.stack.pop()

    def _step(self, code: int) -> None:
        if code in _LITERALS:
            self.stack.append(_LITERALS[code])
        elif code in _EMPTY:
            self.stack.append(_EMPTY[code]())
        elif code in _FIXED:
            self.stack.append(self._number(_FIXED[code]))
        elif code in _STRINGS:
            self.stack.append(self._text(self._take(self._number(_STRINGS[code]))))
        elif code in _OLD_STRINGS:
            self.stack.append(self._take(self._number(_OLD_STRINGS[code])).decode("latin1"))
        elif code in _BYTES:
            self.stack.append(self._take(self._number(_BYTES[code])))
        elif code in _TUPLES:
            self.stack.append(tuple(reversed([self._pop() for _ in range(_TUPLES[code])])))
        elif code in _PUT:
            self._memoize(self._number(_PUT[code]))
        elif code in _GET:
            index = self._number(_GET[code])
            _need(index in self.memo, "its pickle refers to something that it has not made")
            self.stack.append(self.memo[index])
        elif code in self._OTHERS:
            self._OTHERS[code](self)
        else:
            name = code2op[chr(code)].name if chr(code) in code2op else f"0x{code:02x}"
            raise PickleError(f"it uses the pickle instruction {name}")

    # --- reading

    def _take(self, count: int) -> bytes:
        _need(count <= len(self.data) - self.position, "its pickle ends too early")
        self.position += count
        return self.data[self.position - count : self.position]

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _text(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise PickleError("it has a string that is not text") from error

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _MAX_NAME)
        _need(end >= 0, "it has a name without an end")
        return self._text(self._take(end + 1 - self.position)[:-1])

    # --- the stack

    def _pop(self) -> Any:
        _need(bool(self.stack), "its pickle takes more than it has")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        _need(bool(self.below), "its pickle takes more than it has")
        items, self.stack = self.stack, self.below.pop()
        return items

    def _top(self) -> Any:
        _need(bool(self.stack), "its pickle takes more than it has")
        return self.stack[-1]

    def _memoize(self, index: int) -> None:
        _need(index <= _MAX_STEPS, f"its pickle counts {index:,} values")
        self.memo[index] = self._top()

    def _push_name(self, module: Any, name: Any) -> None:
        short = all(type(part) is str and len(part) <= _MAX_NAME for part in (module, name))
        _need(short, "it has a name that is no name")
        path = f"{module}.{name}"
        known = path in _KNOWN or _CALLBACK.fullmatch(path)
        _need(bool(known), f"it asks for {_printable(path)}, which a weights file does not need")
        self.stack.append(Name(path))

    # --- instructions that do something

    def _mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _tuple(self) -> None:
        items = tuple(self._pop_to_mark())
        self.stack.append(items)

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        _need(type(target) is list, "it appends to something that is no list")
        target.extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        _need(type(target) is dict and len(items) % 2 == 0, "it sets an item of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only what cannot be made to collide or to take long to compare: a dict of other keys could hang.
            short = (type(key) is str and len(key) <= _MAX_NAME) or (type(key) is int and abs(key) < 2**63)
            _need(short or isinstance(key, Name), "it has a key that is neither short text nor a number")
            target[key] = value

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        _need(isinstance(function, Name), "it calls something that is no function")
        rule = _CALLS.get(function.path)
        _need(rule is not None, f"it calls {function.path}, which a weights file does not need")
        fits = type(arguments) is tuple and len(arguments) <= _MAX_ARGUMENTS
        _need(fits, f"it calls {function.path} with arguments that do not fit")
        try:
            value = rule(*arguments)
        except TypeError as error:  # too many or too few of them
            raise PickleError(f"it calls {function.path} with arguments that do not fit") from error
        if isinstance(value, Tensor) and rule is not _parameter:
            self.tensors.append(value)
        self.stack.append(value)

    def _new_object(self) -> None:
        arguments, kind = self._pop(), self._pop()
        _need(isinstance(kind, Name), "it makes an object of something that is no class")
        fits = kind.path == _PARAMETER_DICT and type(arguments) is tuple and not arguments
        _need(fits, f"it makes an object of {kind.path}, which a weights file does not need")
        self.stack.append(ParameterDict({}))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Kind):
            fits = type(state) is tuple and len(state) > 1 and state[1] in ("<", ">", "|", "=")
            _need(fits, "it has a numpy value that is no plain number")
            target.order = ">" if state[1] == ">" else "<"
        elif isinstance(target, ParameterDict):
            fits = type(state) is dict and type(state.get("_parameters")) is dict
            _need(fits, "it has a ParameterDict without parameters")
            target.parameters = state["_parameters"]
        else:  # a state_dict carries the versions of its modules as an attribute, which do not matter here
            _need(type(target) is dict and type(state) is dict, "it changes the inside of something that is no dict")

    def _storage(self) -> None:
        """BINPERSID: ("storage", class, key, device, length), in the older format with a last None."""
        place = self._pop()
        fits = type(place) is tuple and len(place) in (5, 6) and place[0] == "storage" and place[5:] in ((), (None,))
        _need(fits, "it asks for something outside the file")
        _, kind, key, _, length = place[:5]
        _need(isinstance(kind, Name) and kind.path in _STORAGE_TYPES, "it has a storage of an unknown type")
        _need(type(key) is str and len(key) <= _MAX_NAME, "it has a storage whose key is not text")
        _need(_is_count(length), "it has a storage of a negative or impossible size")
        storage = Storage(_STORAGE_TYPES[kind.path], key, length)
        _need(self.storages.setdefault(key, storage) == storage, "it gives one storage two types or sizes")
        self.stack.append(storage)

    def _integer(self) -> None:
        data = self._take(self._number("<B"))
        _need(len(data) <= 16, "it has a number that is too long")
        self.stack.append(int.from_bytes(data, "little", signed=True))

    def _frame(self) -> None:
        _need(self._number("<Q") <= len(self.data) - self.position, "its pickle ends too early")

    def _protocol(self) -> None:
        _need(self._number("<B") <= 5, "its pickle is of an unknown protocol")

    def _stacked_name(self) -> None:
        name, module = self._pop(), self._pop()
        self._push_name(module, name)

    _OTHERS: ClassVar[dict[int, Callable[["Machine"], None]]] = {
        0x80: _protocol,
        0x95: _frame,
        ord("("): _mark,
        ord("t"): _tuple,
        ord("a"): lambda self: self._extend([self._pop()]),
        ord("e"): lambda self: self._extend(self._pop_to_mark()),
        ord("s"): lambda self: self._set_items([self._pop(), self._pop()][::-1]),
        ord("u"): lambda self: self._set_items(self._pop_to_mark()),
        ord("c"): lambda self: self._push_name(self._line(), self._line()),
        0x93: _stacked_name,
        0x94: lambda self: self._memoize(len(self.memo)),
        0x8A: _integer,
        ord("R"): _reduce,
        0x81: _new_object,
        ord("b"): _build,
        ord("Q"): _storage,
    }


def _printable(text: str) -> str:
    """What a file says, fit for one line of a message."""
    return text[:100] if text.isprintable() else ascii(text[:100])
