"""Where the entries of a zip archive lie in the file, so that they can be read in place.

Python's `zipfile` trusts what an archive says of itself until an entry is read, and reads it through a stream. Here the
list of entries is compared with the file before anything uses it. (PKWARE's APPNOTE, sections 4.3 to 4.5.)
"""

import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

_MAX_ENTRIES = 100_000
_MAX_DIRECTORY = 1 << 25  # bytes
_ENCRYPTED = 0x2041  # the bits of the flags: encrypted, strongly encrypted, with a masked directory
_FOLDER = 0x10  # the bit of the attributes
_WIDE = 0xFFFFFFFF  # "see the 64-bit field"

_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_WIDE_END = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class Entry:
    """Bytes of the file from `first` on; as they were when `stored`: no folder, neither compressed nor encrypted."""

    first: int
    size: int
    checksum: int  # CRC-32
    stored: bool


def read_entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The entries by name, of an archive that is a file of `size` bytes from its first byte to its last.

    Raises ValueError with the reason when the archive is cut off, has something before or behind it, names an entry
    twice, or has entries that overlap, lie outside the file or differ from what their own headers say.
    """
    count, first, length = _directory(file, size)
    data = _read(file, first, length)
    entries: dict[str, Entry] = {}
    spans, position = [], 0
    for _ in range(count):
        name, entry, start, position = _entry(file, data, position)
        if name in entries:
            raise ValueError("it has two entries of one name")
        entries[name] = entry
        spans.append((start, entry.first + entry.size))
    overlap = any(end > start for (_, end), (start, _) in pairwise(sorted(spans)))
    if position != length or overlap or any(end > first for _, end in spans):
        raise ValueError("its entries overlap")
    return entries


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """The number of entries, and where their list lies: it must end where the records of the archive's end begin."""
    end = size - _END.size
    signature, *disks, here, count, length, first, comment = _END.unpack(_read(file, end, _END.size))
    if signature != b"PK\5\6" or comment or any(disks):
        raise ValueError("it does not end as a zip archive does: it is cut off, or something was added")
    narrow = (here, count, length, first)
    locator = _LOCATOR.unpack(_read(file, end - _LOCATOR.size, _LOCATOR.size)) if end >= _LOCATOR.size else (b"",)
    if locator[0] == b"PK\6\7":
        end -= _LOCATOR.size + _WIDE_END.size
        record = _WIDE_END.unpack(_read(file, end, _WIDE_END.size))
        if record[0] != b"PK\6\6" or locator[1:] not in ((0, end, 0), (0, end, 1)) or any(record[4:6]):
            raise ValueError("its 64-bit end is not where it should be")
        here, count, length, first = record[6:]
        if any(n not in (w, _WIDE, 0xFFFF) for n, w in zip(narrow, record[6:], strict=True)):
            raise ValueError("its two ends differ")
    if here != count or count > _MAX_ENTRIES or length > _MAX_DIRECTORY or first + length != end:
        raise ValueError("its list of entries is not where it should be")
    return count, first, length


def _entry(file: BinaryIO, data: bytes, position: int) -> tuple[str, Entry, int, int]:
    """Name, entry, where its own header begins, and where the next entry stands in the list `data`."""
    if position + _ENTRY.size > len(data):
        raise ValueError("its list of entries is too short")
    head = _ENTRY.unpack_from(data, position)
    flags, method, checksum, name_size, extra_size, comment_size = head[3], head[4], head[7], *head[10:13]
    position += _ENTRY.size
    name, extra = data[position : position + name_size], data[position + name_size :][:extra_size]
    position += name_size + extra_size + comment_size
    size, packed, start = _widened((head[9], head[8], head[16]), extra)
    local = _LOCAL.unpack(_read(file, start, _LOCAL.size))
    if head[0] != b"PK\1\2" or local[0] != b"PK\3\4" or position > len(data):
        raise ValueError("its list of entries does not lead to entries")
    if local[3] != method or _read(file, start + _LOCAL.size, local[9]) != name:
        raise ValueError("an entry is not what the list says")
    stored = method == 0 and size == packed and not flags & _ENCRYPTED and not head[15] & _FOLDER
    entry = Entry(start + _LOCAL.size + local[9] + local[10], packed, checksum, stored)
    return name.decode("utf-8"), entry, start, position


def _widened(numbers: tuple[int, int, int], extra: bytes) -> list[int]:
    """(size, packed size, place), with the 64-bit field of `extra` in place of those that do not fit 32 bits."""
    wide = b""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = extra[4 : 4 + length]
        extra = extra[4 + length :]
    asked = numbers.count(_WIDE)
    if len(wide) < 8 * asked:
        raise ValueError("an entry lacks its 64-bit size")
    values = iter(struct.unpack_from(f"<{asked}Q", wide))
    return [next(values) if number == _WIDE else number for number in numbers]


def _read(file: BinaryIO, first: int, count: int) -> bytes:
    """`count` bytes at `first`. Raises ValueError when the file does not have them."""
    if not 0 <= first < 2**63 - count:
        raise ValueError("it refers to bytes outside the file")
    file.seek(first)
    data = file.read(count)
    if len(data) != count:
        raise ValueError("it refers to bytes outside the file")
    return data
