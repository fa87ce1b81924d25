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

# --- what must be refused --------------------------------------------------------------------------------------------

SHELL = text("touch canary")
CODE = text("open('canary', 'w').close()")
DICT = "collections.OrderedDict"
REBUILD = "torch._utils._rebuild_tensor_v2"

# Python's own reader makes the canary of each of these, as the test shows. With what is said of it.
EXECUTED = {
    "os.system": (program(call("os.system", SHELL)), "refers to os.system, which"),
    "protocol 0": (b"cos\nsystem\n(S'touch canary'\ntR.", "uses the pickle instruction STRING"),
    "protocol 1": (b"cos\nsystem\n(U\x0ctouch canarytR.", "uses the pickle instruction"),
    "protocol 4": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R.", "refers to os.system"),
    "eval": (program(call("builtins.eval", CODE)), "refers to builtins.eval"),
    "a dotted path": (
        b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93" + SHELL + b"\x85R.",
        "refers to torch.serialization.os.system",
    ),
    "a pickle in a pickle": (
        program(call("pickle.loads", b"C\x19cos\nmkdir\n(X\6\0\0\0canarytR.")),
        "refers to pickle",
    ),
    "in a key": (program(b"}", call("builtins.eval", CODE), text("x"), b"s"), "refers to builtins.eval"),
    "in arguments": (program(call("torch.Size", row(call("os.system", SHELL)))), "refers to os.system"),
    "by a state": (program(call("types.SimpleNamespace"), call("os.system", SHELL), b"b"), "refers to types.Simple"),
    "INST": (b"(X\x0c\0\0\0touch canaryios\nsystem\n.", "instruction INST"),
    "OBJ": (program(b"(", name("posix.system"), SHELL, b"o"), "uses the pickle instruction OBJ"),
    "after what is thrown away": (program(b"N0", call("os.system", SHELL)), "instruction POP"),
    "among good weights": (saved(call("os.system", SHELL)), "refers to os.system"),
    "in a second pickle": (program(b"N") + program(call("os.system", SHELL)), "refers to os.system|holds no tensors"),
}

# Programs that Python's reader refuses, or that would cost much, or that are not what they seem; what is said of them.
PROGRAMS = [
    (program(name("torch.Size"), b")\x81"), "is not loaded"),
    (program(text("os.system"), b")\x81"), "is not loaded"),
    (program(b"\xff"), "is not loaded"),  # an instruction that is none
    (b"\x80\x2aN.", "is not loaded"),  # a protocol that is none
    (program(text("canary"), b"Q"), "outside the file"),
    (program(row(text("module"), name(DICT), b"N", b"N"), b"Q"), "outside the file"),
    (saved(storage()[:-2] + row(b"N") + b"tQ"), "outside the file"),  # a view of a storage
    (saved(storage(kind=DICT)), "outside the file"),
    (saved(storage().replace(text("0"), b"]")), "outside the file"),  # a key that is a list
    (saved(tensor(kind="torch.HalfStorage")), "one storage two types"),
    (saved(tensor(length=2)), "one storage two types"),
    (program(b"h\0"), "is not loaded"),  # from a memo that is empty
    (program(b"Nr\xff\xff\xff\xff"), "more than 1,000,000 instructions"),  # far into the memo
    (program(b"K\1K\2\x93"), "is not loaded"),  # a name of numbers
    (program(text("os\n\x1b[31m"), text("system\r\n"), b"\x93"), "refers to os"),
    (
        program(text("torch._utils._rebuild_tensor"), text("__globals__"), b"\x93"),
        r"refers to torch\._utils\._rebuild_tensor\.__globals__",
    ),
    (program(name("tоrch.FloatStorage")), "is not loaded"),  # with a letter that is not Latin
    (program(name(CALLBACK.replace("callbacks", "utilities"))), "refers to pytorch_lightning"),
    (program(call(CALLBACK)), f"calls {CALLBACK}"),
    (program(name(CALLBACK), b"}b"), "is not loaded"),
    (program(call("torch.FloatStorage", text("/etc/passwd"))), "calls torch.FloatStorage"),
    (program(text("os.system"), row(SHELL), b"R"), "is not loaded"),
    (program(call(REBUILD, storage())), "is not loaded"),
    (saved(call("torch._utils._rebuild_parameter", tensor(), *[b"N"] * 10)), "calls"),
    (program(call(DICT, *[b"N"] * 11)), "creates an object with too many arguments"),
    (saved(call(REBUILD, text("0"), b"K\0)))N")), "builds a tensor from something else"),
    (
        saved(call("torch._utils._rebuild_tensor_v3", storage("1", "torch.UntypedStorage"), b"K\0))NN", name(DICT))),
        "builds a tensor of an unknown type",
    ),
    (saved(call("torch.Size", text("12"))), "gives a tensor an impossible size"),
    (program(name("numpy.core.multiarray._reconstruct")), "refers to numpy.core"),
    (program(name("torch.storage._load_from_bytes")), "refers to torch.storage._load"),
    (program(b"]}b"), "is not loaded"),  # a state for a list
    (program(b"}]Ns"), "key that is neither"),
    (program(b"}G" + bytes(8) + b"Ns"), "key that is neither"),  # a number with a point
    (program(b"})Ns"), "key that is neither"),  # a tuple
    (program(b"}(Nu"), "is not loaded"),  # without a value
    (program(b"Nt"), "is not loaded"),  # no mark
    (b"", "is not loaded"),
    (b"\x80\x02}", "is not loaded"),  # no end
    (program(), "is not loaded"),
    (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "is not loaded"),  # text far beyond the end
    (program(b"X\2\0\0\0\xff\xfe"), "is not loaded"),  # text that is none
    (saved(tensor(shape=(-4,))), "gives a tensor an impossible size"),
    (
        saved(call(REBUILD, storage(), number(0), row(b"\x88"), row(b"\x88"), b"N", b"N")),
        "gives a tensor an impossible size",
    ),
    (saved(tensor(offset=3, strides=(-1,))), "gives a tensor an impossible size"),
    (saved(tensor(offset=-1)), "gives a tensor an impossible size"),
    (saved(tensor(shape=(1,) * 33, strides=(1,) * 33)), "gives a tensor an impossible size"),
    (saved(tensor(offset=1)), "beyond its storage"),
    (saved(tensor(shape=(5,))), "beyond its storage"),
    (saved(tensor(shape=(2,), strides=(2**62,))), "beyond its storage"),
    (saved(tensor(shape=(2**32, 2**32), strides=(0, 0))), "describes a tensor of"),
    (saved(tensor(shape=(0, 2**40), strides=(1, 1))), "describes a tensor of"),
    (saved(tensor(shape=(10**9,), strides=(0,))), "far larger than the file"),
    (saved(tensor(strides=())), "is not loaded"),
]

# Instructions that torch does not write.
NOT_WRITTEN = "INT LONG LONG4 STRING BINSTRING SHORT_BINSTRING BYTEARRAY8 NEXT_BUFFER READONLY_BUFFER FLOAT LIST"
NOT_WRITTEN += " EMPTY_SET ADDITEMS FROZENSET DICT POP DUP POP_MARK GET PUT EXT1 EXT2 EXT4 INST OBJ NEWOBJ_EX PERSID"

# Whole files.
HALF = len(ARCHIVE) // 2
FILES = [
    (b"", "does not begin"),
    (b"<!DOCTYPE html><html>", "does not begin"),
    (struct.pack("<Q", 2) + b"{}", "does not begin"),
    (pickle.dumps({"a": 1}), "is not loaded"),
    (ARCHIVE[:-1], "is not loaded"),
    (ARCHIVE[:HALF], "is not loaded"),
    (ARCHIVE[HALF:], "does not begin"),
    (b"\x7fELF" + ARCHIVE, "does not begin"),
    # The archive's list of entries, which is elsewhere, and entries that are not as it says.
    (patched(ARCHIVE, (-10, b"\xff" * 8)), "is not loaded"),
    (patched(ARCHIVE, (DIRECTORY, b"PK\7\7")), "is not loaded"),
    (patched(ARCHIVE, (DIRECTORY + 42, b"\1")), "is not loaded"),
    (patched(ARCHIVE, (30, b"y")), "is not loaded"),
    (patched(ARCHIVE, (SECOND + 20, b"\xff\xff\0\0" * 2)), "gives a storage a size"),
    (patched(ARCHIVE, (DIRECTORY + 20, b"\xb0\1\0\0" * 2)), "checksum of its pickle is wrong"),
    (patched(ARCHIVE, (SECOND + 24, b"\xff")), "is compressed"),
    (patched(ARCHIVE, (DIRECTORY + 8, b"\1")), "is compressed"),  # encrypted
    (patched(ARCHIVE, (DIRECTORY + 10, b"\x08")), "is compressed"),  # to the same size
    (zipped(GOOD, {"x/data/0": bytes(10**7)}, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    # Entries that are too many, too few, or not torch's.
    (zipped(GOOD, STORAGE | {"x/data.pkl": GOOD}), "its archive has 2"),
    (zipped(GOOD, STORAGE | {"y/data.pkl": GOOD}), "2 entries data.pkl"),
    (zipped(GOOD, pickle="../x/data.pkl"), "0 entries data.pkl"),
    (zipped(GOOD, pickle="/x/data.pkl"), "0 entries data.pkl"),
    (ARCHIVE.replace(b"x/data.pkl", b"\xff/data.pkl"), "is not loaded"),
    (zipped(GOOD, STORAGE | {"x/byteorder": b"big"}), "big-endian"),
    (zipped(bytes(2**25 + 1)), "the limit is 16,777,216"),
    (patched(ARCHIVE, (ARCHIVE.index(GOOD) + 20, b"zz")), "checksum of its pickle"),
    (zipped(GOOD, {}), "is not loaded"),
    (zipped(GOOD, {"x/data/0": bytes(17)}), "gives a storage a size"),
    (zipped(saved(tensor(key="../../../../../../../../etc/passwd"))), "is not loaded"),
    (older(GOOD, magic=7), "not written by torch"),
    (older(GOOD, version=1002), "not written by torch"),
    (older(GOOD, facts={"little_endian": False}), "big-endian"),
    (older(GOOD, keys=[]), "list of storages does not match"),
    (older(GOOD, keys=["0", "0"]), "length than its pickle says"),
    (older(GOOD, keys=["../0"]), "list of storages does not match"),
    (older(GOOD, keys=[0]), "list of storages does not match"),
    (older(GOOD, length=5), "has another length"),
    (older(GOOD)[:-1], "ends within a storage"),
    (older(GOOD)[:-20], "has another length"),
    (older(GOOD)[:60], "is not loaded"),
]

# What does no harm is read where it can be: at most the good tensor is found.
MODULE = "torch.nn.modules.container.ParameterDict"
SCALAR = "numpy.core.multiarray.scalar"
HARMLESS = [
    *map(
        zipped,
        (
            program(name(MODULE), row(b"}"), b"\x81"),
            program(name(MODULE), b")\x81}b"),  # without parameters
            program(b"\x8a\xff" + bytes(255)),
            saved(storage()),
            program(name(f"{CALLBACK}.a.b.c.d")),
            program(call(DICT, b"](K\1K\2\x86e")),
            saved(call("torch._utils._rebuild_parameter", b"}", b"N", b"N")),
            saved(call("builtins.set", SHELL)),
            saved(call("_codecs.encode", CODE, text("rot13"))),
            saved(call("numpy.dtype", text("O8"))),
            saved(call(SCALAR, call("numpy.dtype", text("f8")), b"C\1x")),
            program(b"}]b"),
            program(b"}", text("x" * 1001), b"Ns"),
            program(b"NN"),
            b"\x80\x04\x95" + b"\xff" * 8 + b"N.",  # a frame beyond the end
            program(b"}q\0", text("x"), b"h\0s"),  # a dict that contains itself
            program(b"N" + b"\x85" * 10_000),  # tuples within one another
        ),
    ),
    b"PK\3\4" + ARCHIVE,
    ARCHIVE + b"x",
    patched(ARCHIVE, (-2, b"\4\0")) + b"evil",
    patched(ARCHIVE, (-14, b"\3\0\3\0")),  # more entries than there are
    older(GOOD) + b"x",
]


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
    for content in (ARCHIVE, older(GOOD)):
        Path("x.ckpt").write_bytes(content)
        assert read_pickle(Path("x.ckpt"))[0]["good"].tolist() == [0, 0, 0, 0]
    Path("x.ckpt").write_bytes(zipped(saved(tensor(key="../../x")), STORAGE | {"x/data/../../x": bytes(16)}))
    assert read_pickle(Path("x.ckpt"))[0]["x"].shape == (4,)  # a key is a key


@pytest.mark.parametrize("content", HARMLESS, ids=range(len(HARMLESS)))
def test_what_does_no_harm_is_read_or_left_out(content):
    Path("x.ckpt").write_bytes(content)
    try:
        tensors, texts = read_pickle(Path("x.ckpt"))
    except ValueError as error:
        assert str(error) == "x.ckpt holds no tensors with names"
    else:
        assert {name: value.tolist() for name, value in tensors.items()} == {"good": [0, 0, 0, 0]} and texts == {}
    assert list(map(str, Path().rglob("*"))) == ["x.ckpt"]


@pytest.mark.parametrize("content, reason", EXECUTED.values(), ids=EXECUTED)
def test_nothing_is_run_that_pythons_own_reader_runs(content, reason, canary):
    for file in (older(content), content + older(GOOD), content):
        refused(file)
    assert re.search(reason, refused(zipped(content)))
    reader = pickle.Unpickler(io.BytesIO(content))
    reader.persistent_load = lambda place: torch.storage.TypedStorage(4, dtype=torch.float32, _internal=True)
    with suppress(pickle.UnpicklingError):  # when the harm is done
        while not canary.exists():
            reader.load()
    assert canary.exists()


@pytest.mark.parametrize("content, reason", PROGRAMS, ids=[reason for _, reason in PROGRAMS])
def test_no_other_program_is_accepted(content, reason):
    message = refused(zipped(content))
    assert re.search(reason, message), message
    refused(older(content))


@pytest.mark.parametrize("instruction", NOT_WRITTEN.split())
def test_no_other_instruction_is_accepted(instruction):
    (code,) = (known for known in pickletools.opcodes if known.name == instruction)
    kind = code.arg.name if code.arg is not None else ""
    argument = b"''\n" if kind == "stringnl" else b"1\n1\n" if "nl" in kind else bytes(8)
    content = zipped(program(code.code.encode("latin1"), argument))
    assert f"uses the pickle instruction {instruction};" in refused(content)


@pytest.mark.parametrize("content, reason", FILES, ids=[reason for _, reason in FILES])
def test_no_other_file_is_accepted(content, reason):
    message = refused(content)
    assert re.search(reason, message), message


DOUBLED = b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(30))
COSTLY = {
    "what is doubled thirty times, as a key": b"})q\0" + DOUBLED + b"Ns",
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
    assert "the limit is 16,777,216" in refused(ARCHIVE + entry * count + end)
