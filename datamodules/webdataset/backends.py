"""Where shards are, beside http: local files, all that fsspec knows, and the output of commands."""

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from io import FileIO
from typing import BinaryIO, cast

from datamodules.webdataset.retry import PermanentError

# Local files that a process keeps open; opening a file of a parallel file system costs a round trip or two.
MAX_OPEN = 128
# What does not pass: the file is not there, or not for us.
MISSING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class LocalFiles:
    """Local files that stay open. Reads name their place, so that forked processes may share them."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        # The thread that fills a cache reads local mirrors.
        self._lock = threading.Lock()

    def read(self, path: str, start: int, stop: int, size: int) -> bytes:
        """Return bytes `start` to `stop` of a file of `size` bytes.

        Raises:
            PermanentError: It is not there, or has another size.
            OSError: The file system failed.
        """
        with self._lock:
            file = self._files.pop(path, None)
            try:
                file = file or FileIO(path)
            except MISSING as error:
                raise PermanentError(str(error)) from error
            # A file that fails here is not kept, so that the next attempt opens it anew.
            if (found := os.fstat(file.fileno()).st_size) != size:
                raise PermanentError(f"it has {found} bytes, the index says {size}; the shard was changed")
            block = os.pread(file.fileno(), stop - start, start)
            _check(block, start, stop)
            self._files[path] = file
            if len(self._files) > MAX_OPEN:
                self._files.popitem(last=False)[1].close()
            return block


def read_fsspec(url: str, start: int, stop: int) -> bytes:
    """Return bytes `start` to `stop` of anything that fsspec can read.

    Raises:
        PermanentError: It is not there.
        OSError: It could not be read.
    """
    from fsspec.core import url_to_fs

    # fsspec keeps one file system for each process and thread, so that none is taken over by a fork.
    system, path = url_to_fs(url)
    try:
        block: bytes = system.cat_file(path, start=start, end=stop)
    except MISSING as error:
        raise PermanentError(f"{type(error).__name__}: {error}") from error
    # The clients of storage services share no class of errors.
    except Exception as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error
    _check(block, start, stop)
    return block


def open_command(url: str) -> BinaryIO:
    """Start a `pipe:` command; reading raises `OSError` when it fails."""
    from webdataset.gopen import gopen

    return cast(BinaryIO, gopen(url, "rb"))


def stream_command(url: str, start: int) -> Iterator[bytes]:
    """Yield the output of a `pipe:` command from byte `start`, in blocks.

    Raises:
        OSError: The command failed.
    """
    with open_command(url) as output:
        while block := output.read(1 << 20):
            if len(block) > start:
                yield block[start:]
            start = max(0, start - len(block))


def warn_of_command(url: str) -> None:
    """Say, once in a process, what shards that are commands cannot do."""
    # The text leaves out the URL, since Python shows the same warning once.
    warnings.warn(
        "Storage: shards are the output of commands (pipe:). Each runs to its end into the cache before a sample of "
        "its shard is read, starts from the beginning when it fails, and is waited for however long it hangs; a "
        "resumed run runs those of its window again. Shards at http(s) or storage URLs do without all that.",
        stacklevel=2,
    )


def _check(block: bytes, start: int, stop: int) -> None:
    if len(block) != stop - start:
        raise ConnectionError(f"{len(block)} of {stop - start} bytes came")
