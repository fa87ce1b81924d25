"""Files that want more than to be read: each is refused in one line, and nothing that it names is called.

What they would run, had they been given to Python's own reader, makes a file named "canary" in the current folder.
"""

import io
import os
import pickle
import pickletools
import re
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from stable_diffusion.weights.formats import pickles
from stable_diffusion.weights.formats.pickles import read_pickle

# --- an assembler for pickles ----------------------------------------------------------------------------------------

ROOT = str(Path(__file__).parents[3])


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def row(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(path: str) -> bytes:
    module, _, attribute = path.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(path: str, *arguments: bytes) -> bytes:
    return name(path) + row(*arguments) + b"R"


def storage(key: str = "0", kind: str = "torch.FloatStorage", length: int = 4) -> bytes:
    return row(text("storage"), name(kind), text(key), text("cpu"), number(length)) + b"Q"


def numbers(*values: int) -> bytes:
    return row(*map(number, values))


def tensor(offset: int = 0, shape: tuple = (4,), strides: tuple = (1,), **place) -> bytes:
    hooks = call("collections.OrderedDict")
    arguments = storage(**place), number(offset), numbers(*shape), numbers(*strides), b"\x89", hooks
    return call("torch._utils._rebuild_tensor_v2", *arguments)


def saved(value: bytes) -> bytes:
    """A checkpoint with `value` and a good tensor."""
    return program(b"}(", text("good"), tensor(), text("x"), value, b"u")


STORAGE = {"x/data/0": bytes(16)}


def zipped(content: bytes, others: dict[str, bytes] = STORAGE, pickle: str = "x/data.pkl", **options) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(buffer, "w", **options) as file:
        for path, data in [(pickle, content), *others.items()]:
            file.writestr(path, data)
    return buffer.getvalue()


def older(content: bytes, magic: object = 0x1950A86A20F9469CFC6C, version: object = 1001, **changes) -> bytes:
    """The format before the archive, with one storage of four values."""
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    facts |= changes.get("facts", {})
    head = b"".join(pickle.dumps(value, 2) for value in (magic, version, facts))
    keys = pickle.dumps(changes.get("keys", ["0"]), 2)
    return head + content + keys + struct.pack("<q", changes.get("length", 4)) + bytes(16)


def patched(data: bytes, *changes: tuple[int, bytes]) -> bytes:
    """`data` with bytes written over it, at places that count from the end when they are negative."""
    data = bytearray(data)
    for place, new in changes:
        place %= len(data)
        data[place : place + len(new)] = new
    return bytes(data)


GOOD = saved(b"N")
ARCHIVE = zipped(GOOD)
DIRECTORY = ARCHIVE.index(b"PK\1\2")  # the list of entries: data.pkl, data/0
SECOND = ARCHIVE.index(b"PK\1\2", DIRECTORY + 4)
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


def with_wide_end(offset: int = 0, count: int = 2, first: int = DIRECTORY) -> bytes:
    """The archive with the records of 64 bits that torch writes, perhaps untrue."""
    end = len(ARCHIVE) - 22
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, end - DIRECTORY, first)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end + offset, 1)
    return ARCHIVE[:end] + wide + locator + ARCHIVE[end:]


# --- what must be refused --------------------------------------------------------------------------------------------

SHELL = text("touch canary")
CODE = text("open('canary', 'w').close()")
DICT = "collections.OrderedDict"
REBUILD = "torch._utils._rebuild_tensor_v2"

# Python's own reader makes the canary of each of these, as a test shows. With what is said of it.
EXECUTED = {
    "os.system": (program(call("os.system", SHELL)), "asks for os.system, which"),
    "os.system, protocol 0": (b"cos\nsystem\n(S'touch canary'\ntR.", "uses the pickle instruction STRING"),
    "os.system, protocol 1": (b"cos\nsystem\n(U\x0ctouch canarytR.", "uses the pickle instruction"),
    "os.system, protocol 4": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R.", "asks for os.system"),
    "posix.system": (program(call("posix.system", SHELL)), "asks for posix.system"),
    "eval": (program(call("builtins.eval", CODE)), "asks for builtins.eval"),
    "eval of Python 2": (program(call("__builtin__.eval", CODE)), "asks for __builtin__.eval"),
    "exec": (program(call("builtins.exec", CODE)), "asks for builtins.exec"),
    "os.mkdir": (program(call("os.mkdir", text("canary"))), "asks for os.mkdir"),
    "subprocess": (program(call("subprocess.getoutput", SHELL)), "asks for subprocess.getoutput"),
    "timeit": (program(call("timeit.timeit", CODE, text(""), name("time.time"), b"K\1")), "asks for timeit.timeit"),
    "getattr of a module": (
        program(call("builtins.getattr", call("builtins.__import__", text("os")), text("system")), row(SHELL), b"R"),
        "asks for builtins.getattr",
    ),
    "a dotted path": (
        b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93" + SHELL + b"\x85R.",
        "asks for torch.serialization.os.system",
    ),
    "a pickle in a pickle": (
        program(call("pickle.loads", b"C\x19cos\nmkdir\n(X\6\0\0\0canarytR.")),
        "asks for pickle.loads",
    ),
    "in a value": (program(b"}", text("x"), call("builtins.eval", CODE), b"s"), "asks for builtins.eval"),
    "in a key": (program(b"}", call("builtins.eval", CODE), text("x"), b"s"), "asks for builtins.eval"),
    "in the arguments of what may be called": (
        program(call("torch.Size", row(call("os.system", SHELL)))),
        "asks for os.system",
    ),
    "by a map": (
        program(call("builtins.list", call("builtins.map", name("os.mkdir"), b"](" + text("canary") + b"e"))),
        "asks for builtins.list",
    ),
    "by a state": (program(call("types.SimpleNamespace"), call("os.system", SHELL), b"b"), "asks for types.Simple"),
    "by a partial": (program(call("functools.partial", name("os.system"), SHELL), b")R"), "asks for functools.partial"),
    "INST": (b"(X\x0c\0\0\0touch canaryios\nsystem\n.", "instruction INST"),
    "OBJ": (program(b"(", name("posix.system"), SHELL, b"o"), "uses the pickle instruction OBJ"),
    "after what is thrown away": (program(b"N0", call("os.system", SHELL)), "instruction POP"),
    "among good weights": (saved(call("os.system", SHELL)), "asks for os.system"),
    "in a second pickle": (program(b"N") + program(call("os.system", SHELL)), "asks for os.system|holds no tensors"),
}

# Programs that Python's reader refuses, or that would cost much, or that are not what they seem.
PROGRAMS = {
    "NEWOBJ": (program(name("torch.Size"), b")\x81"), "is not loaded"),
    "NEWOBJ of a value": (program(text("os.system"), b")\x81"), "is not loaded"),
    "LONG4": (program(b"\x8b\xff\xff\xff\x7f"), "is not loaded"),
    "BYTEARRAY8": (program(b"\x96" + b"\xff" * 8), "is not loaded"),
    "an instruction that is none": (program(b"\xff"), "is not loaded"),
    "a protocol that is none": (b"\x80\x2aN.", "is not loaded"),
    "BINPERSID of text": (program(text("canary"), b"Q"), "outside the file"),
    "BINPERSID of a module": (program(row(text("module"), name(DICT), b"N", b"N"), b"Q"), "outside the file"),
    "a view of a storage": (
        saved(row(text("storage"), name("torch.FloatStorage"), text("0"), text("cpu"), number(4), row(b"N")) + b"Q"),
        "outside the file",
    ),
    "a storage of an unknown class": (saved(storage(kind=DICT)), "outside the file"),
    "a storage whose key is a list": (
        saved(row(text("storage"), name("torch.FloatStorage"), b"]", text("cpu"), number(4)) + b"Q"),
        "outside the file",
    ),
    "a storage of two types": (saved(tensor(kind="torch.HalfStorage")), "one storage two types"),
    "a storage of two sizes": (saved(tensor(length=2)), "one storage two types"),
    "get before put": (program(b"h\0"), "is not loaded"),
    "get of the memo of another pickle": (program(b"j\1\0\0\0"), "is not loaded"),
    "put of nothing": (program(b"q\0"), "is not loaded"),
    "a huge place in the memo": (program(b"Nr\xff\xff\xff\xff"), "more than 1,000,000 instructions"),
    "STACK_GLOBAL of numbers": (program(b"K\1K\2\x93"), "is not loaded"),
    "STACK_GLOBAL of a name": (program(name(DICT), text("x"), b"\x93"), "is not loaded"),
    "STACK_GLOBAL of lines": (program(text("os\n\x1b[31m"), text("system\r\n"), b"\x93"), "asks for os"),
    "STACK_GLOBAL that hides a dot": (
        program(text("torch._utils._rebuild_tensor"), text("__globals__"), b"\x93"),
        r"asks for torch\._utils\._rebuild_tensor\.__globals__",
    ),
    "a name in other letters": (program(name("tоrch.FloatStorage")), "is not loaded"),
    "a name without an end": (b"\x80\x02cos", "is not loaded"),
    "a callback that is none": (
        program(name(CALLBACK.replace("callbacks", "utilities"))),
        "asks for pytorch_lightning",
    ),
    "a callback that is called": (program(call(CALLBACK)), f"calls {CALLBACK}"),
    "a callback with a state": (program(name(CALLBACK), b"}b"), "is not loaded"),
    "a type that is called": (program(call("torch.FloatStorage", text("/etc/passwd"))), "calls torch.FloatStorage"),
    "a call of text": (program(text("os.system"), row(SHELL), b"R"), "is not loaded"),
    "a call of a call": (program(call(DICT), b")R"), "is not loaded"),
    "a call without arguments": (program(name(DICT), b"NR"), "is not loaded"),
    "a call with too few": (program(call(REBUILD, storage())), "is not loaded"),
    "a call with too many": (saved(call("torch._utils._rebuild_parameter", tensor(), *[b"N"] * 10)), "calls"),
    "a tensor of text": (saved(call(REBUILD, text("0"), b"K\0)))N")), "builds a tensor from something else"),
    "a tensor of a type that is none": (
        saved(call("torch._utils._rebuild_tensor_v3", storage("1", "torch.UntypedStorage"), b"K\0))NN", name(DICT))),
        "builds a tensor of an unknown type",
    ),
    "a size of text": (saved(call("torch.Size", text("12"))), "gives a tensor an impossible size"),
    "a numpy array": (program(name("numpy.core.multiarray._reconstruct")), "asks for numpy.core"),
    "a pickle in a storage": (program(name("torch.storage._load_from_bytes")), "asks for torch.storage._load"),
    "the hub": (program(call("torch.hub.load", text("x"), text("y"))), "asks for torch.hub.load"),
    "a state for a list": (program(b"]}b"), "is not loaded"),
    "a key that is a list": (program(b"}]Ns"), "key that is neither"),
    "a key that is a number with a point": (program(b"}G" + bytes(8) + b"Ns"), "key that is neither"),
    "a key that is a tuple": (program(b"})Ns"), "key that is neither"),
    "a key without a value": (program(b"}(Nu"), "is not loaded"),
    "an item of a list": (program(b"]NNs"), "is not loaded"),
    "an element of a dict": (program(b"}Na"), "is not loaded"),
    "no mark": (program(b"Nt"), "is not loaded"),
    "nothing": (b"", "is not loaded"),
    "no end": (b"\x80\x02}", "is not loaded"),
    "an end without a value": (program(), "is not loaded"),
    "text far beyond the end": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "is not loaded"),
    "text that is none": (program(b"X\2\0\0\0\xff\xfe"), "is not loaded"),
    "a negative size": (saved(tensor(shape=(-4,))), "gives a tensor an impossible size"),
    "a size that is true": (
        saved(call(REBUILD, storage(), number(0), row(b"\x88"), row(b"\x88"), b"N", b"N")),
        "gives a tensor an impossible size",
    ),
    "a negative stride": (saved(tensor(offset=3, strides=(-1,))), "gives a tensor an impossible size"),
    "a negative offset": (saved(tensor(offset=-1)), "gives a tensor an impossible size"),
    "an offset beyond the storage": (saved(tensor(offset=1)), "beyond its storage"),
    "a shape beyond the storage": (saved(tensor(shape=(5,))), "beyond its storage"),
    "a stride beyond the storage": (saved(tensor(shape=(2,), strides=(4,))), "beyond its storage"),
    "a stride that overflows": (saved(tensor(shape=(2,), strides=(2**62,))), "beyond its storage"),
    "a shape that overflows": (saved(tensor(shape=(2**32, 2**32), strides=(0, 0))), "describes a tensor of"),
    "an empty shape that overflows": (saved(tensor(shape=(0, 2**40), strides=(1, 1))), "describes a tensor of"),
    "one value a billion times": (saved(tensor(shape=(10**9,), strides=(0,))), "far larger than the file"),
    "a shape without strides": (saved(tensor(strides=())), "is not loaded"),
    "too many dimensions": (saved(tensor(shape=(1,) * 33, strides=(1,) * 33)), "gives a tensor an impossible size"),
}

# Instructions that torch does not write.
NOT_WRITTEN = "INT LONG LONG4 STRING BINSTRING SHORT_BINSTRING BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER FLOAT LIST"
NOT_WRITTEN += " EMPTY_SET ADDITEMS FROZENSET DICT POP DUP POP_MARK GET PUT EXT1 EXT2 EXT4 INST OBJ NEWOBJ_EX PERSID"

# Whole files.
HALF = len(ARCHIVE) // 2
FILES = {
    "an empty file": (b"", "does not begin"),
    "a page of the web": (b"<!DOCTYPE html><html>", "does not begin"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "does not begin"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "is a safetensors file: give it a name"),
    "a pickle of Python": (pickle.dumps({"a": 1}), "is not loaded"),
    "an archive, cut off": (ARCHIVE[:-1], "is not loaded"),
    "half an archive": (ARCHIVE[:HALF], "is not loaded"),
    "the end of an archive": (ARCHIVE[HALF:], "does not begin"),
    "something before the archive": (b"\x7fELF" + ARCHIVE, "does not begin"),
    "a list of entries elsewhere": (patched(ARCHIVE, (-6, b"\0\0\0\0")), "is not loaded"),
    "a list of entries beyond the end": (patched(ARCHIVE, (-10, b"\xff" * 8)), "is not loaded"),
    "an entry that is none": (patched(ARCHIVE, (DIRECTORY, b"PK\7\7")), "is not loaded"),
    "an entry elsewhere": (patched(ARCHIVE, (DIRECTORY + 42, b"\1")), "is not loaded"),
    "an entry of another name": (patched(ARCHIVE, (30, b"y")), "is not loaded"),
    "an entry that is too long": (patched(ARCHIVE, (SECOND + 20, b"\xff\xff\0\0" * 2)), "gives a storage a size"),
    "an entry as long as 4 GB": (patched(ARCHIVE, (SECOND + 20, b"\xfe\xff\xff\xff" * 2)), "gives a storage a size"),
    "an entry in another": (patched(ARCHIVE, (DIRECTORY + 20, b"\xb0\1\0\0" * 2)), "checksum of its pickle is wrong"),
    "an entry of two sizes": (patched(ARCHIVE, (SECOND + 24, b"\xff")), "is compressed"),
    "an entry without its 64-bit size": (patched(ARCHIVE, (SECOND + 20, b"\xff" * 8)), "gives a storage a size"),
    "encrypted": (patched(ARCHIVE, (DIRECTORY + 8, b"\1")), "is compressed"),
    "a storage that is encrypted": (patched(ARCHIVE, (SECOND + 8, b"\x41")), "is compressed"),
    "compressed": (zipped(GOOD, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a bomb": (zipped(GOOD, {"x/data/0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "one name twice": (zipped(GOOD, STORAGE | {"x/data.pkl": GOOD}), "is another archive, with 2"),
    "two pickles": (zipped(GOOD, STORAGE | {"y/data.pkl": GOOD}), "2 entries data.pkl"),
    "no pickle": (zipped(GOOD).replace(b"data.pkl", b"code.pkl"), "0 entries data.pkl"),
    "a pickle in a folder above": (zipped(GOOD, pickle="../x/data.pkl"), "0 entries data.pkl"),
    "a pickle at the root of the disk": (zipped(GOOD, pickle="/x/data.pkl"), "0 entries data.pkl"),
    "a name that is not text": (ARCHIVE.replace(b"x/data.pkl", b"\xff/data.pkl"), "is not loaded"),
    "numbers of another order": (zipped(GOOD, STORAGE | {"x/byteorder": b"big"}), "byte order"),
    "a long pickle": (zipped(bytes(2**25 + 1)), "may have 16,777,216"),
    "a wrong checksum": (patched(ARCHIVE, (ARCHIVE.index(GOOD) + 20, b"zz")), "checksum of its pickle"),
    "no storage": (zipped(GOOD, {}), "is not loaded"),
    "a long storage": (zipped(GOOD, {"x/data/0": bytes(17)}), "gives a storage a size"),
    "a storage in a folder above": (zipped(saved(tensor(key="../../../../../../../../etc/passwd"))), "is not loaded"),
    "a 64-bit end with another place": (with_wide_end(first=2**62), "is not loaded"),
    "older, another magic number": (older(GOOD, magic=7), "not a pickle that torch wrote"),
    "older, another version": (older(GOOD, version=1002), "not a pickle that torch wrote"),
    "older, of another order": (older(GOOD, facts={"little_endian": False}), "byte order"),
    "older, no storages": (older(GOOD, keys=[]), "list of storages is not the one"),
    "older, a storage twice": (older(GOOD, keys=["0", "0"]), "length that its pickle gives"),
    "older, another storage": (older(GOOD, keys=["../0"]), "list of storages is not the one"),
    "older, storages that are none": (older(GOOD, keys=[0]), "list of storages is not the one"),
    "older, another length": (older(GOOD, length=5), "has not the length"),
    "older, a negative length": (older(GOOD, length=-4), "has not the length"),
    "older, cut off": (older(GOOD)[:-1], "ends within a storage"),
    "older, cut off in a length": (older(GOOD)[:-20], "has not the length"),
    "older, cut off in a pickle": (older(GOOD)[:60], "is not loaded"),
}

# What does no harm is read where it can be: at most the good tensor is found.
HARMLESS = {
    "NEWOBJ with arguments": zipped(program(name("torch.nn.modules.container.ParameterDict"), row(b"}"), b"\x81")),
    "LONG1": zipped(program(b"\x8a\xff" + bytes(255))),
    "a storage without a tensor": zipped(saved(storage())),
    "a callback's method": zipped(program(name(f"{CALLBACK}.a.b.c.d"))),
    "OrderedDict of pairs": zipped(program(call(DICT, b"](K\1K\2\x86e"))),
    "a parameter of a dict": zipped(saved(call("torch._utils._rebuild_parameter", b"}", b"N", b"N"))),
    "a set of a file": zipped(saved(call("builtins.set", SHELL))),
    "encoding by something else": zipped(saved(call("_codecs.encode", CODE, text("rot13")))),
    "encoding of what has no code": zipped(saved(call("_codecs.encode", text("ü€"), text("latin1")))),
    "a numpy object": zipped(saved(call("numpy.dtype", text("O8")))),
    "a numpy number of the wrong length": zipped(
        saved(call("numpy.core.multiarray.scalar", call("numpy.dtype", text("f8")), b"C\1x"))
    ),
    "a numpy type with another state": zipped(saved(call("numpy.dtype", text("f8")) + b"}b")),
    "a state for a dict that is none": zipped(program(b"}]b")),
    "a ParameterDict without parameters": zipped(program(name("torch.nn.modules.container.ParameterDict"), b")\x81}b")),
    "a key that is long": zipped(program(b"}", text("x" * 1001), b"Ns")),
    "a key that is a huge number": zipped(program(b"}", number(2**61 * 5 - 5), b"Ns")),
    "an end with two values": zipped(program(b"NN")),
    "a frame beyond the end": zipped(b"\x80\x04\x95" + b"\xff" * 8 + b"N."),
    "a dict that contains itself": zipped(program(b"}q\0", text("x"), b"h\0s")),
    "a thousand tuples within one another": zipped(program(b"N" + b"\x85" * 10_000)),
    "an archive before the archive": b"PK\3\4" + ARCHIVE,
    "something behind the archive": ARCHIVE + b"x",
    "a comment": patched(ARCHIVE, (-2, b"\4\0")) + b"evil",
    "several disks": patched(ARCHIVE, (-18, b"\1\0")),
    "more entries than there are": patched(ARCHIVE, (-14, b"\3\0\3\0")),
    "an entry of another method": patched(ARCHIVE, (8, b"\x08")),
    "a storage that is a folder": patched(ARCHIVE, (SECOND + 38, b"\x10")),
    "a 64-bit end far away": with_wide_end(offset=2**63 - 10**6),
    "a 64-bit end with another number": with_wide_end(count=2**60),
    "older, something behind": older(GOOD) + b"x",
}


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch) -> Path:
    """What the programs would make; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "canary"


def refused(content: bytes) -> str:
    """What is said of a file with this content: one line that begins with its name. Nothing else may happen."""
    Path("x.ckpt").write_bytes(content)
    modules = set(sys.modules)
    with pytest.raises(ValueError) as caught:
        read_pickle(Path("x.ckpt"))
    assert list(map(str, Path().rglob("*"))) == ["x.ckpt"] and set(sys.modules) == modules
    message = str(caught.value)
    assert message.startswith("x.ckpt ") and message.isprintable() and len(message) < 400
    return message


def test_what_is_built_here_is_read_where_nothing_is_wrong():
    for content in (ARCHIVE, with_wide_end(), older(GOOD)):
        Path("x.ckpt").write_bytes(content)
        assert read_pickle(Path("x.ckpt"))[0]["good"].tolist() == [0, 0, 0, 0]
    Path("x.ckpt").write_bytes(zipped(saved(tensor(key="../../x")), STORAGE | {"x/data/../../x": bytes(16)}))
    assert read_pickle(Path("x.ckpt"))[0]["x"].shape == (4,)  # a key is a key


@pytest.mark.parametrize("content", HARMLESS.values(), ids=HARMLESS)
def test_what_does_no_harm_is_read_or_left_out(content, canary):
    Path("x.ckpt").write_bytes(content)
    try:
        tensors, texts = read_pickle(Path("x.ckpt"))
    except ValueError as error:
        assert str(error) == "x.ckpt holds no tensors with names"
    else:
        assert {name: value.tolist() for name, value in tensors.items()} == {"good": [0, 0, 0, 0]} and texts == {}
    assert list(map(str, Path().rglob("*"))) == ["x.ckpt"]


@pytest.mark.parametrize("content", [content for content, _ in EXECUTED.values()], ids=EXECUTED)
def test_pythons_own_reader_runs_it(content, canary):
    reader = pickle.Unpickler(io.BytesIO(content))
    reader.persistent_load = lambda place: torch.storage.TypedStorage(4, dtype=torch.float32, _internal=True)
    with suppress(pickle.UnpicklingError):  # when the harm is done
        while not canary.exists():
            reader.load()
    assert canary.exists()


@pytest.mark.parametrize("content, reason", EXECUTED.values(), ids=EXECUTED)
def test_nothing_is_run(content, reason):
    for file in (older(content), content + older(GOOD), content):
        refused(file)
    assert re.search(reason, refused(zipped(content)))


@pytest.mark.parametrize("content, reason", PROGRAMS.values(), ids=PROGRAMS)
def test_no_other_program_is_accepted(content, reason):
    message = refused(zipped(content))
    assert re.search(reason, message), message
    refused(older(content))


@pytest.mark.parametrize("instruction", NOT_WRITTEN.split())
def test_no_other_instruction_is_accepted(instruction):
    (code,) = (known for known in pickletools.opcodes if known.name == instruction)
    kind = code.arg.name if code.arg is not None else ""
    argument = b"''\n" if kind == "stringnl" else b"1\n1\n" if "nl" in kind else bytes(8)
    assert f"uses the pickle instruction {instruction};" in refused(
        zipped(program(code.code.encode("latin1"), argument))
    )


@pytest.mark.parametrize("content, reason", FILES.values(), ids=FILES)
def test_no_other_file_is_accepted(content, reason):
    message = refused(content)
    assert re.search(reason, message), message


COSTLY = {
    "what is doubled thirty times, as a key": b"})q\0"
    + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(30))
    + b"Ns",
    "long arguments": row(*[b"N"] * 60_000) + b"q\1" + (name(DICT) + b"h\1R") * 20,
    "many tuples": row(*[b"N"] * 60_000) + b"q\1" + b"(h\1t" * 20_000,
    "long keys": text("x" * 10**6) + b"q\1}" + b"h\1Ns" * 20_000,
    "colliding keys": b"}" + b"".join(number(i * (2**61 - 1)) + b"Ns" for i in range(20_000)),
    "many marks": b"(" * 60_000,
    "many storages": b"".join(storage(key=str(i)) for i in range(2_000)),
}


@pytest.mark.parametrize("body", COSTLY.values(), ids=COSTLY)
def test_much_takes_no_time(body):
    start = time.process_time()
    refused(zipped(program(body)))
    assert time.process_time() - start < 0.5


def test_the_number_of_instructions_has_a_limit(monkeypatch):
    monkeypatch.setattr(pickles, "_MAX_STEPS", 5_000)
    assert "more than 5,000 instructions" in refused(zipped(program(b"(" + b"N" * 5_000)))


LARGE = {
    "dicts": b"}" * 950_000,
    "names": b"ctorch\nSize\n" * 950_000,
    "calls": b"ccollections\nOrderedDict\n)R" * 470_000,
    "keys": b"}(" + b"".join(number(i) + b"N" for i in range(450_000)) + b"u",
    "tuples": b"N" + b"\x85" * 950_000,
    "text": text("x" * 15_000_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE)
def test_as_much_as_is_allowed_takes_ten_seconds_and_500_megabytes_at_most(body):
    Path("x.ckpt").write_bytes(zipped(program(body)))
    code = "import resource; from pathlib import Path\n"
    code += "from stable_diffusion.weights.formats.pickles import read_pickle\n"
    code += "before = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "try: read_pickle(Path('x.ckpt'))\nexcept ValueError: pass\n"
    code += "after = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "print(after.ru_utime - before.ru_utime, (after.ru_maxrss - before.ru_maxrss) / 1e6)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT}
    )
    seconds, gigabytes = map(float, done.stdout.split())
    assert seconds < 10 and gigabytes * (1 if sys.platform == "linux" else 1e-3) < 0.5


def test_a_long_list_of_entries_is_not_read():
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", *[20] * 2, *[0] * 14)
    count = 2**24 // len(entry) + 1
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, count * len(entry), len(ARCHIVE), 0)
    assert "may have 16,777,216" in refused(ARCHIVE + entry * count + end)
