"""All shards of a data set: how many samples each has, and where its index is.

Beside the indices of the shards lie `manifest.json`, which is small whatever their number, and a table of them, which
is mapped into memory. A new table has a new name, so that replacing `manifest.json` replaces both at once.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np

from datamodules.batch import Array
from datamodules.webdataset.arrays import open_arrays, write_arrays, write_bytes
from datamodules.webdataset.index import ShardIndex, write_index
from datamodules.webdataset.parallel import run_jobs
from datamodules.webdataset.records import Cause
from datamodules.webdataset.storage import Storage
from datamodules.webdataset.urls import hide_secrets, is_local, local_path

MANIFEST, TABLE = "manifest.json", "shards-{}.table"
VERSION = 1
# Indices that a process keeps open, of all sources; each holds a file descriptor, of which there are often 1024.
MAX_OPEN = 256
# Shards whose URL is kept as text.
MAX_KEPT = 4096
# For which a table that has been replaced is kept.
KEPT_SECONDS = 3600.0
# Shards that an error names; it counts the others.
MAX_NAMED = 20

# Opens a shard for reading and seeking.
OpenFile = Callable[[str], BinaryIO]


class Manifest:
    """The shards of a data set. Opening costs the same for any number of them; pickles as its folder.

    Args:
        folder: Of the index.

    Raises:
        FileNotFoundError: It has no manifest.
        ValueError: The manifest is broken or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = _place(folder)
        path = self.folder / MANIFEST
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"Manifest: {folder} has no {MANIFEST}. Make it with `internimage shards index`."
            ) from error
        except ValueError as error:
            raise ValueError(f"Manifest: {path} is broken: {error}. Make it again.") from error
        if (version := stored.get("version")) != VERSION:
            raise ValueError(f"Manifest: {path} has version {version}, expected {VERSION}. Make it again.")
        self.name: str = stored["name"]
        self.num_samples: int = stored["num_samples"]
        self.num_bytes: int = stored["num_bytes"]
        self.digest: str = stored["digest"]
        self.rejects: dict[Cause, int] = stored["rejects"]
        _, self._table = open_arrays(self.folder / stored["table"])
        self.url = lru_cache(MAX_KEPT)(self._url)

    @classmethod
    def open(cls, folder: Path) -> "Manifest":
        """Return the manifest of an index folder."""
        return cls(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.folder, self.digest)

    @property
    def counts(self) -> Array:
        """Number of samples of each shard, `(S,)` int64."""
        return self._table["counts"]

    def _url(self, s: int) -> str:
        """Return where shard `s` is; a local path is absolute."""
        stored = self._stored(s)
        return os.path.normpath(self.folder / stored) if is_local(stored) else stored

    def num_bytes_of(self, s: int) -> int:
        """Return the size of shard `s`."""
        return int(self._table["bytes"][s])

    def checksum(self, s: int) -> int | None:
        """Return the CRC-32 of the whole of shard `s`, or None if the index was made without."""
        checksum = int(self._table["checksums"][s])
        return None if checksum < 0 else checksum

    def index(self, s: int) -> ShardIndex:
        """Return the index of shard `s`.

        Raises:
            ValueError: It was made again for another shard than the manifest is of.
        """
        return _open_index(self, s)

    def index_path(self, s: int) -> Path:
        """Return where the index of shard `s` is."""
        return self.folder / _index_name(self._stored(s))

    def _stored(self, s: int) -> str:
        ends = self._table["url_ends"]
        if not 0 <= s < len(ends):
            raise IndexError(f"Manifest: shard {s}, expected 0 to {len(ends) - 1}.")
        return self._table["urls"][ends[s - 1] if s else 0 : ends[s]].tobytes().decode()


@dataclass(frozen=True)
class ShardEntry:
    """A shard in a manifest.

    Args:
        url: As stored: a local path may be relative to the folder of the index.
        count: Samples.
        num_bytes: Size.
        checksum: CRC-32, or None.
        rejects: Number of what is in it and no sample, by cause.
    """

    url: str
    count: int
    num_bytes: int
    checksum: int | None
    rejects: Counter[Cause]


def make_manifest(
    urls: Sequence[str],
    folder: Path,
    *,
    name: str,
    num_workers: int = 0,
    checksums: bool = False,
    open_file: OpenFile | None = None,
) -> Manifest:
    """Index shards, and return the manifest of them.

    A shard whose index is there is not read again, unless its size, its time if it is local, or its checksum is
    missing or other. Local shards below the parent of `folder` are stored relative to it, so that all of it can move.

    Args:
        urls: Shards, in the order of the manifest.
        folder: Of the index; is made.
        name: Of the data set.
        num_workers: Processes that index a shard each; 0 works in this one.
        checksums: Of whole shards, which are read for it.
        open_file: Picklable where there are workers. None opens what `Storage` can open.

    Raises:
        ValueError: There are no shards, or one is listed twice.
        OSError: Shards could not be read. The indices of the others are kept.
    """
    folder = _place(folder)
    stored = [_relative(url, folder) for url in urls]
    if not stored or len(set(stored)) < len(stored):
        twice = [hide_secrets(url) for url, count in Counter(stored).items() if count > 1]
        raise ValueError(f"make_manifest: {f'{twice[0]} is listed twice' if twice else 'no shards are given'}.")
    folder.mkdir(parents=True, exist_ok=True)
    job = partial(_index_shard, folder=folder, checksums=checksums, open_file=open_file or Storage().open)
    entries: list[ShardEntry] = []
    failed: list[str] = []
    for found in run_jobs(job, stored, num_workers):
        if isinstance(found, ShardEntry):
            entries.append(found)
        else:
            failed.append(found)
    if failed:
        more = f"\n... and {len(failed) - MAX_NAMED} more" if len(failed) > MAX_NAMED else ""
        raise OSError(
            f"make_manifest: {len(failed)} of {len(stored)} shards could not be read; the others are indexed. Repair "
            "or leave out these, and run it again:\n" + "\n".join(failed[:MAX_NAMED]) + more
        )
    return write_manifest(folder, name, entries)


def write_manifest(folder: Path, name: str, entries: Sequence[ShardEntry]) -> Manifest:
    """Write the manifest of shards that have been indexed, and return it."""
    digest, rejects = hashlib.sha256(), Counter[Cause]()
    for entry in entries:
        # Not the folder, which may move, nor the query, which may be a signature that expires.
        path = urlsplit(entry.url).path if entry.url.startswith(("http://", "https://")) else entry.url
        digest.update(json.dumps([path.rpartition("/")[2], entry.count, entry.num_bytes]).encode())
        rejects += entry.rejects
    texts = [entry.url.encode() for entry in entries]
    arrays = {
        "counts": np.array([entry.count for entry in entries], "<i8"),
        "bytes": np.array([entry.num_bytes for entry in entries], "<i8"),
        "checksums": np.array([-1 if entry.checksum is None else entry.checksum for entry in entries], "<i8"),
        "url_ends": np.cumsum([len(text) for text in texts], dtype=np.int64).astype("<i8"),
        "urls": np.frombuffer(b"".join(texts), np.uint8),
    }
    content = hashlib.sha256(b"".join(array.tobytes() for array in arrays.values())).hexdigest()
    table = TABLE.format(content[:16])
    write_arrays(folder / table, {}, arrays)
    stored = {
        "version": VERSION,
        "name": name,
        "num_shards": len(entries),
        "num_samples": int(arrays["counts"].sum()),
        "num_bytes": int(arrays["bytes"].sum()),
        "digest": digest.hexdigest(),
        "rejects": rejects,
        "table": table,
    }
    write_bytes(folder / MANIFEST, json.dumps(stored, indent=1).encode())
    for old in folder.glob(TABLE.format("*")):
        with suppress(FileNotFoundError):
            # A younger one may be about to be opened, or to be named by another process that makes the same manifest.
            if old.name != table and time.time() - old.stat().st_mtime > KEPT_SECONDS:
                old.unlink()
    return Manifest(folder)


def _place(folder: Path) -> Path:
    # Absolute, since a process that is started later may have another working directory. The shards are beside the
    # index and not beside a link to it.
    folder = Path(folder)
    return folder.resolve() if folder.is_symlink() else folder.absolute()


def _reopen(folder: Path, digest: str) -> Manifest:
    manifest = Manifest(folder)
    if manifest.digest != digest:
        raise ValueError(f"Manifest: {folder} was made again for other shards while it was in use. Start again.")
    return manifest


@lru_cache(MAX_OPEN)
def _open_index(manifest: Manifest, s: int) -> ShardIndex:
    index = ShardIndex(manifest.index_path(s))
    found, expected = (len(index), index.header["bytes"]), (int(manifest.counts[s]), manifest.num_bytes_of(s))
    if found != expected:
        raise ValueError(
            f"Manifest: {index.path} is of {found[0]} samples in {found[1]} bytes, the manifest of {expected[0]} in "
            f"{expected[1]}. The shard was indexed again while it was in use: start again."
        )
    return index


def _index_shard(url: str, *, folder: Path, checksums: bool, open_file: OpenFile) -> ShardEntry | str:
    """Return the entry of a shard, or what went wrong."""
    path = folder / _index_name(url)
    place = os.path.normpath(folder / url) if is_local(url) else url
    try:
        with open_file(place) as file:
            size = file.seek(0, os.SEEK_END)
            modified = Path(place).stat().st_mtime_ns if is_local(url) else None
            index = _kept(path, size, modified, checksums)
            if index is None:
                header = {"url": url, "modified": modified}
                write_index(file, size, path, header, checksum=checksums)
                index = ShardIndex(path)
    # The clients of storage services share no class of errors.
    except Exception as error:
        return hide_secrets(f"{place}: {type(error).__name__}: {error}")
    rejects = Counter(cause for _, cause, _ in index.rejects())
    return ShardEntry(url, len(index), size, index.header["checksum"], rejects)


def _kept(path: Path, size: int, modified: int | None, checksums: bool) -> ShardIndex | None:
    """Return the index of a shard from before, or None if there is none or it is not that of this shard."""
    try:
        index = ShardIndex(path)
    except (OSError, ValueError):
        return None
    header = index.header
    same = (header["bytes"], header["modified"]) == (size, modified)
    return index if same and (header["checksum"] is not None or not checksums) else None


def _relative(url: str, folder: Path) -> str:
    if not is_local(url):
        return url
    path = os.path.normpath(Path(local_path(url)).absolute())
    return os.path.relpath(path, folder) if Path(path).is_relative_to(folder.parent) else path


def _index_name(url: str) -> str:
    # Shards of two folders may have one name.
    return f"{Path(url).name[:100]}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.idx"
