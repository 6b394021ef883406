"""One shard, written as a whole or not at all, the same bytes for the same samples."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import webdataset

UNFINISHED = ".unfinished"


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """Write samples, each a key and its parts by extension, and return how many they were.

    webdataset's TarWriter writes them. Its ShardWriter is of no use here: it knows no shard that is there already, and
    writes under the final name from the start.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    count = 0
    with unfinished.open("wb") as file:
        # A fixed time, so that the same samples give the same bytes.
        with webdataset.TarWriter(file, encoder=False, mtime=0) as writer:
            for key, parts in samples:
                writer.write({"__key__": key, **parts})
                count += 1
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return count
