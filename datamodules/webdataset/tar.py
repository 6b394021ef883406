"""The members of a tar file, also of a damaged one: what follows a damaged header is found again.

Headers are those of v7, ustar, GNU and pax (IEEE Std 1003.1, pax, "ustar Interchange Format"; GNU tar manual, "Basic
Tar Format").
"""

import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
ZEROS = bytes(BLOCK)
# Longer names are not names. Also the limit of pax headers, which may hold more than the name.
MAX_NAME = 1 << 20
# Of a member: its own, and those for long names and links, and of pax. Were there no limit, the way through a row of
# them would be walked from each of them.
MAX_HEADERS = 16
# Bytes that are read at a time.
WINDOW = 1 << 18

_REGULAR = (b"0", b"\0", b"7")
# Links, devices, folders and pipes have no content, whatever their size says.
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")
_NAME_PARTS = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)

# Returns the bytes from one offset to another.
Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file.

    Args:
        name: As stored.
        start: Offset of its first header.
        data: Offset of its content.
        size: Bytes of its content.
    """

    name: bytes
    start: int
    data: int
    size: int


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that belong to no member.

    Args:
        start: Offset of the first one.
        stop: Offset after the last one.
        message: What is wrong.
    """

    start: int
    stop: int
    message: str


class Window:
    """A file that is read in large blocks.

    Args:
        file: Can be read and seeked.
        size: Its bytes.
        checksum: Whether to read all of it for its CRC-32.
    """

    def __init__(self, file: BinaryIO, size: int, *, checksum: bool = False) -> None:
        self._file, self._size, self._checksum = file, size, checksum
        self._start, self._content = 0, b""
        self._done = self._crc = 0

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop`, or less at the end of the file.

        Raises:
            OSError: The file ends before its size.
        """
        stop = min(stop, self._size)
        if start < self._start or stop > self._start + len(self._content):
            while self._checksum and self._done < start:
                self._load(self._done, min(start, self._done + WINDOW))
            self._load(start, min(self._size, max(stop, start + WINDOW)))
        return self._content[start - self._start : stop - self._start]

    def crc32(self) -> int:
        """Return the checksum of the whole file, after reading what was not read."""
        while self._done < self._size:
            self._load(self._done, min(self._size, self._done + WINDOW))
        return self._crc

    def _load(self, start: int, stop: int) -> None:
        self._file.seek(start)
        content = self._file.read(stop - start)
        if len(content) != stop - start:
            raise OSError(f"it ends at byte {start + len(content)}, expected {self._size} bytes")
        self._start, self._content = start, content
        if self._checksum and start <= self._done < stop:
            self._crc, self._done = zlib.crc32(content[self._done - start :], self._crc), stop


def walk(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Yield the members of a tar file of `size` bytes, and what is damaged, in their order.

    A header with a wrong checksum, or that leads past the end of the file, costs its own member: the walk goes on at
    the next valid header. Zeros between members are damage; at the end they may be missing.
    """
    return walk_blocks(Window(file, size).read, size)


def walk_blocks(read: Read, size: int) -> Iterator[Member | Damage]:
    """As `walk`, by a function that returns the bytes from one offset to another, or less at the end."""
    at = 0
    # Where damage began, and what it is; zeros that lead to the end are none.
    lost: tuple[int, str] | None = None
    while at < size:
        found = _member(read, at, size)
        if isinstance(found, str):
            lost = (at, found) if lost is None else (lost[0], lost[1] or found)
            at += BLOCK
            continue
        if lost is not None:
            yield Damage(lost[0], at, lost[1] or "zeros between members")
            lost = None
        member, at = found
        if member is not None:
            yield member
    if lost is not None and lost[1]:
        yield Damage(lost[0], size, lost[1])


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and extension by webdataset's rule, the extension in lower case, or None for what is in no sample.

    The key ends at the first dot after the last slash.
    """
    match = _NAME_PARTS.fullmatch(name)
    return None if match is None else (match.group(1), match.group(2).lower())


def _member(read: Read, start: int, size: int) -> tuple[Member | None, int] | str:
    """Return the member that begins at `start`, None for what is no regular file, and where the next one begins.

    Returns:
        What is wrong, if something is; empty if the block is zero.
    """
    at, name, real_size = start, None, None
    for _ in range(MAX_HEADERS):
        header = bytes(read(at, at + BLOCK))
        if at == start and header == ZEROS[: len(header)]:
            return ""
        if len(header) < BLOCK:
            return "a header is cut off"
        if not _has_checksum(header):
            return "a header has a wrong checksum"
        length, kind, data = _number(header[124:136]), header[156:157], at + BLOCK
        if length is None:
            return "a header has no size"
        if kind in (b"L", b"K", b"x", b"g"):
            if length > MAX_NAME or data + length > size:
                return f"a long name has {length} bytes"
            content = bytes(read(data, data + length))
            at = _after(data, length)
            if kind == b"L":
                name = content.split(b"\0")[0]
            elif kind == b"x":
                if (records := _pax(content)) is None:
                    return "a pax header is broken"
                name = records.get(b"path", name)
                if b"size" in records:
                    if not records[b"size"].isdigit() or len(records[b"size"]) > 20:
                        return "a pax header has no size"
                    real_size = int(records[b"size"])
            continue
        length = length if real_size is None else real_size
        if kind in _EMPTY:
            return None, data
        if data + length > size:
            return f"a member of {length} bytes is cut off: {size - data} are left"
        name = _name(header) if name is None else name
        regular = kind in _REGULAR and not (kind == b"\0" and name.endswith(b"/"))
        return (Member(name, start, data, length) if regular else None), _after(data, length)
    return "a member has too many headers"


def _after(data: int, length: int) -> int:
    return data + -(-length // BLOCK) * BLOCK


def _has_checksum(header: bytes) -> bool:
    stated = _number(header[148:156])
    if stated is None:
        return False
    others = header[:148] + header[156:]
    unsigned = sum(others) + 8 * 32
    # Some old programs added signed bytes.
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in others)


def _number(field: bytes) -> int | None:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    # Not int() alone, which takes signs and underscores.
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    # GNU headers have other things at the place of the prefix.
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax(content: bytes) -> dict[bytes, bytes] | None:
    """Return the records, each a length, a space, KEY=VALUE and a line feed, or None if they are none."""
    records, at = {}, 0
    while at < len(content):
        digits = content[at : at + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or len(record) != length or not record.endswith(b"\n"):
            return None
        records[key] = value
        at += length
    return records
