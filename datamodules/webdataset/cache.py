"""Whole shards on a local disk, downloaded once for all processes of a node."""

import os
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

from datamodules.webdataset.cache_folder import CacheFolder, Shard
from datamodules.webdataset.per_process import PerProcess
from datamodules.webdataset.retry import PermanentError, Retry, TransportError
from datamodules.webdataset.urls import hide_secrets

Fill = Literal["background", "first"]

# Downloads of a process that run beside its reads.
MAX_FETCHES = 2
# Seconds between looks at a shard that another process downloads, or at a folder that is full of downloads: a lock
# could be waited for, space could not.
POLL = 0.1
# Seconds before the same is tried again: behind another process's download, and after a failure.
PATIENCE, PAUSE = 1.0, 60.0


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a shard can be downloaded.

    Args:
        places: URLs, the first one first.
        stream: Yields the content of a place from a byte on.
        retry: At each place.
        on_retry: Called before each retry.
    """

    places: Sequence[str]
    stream: Callable[[str, int], Iterable[bytes]]
    retry: Retry
    on_retry: Callable[[], None]


class CacheError(Exception):
    """A part cannot be written: the disk is full or broken."""


class ShardCache:
    """A folder of shards. Picklable; each process makes its own over the same folder.

    A folder that cannot be used (full disk, no permission) costs a warning and is left alone for a minute at a time,
    in which callers read elsewhere.

    Args:
        folder: On a local disk; is made. Files of other names in it are left alone and not counted.
        max_bytes: Limit of all its shards, also while they are downloaded. Those used longest ago make room.
        fill: "background" lets the first reads of a shard go past the cache while a thread downloads it, "first" lets
            them wait for the download.

    Raises:
        ValueError: `max_bytes` is below 1, or `fill` is none of the two.
    """

    def __init__(self, folder: Path, max_bytes: int, *, fill: Fill = "background") -> None:
        if max_bytes < 1:
            raise ValueError(f"ShardCache: max_bytes={max_bytes}, expected at least 1.")
        if fill not in ("background", "first"):
            raise ValueError(f"ShardCache: fill={fill!r}, expected 'background' or 'first'.")
        self.max_bytes, self.fill = max_bytes, fill
        self._folder = CacheFolder(Path(folder), max_bytes)
        self._state = PerProcess(_State)

    def read(self, shard: Shard, start: int, stop: int) -> bytes | None:
        """Return bytes `start` to `stop` of a shard, or None if it is not there.

        Raises:
            ValueError: The shard is larger than the limit.
        """
        if shard.size > self.max_bytes:
            raise ValueError(
                f"ShardCache: {hide_secrets(shard.url)} has {shard.size} bytes, more than max_bytes={self.max_bytes}. "
                "Raise the limit: all shards that are read at a time should fit."
            )
        try:
            file = self._folder.open(shard)
            if file is None:
                return None
            with file:
                return os.pread(file.fileno(), stop - start, start)
        except OSError as error:
            self._give_up(error)
            return None

    def fetch(self, shard: Shard, origin: Origin, *, wait: bool = True) -> FileIO | None:
        """Return a shard as an open file, downloaded if it is not there.

        Args:
            shard: To have.
            origin: Where it is.
            wait: For another process that downloads it, or for the space that downloads take; else return None.

        Returns:
            None too if the folder cannot be used.

        Raises:
            TransportError: It could not be downloaded.
        """
        try:
            while self.problem() is None:
                if (file := self._folder.open(shard)) is not None:
                    return file
                if (part := self._folder.claim(shard)) is not None:
                    return self._download(part, shard, origin)
                if not wait:
                    return None
                time.sleep(POLL)
        except TransportError:
            raise
        except (CacheError, OSError) as error:
            self._give_up(error)
        return None

    def start_fetch(self, shard: Shard, origin: Origin) -> None:
        """Download a shard in a thread, unless that is under way or was tried a moment ago."""
        state = self._state.get()
        with state.lock:
            if (
                self.problem() is not None
                or len(state.running) >= MAX_FETCHES
                or shard.name in state.running
                or time.monotonic() < state.not_before.get(shard.name, 0.0)
            ):
                return
            state.running.add(shard.name)

        def run() -> None:
            pause = PATIENCE
            try:
                if (file := self.fetch(shard, origin, wait=False)) is not None:
                    file.close()
            except TransportError as error:
                pause = PAUSE
                warnings.warn(f"ShardCache: {error} Its samples are read one by one.", stacklevel=1)
            finally:
                with state.lock:
                    state.running.discard(shard.name)
                    state.not_before[shard.name] = time.monotonic() + pause

        threading.Thread(target=run, name=f"fetch {shard.name}", daemon=True).start()

    def problem(self) -> str | None:
        """Return why the folder is left alone now, or None if it is not."""
        state = self._state.get()
        return state.problem if time.monotonic() < state.paused_until else None

    def _download(self, part: FileIO, shard: Shard, origin: Origin) -> FileIO:
        def attempt(place: str) -> None:
            _fill(part, shard, lambda start: origin.stream(place, start))

        try:
            if shard.checksum is None:
                # What a killed process has left is only trusted where it can be checked.
                part.truncate(0)
            origin.retry.over(origin.places, attempt, f"all {shard.size} bytes", origin.on_retry)
            self._folder.keep(part, shard)
        except BaseException:
            self._folder.drop(part, shard)
            raise
        return part

    def _give_up(self, error: Exception) -> None:
        state = self._state.get()
        first = not state.problem
        state.problem = f"the cache {self._folder.path} cannot be used: {type(error).__name__}: {error}"
        state.paused_until = time.monotonic() + PAUSE
        if first:
            warnings.warn(f"ShardCache: {state.problem}. Shards are read where they are.", stacklevel=2)


class _State:
    """Of one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: set[str] = set()
        self.not_before: dict[str, float] = {}
        self.paused_until = 0.0
        self.problem = ""


def _fill(part: FileIO, shard: Shard, stream: Callable[[int], Iterable[bytes]]) -> None:
    """Bring a part from what it has to the whole shard, and check it.

    Raises:
        CacheError: It cannot be written.
        OSError: Too little came, or other bytes than were indexed.
        PermanentError: Too much came.
    """
    done = part.seek(0, os.SEEK_END)
    if done < shard.size:
        for block in stream(done):
            done += len(block)
            if done > shard.size:
                raise PermanentError(f"it has more than the {shard.size} bytes of the index; the shard was changed")
            _write(part, block)
    if done < shard.size:
        raise ConnectionError(f"{done} of {shard.size} bytes came")
    if shard.checksum is not None and (found := _crc32(part)) != shard.checksum:
        part.truncate(0)
        raise ConnectionError(f"its CRC-32 is {found:08x}, the index says {shard.checksum:08x}")


def _write(part: FileIO, block: bytes) -> None:
    # Unbuffered: what a buffer held at a fork would be written by both processes.
    view = memoryview(block)
    try:
        while view:
            view = view[os.write(part.fileno(), view) :]
    except OSError as error:
        raise CacheError(f"{type(error).__name__}: {error}") from error


def _crc32(part: FileIO) -> int:
    part.seek(0)
    checksum = 0
    while block := part.read(1 << 20):
        checksum = zlib.crc32(block, checksum)
    return checksum
