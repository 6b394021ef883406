"""Bad samples on disk: one JSON line each, written by every rank, and passed over by a later run that is given them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from datamodules.webdataset.records import Cause

# (source, shard, sample), as numbers.
SampleId = tuple[int, int, int]

# Another run may find these well again.
_PASSING: tuple[Cause, ...] = ("transport", "changed")


@dataclass(frozen=True, slots=True)
class BadEntry:
    """One bad sample.

    Args:
        source: Name of the data source.
        digest: Of the source's manifest, for which the numbers hold.
        shard: Number of the shard in the source.
        sample: Number of the sample in the shard.
        name: URL of the shard and key of the sample.
        cause: What is wrong.
        message: The same in words.
    """

    source: str
    digest: str
    shard: int
    sample: int
    name: str
    cause: Cause
    message: str


class Ledger:
    """A folder of bad samples, a file for each rank: processes never write into the same one.

    Args:
        folder: Is made with the first bad sample.
        rank: Of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self._file = folder / f"rank_{rank:05}.jsonl"

    def append(self, entries: Iterable[BadEntry]) -> None:
        """Write entries, each whole or not at all as far as a reader can tell."""
        lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
        if lines:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._file.open("a+b") as file:
                # Not behind what a killed process left unfinished.
                file.seek(max(0, file.tell() - 1))
                file.write((lines if file.read() in (b"", b"\n") else "\n" + lines).encode())

    def read(self) -> list[BadEntry]:
        """Return the entries of all ranks; a line that a killed process left unfinished is passed over."""
        return list(self._entries())

    def known(self, names: Sequence[str], digests: Sequence[str]) -> Mapping[SampleId, Cause]:
        """Return what need not be read again: bad samples of these sources as they are now.

        What could not be reached, or did not fit the index, is not among them.

        Args:
            names: Of the sources.
            digests: Of their manifests.
        """
        numbers = {(name, digest): number for number, (name, digest) in enumerate(zip(names, digests, strict=True))}
        return {
            (numbers[entry.source, entry.digest], entry.shard, entry.sample): entry.cause
            for entry in self._entries()
            if (entry.source, entry.digest) in numbers and entry.cause not in _PASSING
        }

    def _entries(self) -> Iterator[BadEntry]:
        # Line by line: a sample is listed anew in each epoch, so that weeks make gigabytes.
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    try:
                        entry = BadEntry(**json.loads(line))
                    except (ValueError, TypeError):
                        continue
                    if entry.cause in get_args(Cause):
                        yield entry
