"""Bytes of shards, wherever they are, with retries, mirrors and a cache.

Local files are read in place. Others are kept whole in the cache, if there is one, and read by range until they are
there. Storage systems behind fsspec (s3, gs, hf) have timeouts of their own.
"""

import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from os import pread
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO, cast

from datamodules.webdataset.backends import LocalFiles, open_command, read_fsspec, stream_command, warn_of_command
from datamodules.webdataset.cache import Origin, ShardCache
from datamodules.webdataset.cache_folder import Shard
from datamodules.webdataset.http import HttpClient
from datamodules.webdataset.per_process import PerProcess
from datamodules.webdataset.retry import Retry, TransportError
from datamodules.webdataset.urls import hide_secrets, is_local, is_pipe, local_path

__all__ = ["Storage", "TransportError"]

# What is asked for at a time when a whole shard is read through fsspec.
FSSPEC_BLOCK = 16 << 20


class Storage:
    """Reads parts of shards. Picklable, and usable in forked and spawned processes.

    Args:
        cache: For whole shards; None reads them where they are.
        retries: Of a read that failed; a shard that is not there or has another size is not tried again.
        backoff: Before the first retry, seconds; doubled for each further one, up to a minute.
        timeout: Seconds in which an http server must answer, or send the next megabyte.
        mirrors: Pairs of the start of a URL and what takes its place when the URL cannot be read.
    """

    def __init__(
        self,
        cache: ShardCache | None = None,
        *,
        retries: int = 5,
        backoff: float = 0.5,
        timeout: float = 60.0,
        mirrors: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._cache, self._mirrors = cache, tuple(mirrors)
        self._retry = Retry(retries=retries, backoff=backoff)
        self._http = HttpClient(timeout)
        self._files = PerProcess(LocalFiles)
        self._counts = PerProcess(_Counts)

    def read(self, url: str, start: int, stop: int, *, size: int, checksum: int | None) -> bytes:
        """Return bytes `start` to `stop` of a shard.

        Args:
            url: Of the shard.
            start: First byte.
            stop: After the last byte.
            size: Bytes of the whole shard.
            checksum: CRC-32 of the whole shard, if known; what comes into the cache is compared with it.

        Raises:
            TransportError: It could not be read, or is not the shard that was indexed.
            ValueError: A command without a cache, or a shard that is larger than the cache.
        """
        assert 0 <= start < stop <= size, (url, start, stop, size)
        started = time.perf_counter()
        shard = Shard(url, size, checksum)
        try:
            if is_local(url) or (self._cache is None and not is_pipe(url)):
                return self._read_direct(shard, start, stop)
            return self._read_cached(shard, start, stop)
        finally:
            self._count("seconds", time.perf_counter() - started)

    def open(self, url: str) -> BinaryIO:
        """Return a whole shard as a file to read and seek in; a command's output goes to a temporary file.

        Raises:
            OSError: It cannot be opened.
        """
        if is_local(url):
            return Path(local_path(url)).open("rb")
        if is_pipe(url):
            with open_command(url) as output:
                file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
                copyfileobj(output, file)
            file.seek(0)
            return cast(BinaryIO, file)
        import fsspec

        return cast(BinaryIO, fsspec.open(url, "rb").open())

    def take_counts(self) -> dict[str, float]:
        """Return what this process has counted since the last call.

        `bytes` read where the shards are, downloads included; `hits` and `misses` of the cache; `retries`; `fallbacks`:
        reads past a cache that cannot be used; `seconds` spent in `read`.
        """
        return self._counts.get().take()

    def _read_cached(self, shard: Shard, start: int, stop: int) -> bytes:
        cache, command = self._cache, is_pipe(shard.url)
        if cache is None:
            raise ValueError(
                f"Storage: {hide_secrets(shard.url)} is a command. Its output comes from the start only, and "
                "samples are read in any order: give a cache, or store the shards as files."
            )
        if command:
            warn_of_command(shard.url)
        if (block := cache.read(shard, start, stop)) is not None:
            self._count("hits")
            return block
        self._count("misses")
        origin = Origin(
            places=self._places(shard.url),
            stream=lambda place, first: self._stream(place, first, shard.size),
            retry=self._retry,
            on_retry=self._on_retry,
        )
        if cache.fill == "background" and not command:
            cache.start_fetch(shard, origin)
        elif (file := cache.fetch(shard, origin)) is not None:
            with file:
                return pread(file.fileno(), stop - start, start)
        if (problem := cache.problem()) is not None:
            self._count("fallbacks")
        if command:
            raise TransportError(f"Storage: {hide_secrets(shard.url)}: {problem}. A command cannot be read without it.")
        return self._read_direct(shard, start, stop)

    def _read_direct(self, shard: Shard, start: int, stop: int) -> bytes:
        def attempt(place: str) -> bytes:
            return b"".join(self._range(place, start, stop, shard.size))

        what = f"bytes {start}-{stop - 1}"
        block = self._retry.over(self._places(shard.url), attempt, what, self._on_retry)
        self._count("bytes", len(block))
        return block

    def _stream(self, url: str, start: int, size: int) -> Iterator[bytes]:
        """Yield a shard from byte `start`."""
        for block in stream_command(url, start) if is_pipe(url) else self._range(url, start, size, size):
            self._count("bytes", len(block))
            yield block

    def _range(self, url: str, start: int, stop: int, size: int) -> Iterable[bytes]:
        if url.startswith(("http://", "https://")):
            return self._http.stream(url, start, stop, size)
        pieces = ((first, min(first + FSSPEC_BLOCK, stop)) for first in range(start, stop, FSSPEC_BLOCK))
        if is_local(url):
            return (self._files.get().read(local_path(url), *piece, size) for piece in pieces)
        return (read_fsspec(url, *piece) for piece in pieces)

    def _places(self, url: str) -> list[str]:
        mirrors = [other + url.removeprefix(prefix) for prefix, other in self._mirrors if url.startswith(prefix)]
        return [url, *mirrors]

    def _on_retry(self) -> None:
        self._count("retries")

    def _count(self, name: str, number: float = 1.0) -> None:
        self._counts.get().add(name, number)


class _Counts:
    """Sums by name, over the threads of a process."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def add(self, name: str, number: float) -> None:
        with self._lock:
            self._sums[name] += number

    def take(self) -> dict[str, float]:
        with self._lock:
            taken, self._sums = dict(self._sums), defaultdict(float)
        return taken
