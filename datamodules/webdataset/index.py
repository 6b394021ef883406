"""The samples of one shard: where each lies, how large it and its image are.

Shapes: n samples, m parts of all of them.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from datamodules.batch import Array
from datamodules.sources import IMAGE_SUFFIXES, UNREADABLE
from datamodules.webdataset.arrays import open_arrays, write_arrays
from datamodules.webdataset.records import BadSample, Cause, RawSample
from datamodules.webdataset.tar import BLOCK, Damage, Member, Window, split_name, walk_blocks

# The key of what is no sample, or its place in the shard; what is wrong with it; and how.
Reject = tuple[str, Cause, str]

# Bytes in which the headers of most images end, and of all that are not hostile.
HEADS = (1 << 12, 1 << 20)
# The formats of photographs; an image of another one has no size here.
FORMATS = ("JPEG", "PNG", "WEBP")


class ShardIndex:
    """What `write_index` found in a shard. It is mapped into memory, not read.

    Args:
        path: Of the index.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is broken or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, arrays = open_arrays(path)
        self._extensions: list[str] = self.header["extensions"]
        self._names, self._name_ends = arrays["names"], arrays["name_ends"]
        self._sizes, self._part_ends = arrays["sizes"], arrays["part_ends"]
        self._kinds, self._places = arrays["kinds"], arrays["places"]
        self._rejects = arrays["rejects"]

    def __len__(self) -> int:
        return len(self._part_ends)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def key(self, i: int) -> str:
        """Return the name of sample `i`, without extensions."""
        return self._names[slice(*_range(self._name_ends, i))].tobytes().decode()

    def span(self, i: int) -> tuple[int, int]:
        """Return the bytes of the shard, from the first to after the last, that hold sample `i` with its headers."""
        first, stop = _range(self._part_ends, i)
        start, (_, data, size) = self._places[first, 0], self._places[stop - 1]
        return int(start), int(data + size)

    def parts(self, i: int) -> dict[str, int]:
        """Return the bytes of each part of sample `i`, by extension."""
        first, stop = _range(self._part_ends, i)
        sizes = self._places[first:stop, 2].tolist()
        return {
            self._extensions[kind]: size for kind, size in zip(self._kinds[first:stop].tolist(), sizes, strict=True)
        }

    def size(self, i: int) -> tuple[int, int]:
        """Return height and width of the image of sample `i` in pixels, as its header says; 0 if that is not known."""
        height, width = self._sizes[i].tolist()
        return height, width

    def cut(self, i: int, block: bytes) -> RawSample:
        """Return sample `i` from the bytes of its span. The parts are views of them.

        Raises:
            BadSample: The names or sizes in the block are not those indexed.
        """
        first, stop = _range(self._part_ends, i)
        key, start = self.key(i), int(self._places[first, 0])
        view, parts = memoryview(block), {}
        members: dict[tuple[int, ...], bytes] | None = None
        for kind, place in zip(self._kinds[first:stop].tolist(), self._places[first:stop].tolist(), strict=True):
            extension, (header, data, size) = self._extensions[kind], place
            # The usual header says it at once; long names and upper case need the walk.
            if not _is_plain(block, header - start, data - start, f"{key}.{extension}", size):
                members = _members(block, start) if members is None else members
                if _split(members.get(tuple(place), b"")) != (key, extension):
                    raise BadSample(
                        "changed",
                        f"{key}.{extension} is not where it was indexed. The shard was changed; index it again.",
                    )
            parts[extension] = view[data - start : data - start + size]
        return RawSample(key, parts)

    def rejects(self) -> list[Reject]:
        """Return what is in the shard and is no sample: its key or place, the cause, and a message."""
        found: list[Reject] = [(name, cause, message) for name, cause, message in json.loads(self._rejects.tobytes())]
        return found


def write_index(file: BinaryIO, size: int, path: Path, header: Mapping[str, Any], *, checksum: bool = False) -> None:
    """Write the index of a shard.

    Args:
        file: The shard.
        size: Its bytes.
        path: Of the index.
        header: Stored in the index, beside `bytes` and `checksum`, the CRC-32 of the whole shard or None.
        checksum: Whether to read the whole shard for it.

    Raises:
        OSError: The shard cannot be read, or the index not be written.
    """
    window = Window(file, size, checksum=checksum)
    found = _Found()
    for sample in _samples(window, size, found.rejects):
        found.add(sample, window)
    stored = {**header, "bytes": size, "checksum": window.crc32() if checksum else None}
    write_arrays(path, {**stored, "extensions": list(found.extensions)}, found.arrays())


@dataclass
class _Sample:
    key: str
    start: int
    parts: dict[str, Member] = field(default_factory=dict)
    # What is wrong, if something is.
    reject: tuple[Cause, str] | None = None


@dataclass
class _Found:
    names: list[bytes] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    part_ends: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    extensions: dict[str, int] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)

    def add(self, sample: _Sample, window: Window) -> None:
        self.names.append(sample.key.encode())
        for extension, member in sample.parts.items():
            self.kinds.append(self.extensions.setdefault(extension, len(self.extensions)))
            self.places.append((member.start, member.data, member.size))
        self.part_ends.append(len(self.kinds))
        image = next((sample.parts[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in sample.parts), None)
        self.sizes.append((0, 0) if image is None else _image_size(window, image))

    def arrays(self) -> dict[str, Array]:
        ends = np.cumsum([len(name) for name in self.names], dtype=np.int64)
        return {
            "names": np.frombuffer(b"".join(self.names), np.uint8),
            "name_ends": ends.astype("<i8"),
            "sizes": np.array(self.sizes, "<i4").reshape(-1, 2),
            "part_ends": np.array(self.part_ends, "<i8"),
            "kinds": np.array(self.kinds, "<i4"),
            "places": np.array(self.places, "<i8").reshape(-1, 3),
            "rejects": np.frombuffer(json.dumps(self.rejects).encode(), np.uint8),
        }


def _samples(window: Window, size: int, rejects: list[Reject]) -> Iterator[_Sample]:
    """Yield the samples: members that follow each other and share a key, as in webdataset."""
    keys: set[str] = set()
    for sample in _groups(window, size, rejects):
        if sample.reject is None and sample.key in keys:
            sample.reject = "duplicate", "its key came before in this shard"
        # The key of a broken sample is taken too: which of two of them was meant cannot be told.
        keys.add(sample.key)
        if sample.reject is None:
            yield sample
        else:
            rejects.append((sample.key, *sample.reject))


def _groups(window: Window, size: int, rejects: list[Reject]) -> Iterator[_Sample]:
    current: _Sample | None = None
    damaged: Damage | None = None
    for item in walk_blocks(window.read, size):
        if isinstance(item, Damage):
            damaged = item
            rejects.append((f"bytes {item.start} to {item.stop}", "archive", item.message))
            continue
        name = _decode(item.name)
        if name is None or _is_hostile(name):
            shown = item.name.decode("utf-8", "backslashreplace")
            message = "its name is not UTF-8" if name is None else "its name is empty, absolute, or leaves its folder"
            rejects.append((shown, "name", message))
            continue
        if (split := split_name(name)) is None or _is_meta(name):
            continue
        key, extension = split
        if current is None or current.key != key:
            if current is not None:
                yield current
            current = _Sample(key, item.start)
        elif damaged is not None:
            current.reject = "archive", f"{damaged.message} between its parts"
        elif extension in current.parts:
            current.reject = "duplicate", f"it has more than one part .{extension}"
        damaged = None
        current.parts[extension] = item
    if current is not None:
        yield current


def _is_plain(block: bytes, header: int, data: int, name: str, size: int) -> bool:
    """Tell whether a header is a single block that has this name and this size."""
    encoded = name.encode()
    return (
        data == header + BLOCK
        and len(encoded) < 100
        and block.startswith(encoded + b"\0", header)
        # No prefix in front of the name, and the size as nearly every program writes it.
        and block[header + 345] == 0
        and block[header + 124 : header + 135] == b"%011o" % size
    )


def _members(block: bytes, start: int) -> dict[tuple[int, ...], bytes]:
    """Return the names of the members in bytes of a shard from `start` on, by their place."""
    walk = walk_blocks(lambda begin, end: block[begin:end], len(block))
    return {(item.start + start, item.data + start, item.size): item.name for item in walk if isinstance(item, Member)}


def _split(name: bytes) -> tuple[str, str] | None:
    text = _decode(name)
    return None if text is None else split_name(text)


def _decode(name: bytes) -> str | None:
    try:
        return name.decode()
    except UnicodeDecodeError:
        return None


def _is_hostile(name: str) -> bool:
    return not name or name.startswith("/") or "\0" in name or ".." in PurePosixPath(name).parts


def _is_meta(name: str) -> bool:
    # webdataset keeps such names for itself.
    return name.startswith("__") and name.partition("/")[0].endswith("__")


def _image_size(window: Window, image: Member) -> tuple[int, int]:
    for limit in HEADS:
        head = window.read(image.data, image.data + min(image.size, limit))
        # What a decoder will warn of again.
        with (
            suppress(*UNREADABLE),
            warnings.catch_warnings(action="ignore"),
            Image.open(BytesIO(head), formats=FORMATS) as opened,
        ):
            return opened.height, opened.width
        if image.size <= limit:
            break
    return 0, 0


def _range(ends: Array, i: int) -> tuple[int, int]:
    if not 0 <= i < len(ends):
        raise IndexError(f"ShardIndex: sample {i}, expected 0 to {len(ends) - 1}.")
    return (int(ends[i - 1]) if i else 0), int(ends[i])
