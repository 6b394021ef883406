"""The files of a shard cache: who may write them, and how they stay below a limit of bytes.

A shard is one file, `<hash of the URL>-<bytes>.tar`, and what is being downloaded ends in `.part`. The process that
downloads holds a lock on the part, which the kernel releases when it dies. Decisions about space are made under one
lock of the folder, and parts count with the size that they will have, so that the limit also holds while they grow. A
file may vanish under a reader: it is opened for each read, and stays readable once it is open.
"""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

_NAME = re.compile(r"[0-9a-f]{32}-(\d+)\.(tar|part)")


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard as a cache knows it.

    Args:
        url: Where it comes from.
        size: Bytes.
        checksum: CRC-32, or None.
    """

    url: str
    size: int
    checksum: int | None

    @property
    def name(self) -> str:
        """The file's name without suffix; another one for another version of the shard."""
        return f"{hashlib.sha256(f'{self.url} {self.checksum}'.encode()).hexdigest()[:32]}-{self.size}"


class CacheFolder:
    """Shards of all processes of a node.

    Args:
        path: On a local disk; made when it is first written to, and again when it was deleted.
        max_bytes: Of all shards and parts.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.max_bytes = path, max_bytes

    def open(self, shard: Shard) -> FileIO | None:
        """Return a complete shard and note its use, or None if it is not there.

        Raises:
            OSError: It cannot be opened.
        """
        path = self._path(shard, "tar")
        try:
            file = FileIO(path)
        except FileNotFoundError:
            return None
        found = os.fstat(file.fileno())
        if found.st_size != shard.size:
            # Something else has cut it; the next download takes its place.
            file.close()
            path.unlink(missing_ok=True)
            return None
        # The time of the last use decides what makes room; a clock that was put back has left times to come.
        if abs(time.time() - found.st_mtime) > 1:
            os.utime(file.fileno())
        return file

    def claim(self, shard: Shard) -> FileIO | None:
        """Return the part of a shard, locked and with space for it.

        What a killed process has left of it is still in it.

        Returns:
            None if the shard is there, or another process downloads it, or downloads take all the space.

        Raises:
            OSError: The folder cannot be used.
        """
        with self._locked():
            path = self._path(shard, "part")
            if self._path(shard, "tar").exists():
                return None
            part = FileIO(path, "a+")
            # Between the two its owner may have given it up.
            if not _lock(part) or not _is_at(part, path):
                part.close()
                return None
            if not self._make_room(path):
                self.drop(part, shard)
                return None
            return part

    def keep(self, part: FileIO, shard: Shard) -> None:
        """Make a complete part a shard; it stays open.

        Raises:
            OSError: The disk is full, or the folder was deleted meanwhile.
        """
        os.fsync(part.fileno())
        with self._locked():
            path = self._path(shard, "part")
            if not _is_at(part, path):
                raise FileNotFoundError(f"{path} was deleted during the download")
            path.rename(self._path(shard, "tar"))
        _unlock(part)

    def drop(self, part: FileIO, shard: Shard) -> None:
        """Remove a part and close it."""
        path = self._path(shard, "part")
        with suppress(OSError):
            if _is_at(part, path):
                path.unlink()
        _unlock(part)
        part.close()

    def _path(self, shard: Shard, suffix: str) -> Path:
        return self.path / f"{shard.name}.{suffix}"

    def _make_room(self, mine: Path) -> bool:
        """Remove leftovers, and shards used longest ago until the limit holds; False if downloads take the space."""
        shards: list[tuple[float, int, Path]] = []
        promised = 0
        for path in self.path.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            if match[2] == "part":
                promised += 0 if path != mine and _remove_leftover(path) else int(match[1])
                continue
            with suppress(FileNotFoundError):
                found = path.stat()
                shards.append((found.st_mtime, found.st_size, path))
        if promised > self.max_bytes:
            return False
        total = promised + sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return True

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        with FileIO(self.path / "lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                _unlock(file)


def _lock(file: FileIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unlock(file: FileIO) -> None:
    # Closing is not enough: a process forked meanwhile has inherited the file, and the lock with it.
    fcntl.flock(file, fcntl.LOCK_UN)


def _is_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_leftover(path: Path) -> bool:
    """Remove a part that nobody downloads; False if somebody does."""
    try:
        file = FileIO(path, "r+")
    except FileNotFoundError:
        return True
    with file:
        if not _lock(file):
            return False
        path.unlink(missing_ok=True)
        _unlock(file)
        return True
