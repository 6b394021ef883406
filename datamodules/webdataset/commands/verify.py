"""Read every sample of a data set, and say which are bad, by the causes that training counts."""

import json
import os
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from datamodules.webdataset.decode import MAX_PIXELS, EncodedImage
from datamodules.webdataset.formats import image_part
from datamodules.webdataset.manifest import Manifest
from datamodules.webdataset.parallel import run_jobs
from datamodules.webdataset.reader import Reader
from datamodules.webdataset.records import BadSample, Cause, RawSample
from datamodules.webdataset.storage import Storage
from datamodules.webdataset.urls import hide_secrets

BLOCK = 1 << 20
# Bad samples that a report names; all are counted.
MAX_NAMED = 100_000

# The URL of a shard and the key in it, what is wrong, and how.
Named = tuple[str, Cause, str]


@dataclass(frozen=True)
class Checks:
    """What a good sample has.

    Args:
        decode: An image that can be decoded whole. Otherwise its header suffices.
        parts: These extensions, beside an image.
        max_pixels: Images of more are bad.
        max_bytes: Samples of more are bad.
    """

    decode: bool = False
    parts: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS
    max_bytes: int = 64_000_000


@dataclass
class Findings:
    """What was found.

    Args:
        good: Number of good samples.
        causes: Number of bad ones. All samples count of a shard that is not as indexed or cannot be read.
        bad: The first of them.
    """

    good: int = 0
    causes: Counter[Cause] = field(default_factory=Counter)
    bad: list[Named] = field(default_factory=list)

    def add(self, name: str, cause: Cause, message: str, count: int = 1) -> None:
        """Count something bad."""
        self.causes[cause] += count
        if len(self.bad) < MAX_NAMED:
            self.bad.append((name, cause, message))

    def __iadd__(self, other: "Findings") -> "Findings":
        self.good += other.good
        self.causes += other.causes
        self.bad += other.bad[: MAX_NAMED - len(self.bad)]
        return self


def verify(manifest: Manifest, checks: Checks | None = None, *, num_workers: int = 0) -> Findings:
    """Read all samples of a data set.

    Found are members of the archives that the index could not take for samples, samples that changed since, that lack a
    part, whose text, label or JSON is none, whose image is none, and shards of another size or checksum than indexed.

    Args:
        manifest: Of the data set.
        checks: What a good sample has; None takes the defaults.
        num_workers: Processes that read a shard each; 0 reads in this one.
    """
    found = Findings()
    check = partial(_verify_shard, manifest, checks or Checks())
    for part in run_jobs(check, range(len(manifest.counts)), num_workers):
        found += part
    return found


def check_sample(sample: RawSample, checks: Checks) -> None:
    """Do nothing about a good sample.

    Raises:
        BadSample: What is wrong with it.
    """
    parts = sample.parts
    image = image_part(sample)
    if missing := [name for name in checks.parts if name not in parts]:
        raise BadSample("parts", f"has {', '.join(sorted(parts))}, and no {', '.join(missing)}")
    for name in ("txt", "cls", "json"):
        if name in parts:
            _check_text(name, parts[name])
    encoded = EncodedImage(image, max_pixels=checks.max_pixels)
    if checks.decode:
        encoded.decode()


def _check_text(name: str, content: memoryview) -> None:
    cause: Cause = "label" if name == "cls" else "text"
    try:
        text = str(content, "utf-8").strip()
        if name == "json":
            json.loads(text)
    # Brackets without end.
    except (ValueError, RecursionError) as error:
        raise BadSample(cause, f".{name}: {error}") from error
    if name == "txt" and not text:
        raise BadSample(cause, ".txt is empty")
    if name == "cls" and not text.isdecimal():
        raise BadSample(cause, f".cls is {text[:50]!r}, expected a number")


def _verify_shard(manifest: Manifest, checks: Checks, shard: int) -> Findings:
    found, storage, url = Findings(), Storage(), hide_secrets(manifest.url(shard))
    index = manifest.index(shard)
    for place, cause, message in index.rejects():
        found.add(f"{url}/{place}", cause, message)
    try:
        change = _change(manifest, shard, storage)
    # The clients of storage services share no class of errors.
    except Exception as error:
        found.add(url, "transport", hide_secrets(f"{type(error).__name__}: {error}"), count=len(index))
        return found
    if change is not None:
        found.add(url, "changed", change, count=len(index))
        return found
    reader = Reader([manifest], storage, max_sample_bytes=checks.max_bytes)
    for number in range(len(index)):
        try:
            check_sample(reader.read(0, shard, number), checks)
        except BadSample as error:
            found.add(f"{url}/{index.key(number)}", error.cause, str(error))
        else:
            found.good += 1
    return found


def _change(manifest: Manifest, shard: int, storage: Storage) -> str | None:
    """Say what is different about a shard since it was indexed."""
    size, checksum = manifest.num_bytes_of(shard), manifest.checksum(shard)
    with storage.open(manifest.url(shard)) as file:
        if (found := file.seek(0, os.SEEK_END)) != size:
            return f"{found} bytes, {size} when it was indexed"
        if checksum is None:
            return None
        file.seek(0)
        found = 0
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return None if found == checksum else f"crc32 {found:08x}, {checksum:08x} when it was indexed"
