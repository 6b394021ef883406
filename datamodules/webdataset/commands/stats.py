"""What is in a data set: counts, parts, and how image sides and captions are distributed, from its index alone."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datamodules.webdataset.manifest import Manifest
from datamodules.webdataset.parallel import run_jobs

# Lower ends of the classes that are counted; a size that is not known is 0.
SIDES = (0, 1, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096)
LENGTHS = (0, 1, 16, 32, 64, 128, 256, 512, 1024)
WIDTH = 40  # of a bar, characters


@dataclass
class Statistics:
    """Counts over all samples.

    Args:
        shards: How many.
        samples: In them.
        num_bytes: Of the shards.
        parts: Number of samples that have each extension.
        part_bytes: Bytes of each extension in all.
        sides: Number of images by the lower end of the class of their shorter side, pixels; 0 where the header tells no
            size.
        captions: Number of `txt` parts by the lower end of the class of their length, bytes.
        rejects: What in the archives is no sample, by cause.
    """

    shards: int = 0
    samples: int = 0
    num_bytes: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    part_bytes: Counter[str] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    captions: Counter[int] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)

    def __iadd__(self, other: "Statistics") -> "Statistics":
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


def count(manifest: Manifest, *, num_workers: int = 0) -> Statistics:
    """Return the statistics of a data set.

    Args:
        manifest: Of it.
        num_workers: Processes that count a shard each; 0 counts in this one.
    """
    total = Statistics()
    for part in run_jobs(partial(_count_shard, manifest), range(len(manifest.counts)), num_workers):
        total += part
    return total


def as_dict(statistics: Statistics) -> dict[str, Any]:
    """Return the statistics as JSON has them; classes are named by their lower ends."""
    return {name: _sorted(value) if isinstance(value, Counter) else value for name, value in vars(statistics).items()}


def as_text(statistics: Statistics) -> str:
    """Return the statistics for reading."""
    samples = max(statistics.samples, 1)
    rows = [
        f"shards   {statistics.shards:,}",
        f"samples  {statistics.samples:,}, {statistics.samples / max(statistics.shards, 1):,.0f} a shard",
        f"bytes    {statistics.num_bytes:,}, {statistics.num_bytes / samples:,.0f} a sample",
        *(
            f"  .{name}: {number:,} samples, {statistics.part_bytes[name] / number:,.0f} bytes each"
            for name, number in sorted(statistics.parts.items())
        ),
        "shorter side, pixels",
        *_bars(statistics.sides, SIDES),
    ]
    if statistics.captions:
        rows += ["caption, bytes", *_bars(statistics.captions, LENGTHS)]
    if statistics.rejects:
        rows += ["no samples", *(f"  {cause}: {number:,}" for cause, number in sorted(statistics.rejects.items()))]
    return "\n".join(rows)


def _count_shard(manifest: Manifest, shard: int) -> Statistics:
    index = manifest.index(shard)
    found = Statistics(1, len(index), int(manifest.num_bytes_of(shard)))
    for number in range(len(index)):
        parts = index.parts(number)
        found.parts.update(parts.keys())
        found.part_bytes.update(parts)
        found.sides[_lower_end(min(index.size(number)), SIDES)] += 1
        if "txt" in parts:
            found.captions[_lower_end(parts["txt"], LENGTHS)] += 1
    found.rejects.update(cause for _, cause, _ in index.rejects())
    return found


def _lower_end(value: int, ends: Sequence[int]) -> int:
    return max(end for end in ends if end <= value)


def _bars(counts: Mapping[int, int], ends: Sequence[int]) -> list[str]:
    total = sum(counts.values())
    rows = []
    for end, after in zip(ends, (*ends[1:], None), strict=True):
        if number := counts.get(end, 0):
            title = f"{end} and more" if after is None else str(end) if after == end + 1 else f"{end} to {after - 1}"
            rows.append(f"  {title:>13} {number:>14,} {'#' * round(WIDTH * number / total)}")
    return rows


def _sorted(counts: Mapping[Any, int]) -> dict[str, int]:
    return {str(key): counts[key] for key in sorted(counts)}
