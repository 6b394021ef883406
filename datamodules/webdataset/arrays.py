"""Files of a few arrays and a header, mapped into memory: opening one costs the same whatever its size.

Layout: 8 bytes of magic, then version and length of the header as little-endian uint32, the header as JSON, and the
arrays, each at a multiple of 64 bytes.
"""

import json
import mmap
import os
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.batch import Array

MAGIC, VERSION = b"SHARDIDX", 1
ALIGNMENT = 64


def write_arrays(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write a file so that no other process, nor a crash, ever leaves half of it. All arrays are little-endian."""
    places, offset = {}, 0
    for name, array in arrays.items():
        places[name] = (array.dtype.str, array.shape, offset)
        offset += _padded(array.nbytes)
    text = json.dumps({**header, "arrays": places, "end": offset}).encode()
    head = MAGIC + struct.pack("<II", VERSION, len(text)) + text
    content = [head.ljust(_padded(len(head)), b"\0")]
    content += [array.tobytes().ljust(_padded(array.nbytes), b"\0") for array in arrays.values()]
    write_bytes(path, b"".join(content))


def open_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the header and the arrays, which cannot be written to.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is not such a file, is of another version, or is cut off.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(16)
        if len(start) < 16 or start[:8] != MAGIC:
            raise ValueError(f"{path} is not an index of shards. Delete it and make it again.")
        version, length = struct.unpack("<II", start[8:])
        if version != VERSION:
            raise ValueError(f"{path} has version {version}, expected {VERSION}. Delete it and make it again.")
        text, first = file.read(length), _padded(16 + length)
        try:
            header = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is broken: {error}. Delete it and make it again.") from error
        if size != first + header["end"]:
            raise ValueError(f"{path} has {size} bytes, expected {first + header['end']}. Delete it and make it again.")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {
        name: np.frombuffer(mapped, dtype, int(np.prod(shape)), first + offset).reshape(shape)
        for name, (dtype, shape, offset) in header["arrays"].items()
    }
    return header, arrays


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as a whole or not at all, also if the machine stops."""
    # Not the process's number, which another machine may have too.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
