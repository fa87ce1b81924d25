"""Pickles read as data: an interpreter of the instructions that torch writes, which imports nothing and calls nothing.

A pickle is a small program for a stack machine. Python's own reader looks up every function that the program names and
calls it with what the program likes, so whoever wrote the file runs code here. This reader cannot do that: a name in
the file becomes a `Name`, which is a string, and is never looked up; to "call" it is to apply the rule that
`torch_names` has for it. Every other name, and every instruction that torch does not write, ends the reading with an
error that says which. (The opcodes: Lib/pickletools.py of CPython.)

The values are dicts, lists, tuples, strings, bytes, numbers, booleans, None, and the records of `torch_names`.

A file may also try to cost much. Each instruction does a bounded amount of work, whatever its arguments: nothing is
copied but what stands in the file itself, keys are short, and the number of instructions has a limit.
"""

import struct
from pickletools import code2op
from typing import Any

from .torch_names import (
    CALLS,
    PARAMETER_DICT,
    STORAGE_TYPES,
    Kind,
    Name,
    ParameterDict,
    PickleError,
    Storage,
    Tensor,
    is_count,
    is_known,
    need,
)

_MAX_STEPS = 1_000_000  # instructions; a checkpoint of 2,000 tensors takes 60,000
_MAX_NAME = 1000  # characters of a key or of a global's name
_MAX_ARGUMENTS = 10


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
            if self.steps > _MAX_STEPS:
                raise PickleError(f"its pickle has more than {_MAX_STEPS:,} instructions")
            if code not in _INSTRUCTIONS:
                raise PickleError(f"it uses the pickle instruction {_name_of(code)}")
            do, *how = _INSTRUCTIONS[code]
            do(self, *how)
        need(len(self.stack) == 1 and not self.below, "its pickle does not end with one value")
        return self.stack.pop()

    # --- reading

    def _take(self, count: int) -> bytes:
        self.position += count
        need(self.position <= len(self.data), "its pickle ends too early")
        return self.data[self.position - count : self.position]

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _sized(self, layout: str) -> bytes:
        """Bytes behind their number."""
        return self._take(self._number(layout))

    def _text(self, data: bytes) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise PickleError("it has a string that is not text") from error

    def _line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + _MAX_NAME)
        need(end >= 0, "it has a name without an end")
        return self._text(self._take(end + 1 - self.position)[:-1])

    # --- the stack

    def _pop(self) -> Any:
        need(bool(self.stack), "its pickle takes more than it has")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        need(bool(self.below), "its pickle takes more than it has")
        items, self.stack = self.stack, self.below.pop()
        return items

    def _top(self) -> Any:
        need(bool(self.stack), "its pickle takes more than it has")
        return self.stack[-1]

    def _memoize(self, index: int) -> None:
        need(index <= _MAX_STEPS, "its pickle counts its values in too large numbers")
        self.memo[index] = self._top()

    def _push_name(self, module: Any, name: Any) -> None:
        short = all(type(part) is str and len(part) <= _MAX_NAME for part in (module, name))
        need(short, "it has a name that is no name")
        path = f"{module}.{name}"
        if not is_known(path):
            raise PickleError(f"it asks for {_printable(path)}, which a weights file does not need")
        self.stack.append(Name(path))

    # --- the instructions

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _push_empty(self, kind: type) -> None:
        self.stack.append(kind())

    def _push_number(self, layout: str) -> None:
        self.stack.append(self._number(layout))

    def _push_integer(self) -> None:
        data = self._sized("<B")
        need(len(data) <= 16, "it has a number that is too long")
        self.stack.append(int.from_bytes(data, "little", signed=True))

    def _push_text(self, layout: str) -> None:
        self.stack.append(self._text(self._sized(layout)))

    def _push_bytes(self, layout: str) -> None:
        self.stack.append(self._sized(layout))

    def _put(self, layout: str) -> None:
        self._memoize(self._number(layout))

    def _get(self, layout: str) -> None:
        index = self._number(layout)
        need(index in self.memo, "its pickle refers to something that it has not made")
        self.stack.append(self.memo[index])

    def _put_next(self) -> None:
        self._memoize(len(self.memo))

    def _mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _tuple(self) -> None:
        items = self._pop_to_mark()
        self.stack.append(tuple(items))

    def _tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def _append(self) -> None:
        self._extend([self._pop()])

    def _append_many(self) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._top()
        need(type(target) is list, "it appends to something that is no list")
        target.extend(items)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _set_many(self) -> None:
        self._set_items(self._pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        need(type(target) is dict and len(items) % 2 == 0, "it sets an item of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only what cannot be made to collide or to take long to compare: a dict of other keys could hang.
            short = (type(key) is str and len(key) <= _MAX_NAME) or (type(key) is int and abs(key) < 2**63)
            need(short or isinstance(key, Name), "it has a key that is neither short text nor a number")
            target[key] = value

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        need(isinstance(function, Name), "it calls something that is no function")
        rule = CALLS.get(function.path)
        need(rule is not None, f"it calls {function.path}, which a weights file does not need")
        unfit = f"it calls {function.path} with arguments that do not fit"
        need(type(arguments) is tuple and len(arguments) <= _MAX_ARGUMENTS, unfit)
        try:
            value = rule(*arguments)
        except TypeError as error:  # too many or too few of them
            raise PickleError(unfit) from error
        if isinstance(value, Tensor) and value is not arguments[0]:  # a parameter is the tensor that it is made of
            self.tensors.append(value)
        self.stack.append(value)

    def _new_object(self) -> None:
        arguments, kind = self._pop(), self._pop()
        need(isinstance(kind, Name), "it makes an object of something that is no class")
        fits = kind.path == PARAMETER_DICT and type(arguments) is tuple and not arguments
        need(fits, f"it makes an object of {kind.path}, which a weights file does not need")
        self.stack.append(ParameterDict({}))

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Kind):
            fits = type(state) is tuple and len(state) > 1 and state[1] in ("<", ">", "|", "=")
            need(fits, "it has a numpy value that is no plain number")
            target.order = ">" if state[1] == ">" else "<"
        elif isinstance(target, ParameterDict):
            fits = type(state) is dict and type(state.get("_parameters")) is dict
            need(fits, "it has a ParameterDict without parameters")
            target.parameters = state["_parameters"]
        else:  # a state_dict carries the versions of its modules as an attribute, which do not matter here
            need(type(target) is dict and type(state) is dict, "it changes the inside of something that is no dict")

    def _storage(self) -> None:
        """BINPERSID: ("storage", class, key, device, length), in the older format with a last None."""
        place = self._pop()
        fits = type(place) is tuple and len(place) in (5, 6) and place[0] == "storage" and place[5:] in ((), (None,))
        need(fits, "it asks for something outside the file")
        _, kind, key, _, length = place[:5]
        need(isinstance(kind, Name) and kind.path in STORAGE_TYPES, "it has a storage of an unknown type")
        need(type(key) is str and len(key) <= _MAX_NAME, "it has a storage whose key is not text")
        need(is_count(length), "it has a storage of a negative or impossible size")
        storage = Storage(STORAGE_TYPES[kind.path], key, length)
        need(self.storages.setdefault(key, storage) == storage, "it gives one storage two types or sizes")
        self.stack.append(storage)

    def _frame(self) -> None:
        need(self._number("<Q") <= len(self.data) - self.position, "its pickle ends too early")

    def _protocol(self) -> None:
        need(self._number("<B") <= 5, "its pickle is of an unknown protocol")

    def _name(self) -> None:
        module, name = self._line(), self._line()
        self._push_name(module, name)

    def _stacked_name(self) -> None:
        name, module = self._pop(), self._pop()
        self._push_name(module, name)


# What an instruction does, and how its argument is laid out. What is not here is refused.
_INSTRUCTIONS: dict[int, tuple] = {
    0x80: (Machine._protocol,),
    0x95: (Machine._frame,),
    ord("N"): (Machine._push, None),
    0x88: (Machine._push, True),
    0x89: (Machine._push, False),
    ord("}"): (Machine._push_empty, dict),
    ord("]"): (Machine._push_empty, list),
    ord(")"): (Machine._push_empty, tuple),
    ord("J"): (Machine._push_number, "<i"),
    ord("K"): (Machine._push_number, "<B"),
    ord("M"): (Machine._push_number, "<H"),
    ord("G"): (Machine._push_number, ">d"),
    0x8A: (Machine._push_integer,),
    ord("X"): (Machine._push_text, "<I"),
    0x8C: (Machine._push_text, "<B"),
    0x8D: (Machine._push_text, "<Q"),
    ord("C"): (Machine._push_bytes, "<B"),
    ord("B"): (Machine._push_bytes, "<I"),
    ord("q"): (Machine._put, "<B"),
    ord("r"): (Machine._put, "<I"),
    0x94: (Machine._put_next,),
    ord("h"): (Machine._get, "<B"),
    ord("j"): (Machine._get, "<I"),
    ord("("): (Machine._mark,),
    ord("t"): (Machine._tuple,),
    0x85: (Machine._tuple_of, 1),
    0x86: (Machine._tuple_of, 2),
    0x87: (Machine._tuple_of, 3),
    ord("a"): (Machine._append,),
    ord("e"): (Machine._append_many,),
    ord("s"): (Machine._set_item,),
    ord("u"): (Machine._set_many,),
    ord("c"): (Machine._name,),
    0x93: (Machine._stacked_name,),
    ord("R"): (Machine._reduce,),
    0x81: (Machine._new_object,),
    ord("b"): (Machine._build,),
    ord("Q"): (Machine._storage,),
}


def _name_of(code: int) -> str:
    return code2op[chr(code)].name if chr(code) in code2op else f"0x{code:02x}"


def _printable(text: str) -> str:
    """What a file says, fit for one line of a message."""
    return text[:100] if text.isprintable() else ascii(text[:100])
