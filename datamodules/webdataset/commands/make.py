"""Shards from image files: in parallel, resumable, the same bytes whatever was killed in between."""

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from datamodules.sources import IMAGE_SUFFIXES, UNREADABLE, to_rgb
from datamodules.webdataset.arrays import write_bytes
from datamodules.webdataset.commands.entries import Entries, Entry
from datamodules.webdataset.commands.write import write_shard
from datamodules.webdataset.parallel import run_jobs

MAKING = "making.json"
SKIPPED = "skipped"
BLOCK = 512  # of a tar file
LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides the bytes of the shards, besides the images.

    Args:
        samples_per_shard: At most. Ten thousand photographs of 30 kB take 300 MB.
        max_bytes: Of a shard, counted by the files that go into it; a sample that is larger has a shard of its own.
            None: no limit.
        max_side: Images with a longer side, in pixels, are shrunk to it and stored as JPEG; None copies all unchanged.
        quality: Of those JPEGs, 1 to 100.
        decode: Decode each image, and skip it if that fails. Otherwise only its header is read.

    Raises:
        ValueError: A number out of range.
    """

    samples_per_shard: int = 10_000
    max_bytes: int | None = None
    max_side: int | None = None
    quality: int = 95
    decode: bool = True

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "max_bytes", "max_side"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"shards make: {name}={value}, expected at least 1.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"shards make: quality={self.quality}, expected 1 to 100.")


@dataclass(frozen=True)
class Made:
    """What a folder holds after `make`.

    Args:
        shards: How many.
        samples: In them.
        skipped: Entries whose image could not be read.
        kept: Shards that were there already.
    """

    shards: int
    samples: int
    skipped: int
    kept: int


@dataclass(frozen=True)
class Shard:
    """A shard to be: where, the number of its first entry, its entries, and how they are stored."""

    path: Path
    first: int
    entries: Sequence[Entry]
    layout: Layout


def make(entries: Entries, folder: Path, layout: Layout | None = None, *, num_workers: int = 0) -> Made:
    """Write `<folder>/00000.tar` and so on, with the keys `000000000` and so on: the number of the entry.

    A shard appears when it is whole. Run again after a kill, those that are there stay. Images that cannot be read are
    skipped, and listed in `<folder>/skipped/<shard>.tsv` with the reason.

    Args:
        entries: What to write.
        folder: Is made. Holds no shards, or some of the same entries and layout.
        layout: Of the shards; None takes the defaults.
        num_workers: Processes that write a shard each; 0 writes in this one.

    Raises:
        ValueError: There are no entries, or no image could be read.
        FileExistsError: `folder` holds shards of other entries or of another layout.
    """
    layout = layout or Layout()
    total = _claim(entries, folder, layout)
    for name, content in entries.notes().items():
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    kept = len(list(folder.glob("*.tar")))
    for path, count in run_jobs(_write, _missing(entries, folder, layout), num_workers):
        LOG.info("%s: %d samples", path, count)
    shards = len(list(folder.glob("*.tar")))
    skipped = sum(path.read_bytes().count(b"\n") for path in (folder / SKIPPED).iterdir())
    if skipped == total:
        raise ValueError(
            f"shards make: none of {total} images could be read; {folder / SKIPPED} says why. Check where their paths "
            "begin, and remove the folder."
        )
    return Made(shards, total - skipped, skipped, kept)


def _claim(entries: Entries, folder: Path, layout: Layout) -> int:
    """Return the number of entries, if the folder is new or was begun with the same ones."""
    digest, total = hashlib.sha256(), 0
    for entry in entries:
        digest.update(json.dumps([entry.image, dict(entry.parts)]).encode())
        total += 1
    if not total:
        raise ValueError("shards make: there are no images to make shards of.")
    recipe = {**asdict(layout), "entries": total, "digest": digest.hexdigest()}
    begun = folder / MAKING
    if begun.is_file() or any(folder.glob("*.tar")):
        found = json.loads(begun.read_text(encoding="utf-8")) if begun.is_file() else {}
        changed = [f"{name} was {found.get(name)}, is {new}" for name, new in recipe.items() if found.get(name) != new]
        if changed:
            raise FileExistsError(
                f"shards make: {folder} holds shards made otherwise ({'; '.join(changed)}). Choose another folder, or "
                "remove this one."
            )
    (folder / SKIPPED).mkdir(parents=True, exist_ok=True)
    write_bytes(begun, json.dumps(recipe, indent=1).encode())
    return total


def _missing(entries: Entries, folder: Path, layout: Layout) -> Iterator[Shard]:
    """Yield the shards that are not there yet."""
    for number, (first, chosen) in enumerate(_split(entries, layout)):
        path = folder / f"{number:05}.tar"
        if not path.is_file():
            yield Shard(path, first, chosen, layout)


def _split(entries: Entries, layout: Layout) -> Iterator[tuple[int, list[Entry]]]:
    """Yield the entries of each shard and the number of the first."""
    first, size, chosen = 0, 0, list[Entry]()
    for entry in entries:
        more = 0 if layout.max_bytes is None else _room(entry)
        full = layout.max_bytes is not None and size + more > layout.max_bytes
        if chosen and (full or len(chosen) == layout.samples_per_shard):
            yield first, chosen
            first, size, chosen = first + len(chosen), 0, []
        chosen.append(entry)
        size += more
    yield first, chosen


def _room(entry: Entry) -> int:
    """Return the bytes of an entry in a tar file: a header and whole blocks for each part."""
    try:
        sizes = [Path(entry.image).stat().st_size]
    except OSError:
        return 0
    sizes += [len(text.encode()) for text in entry.parts.values()]
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes)


def _write(shard: Shard) -> tuple[Path, int]:
    return shard.path, write_shard(shard.path, _samples(shard))


def _samples(shard: Shard) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and parts of each sample, and list the skipped ones."""
    skipped: list[str] = []
    for number, entry in enumerate(shard.entries, start=shard.first):
        try:
            extension, image = _read(Path(entry.image), shard.layout)
        except UNREADABLE as error:
            # The text of this one holds an address, and the list is to be the same again.
            text = "no image" if isinstance(error, UnidentifiedImageError) else str(error)
            reason = " ".join(f"{type(error).__name__}: {text}".split())
            skipped.append(f"{entry.image}\t{reason}\n")
            continue
        yield f"{number:09}", {extension: image, **{name: text.encode() for name, text in entry.parts.items()}}
    # Before the shard has its name: one that is there is never looked into again.
    listing = shard.path.parent / SKIPPED / f"{shard.path.stem}.tsv"
    if skipped:
        listing.write_text("".join(skipped), encoding="utf-8", errors="surrogateescape")
    else:
        listing.unlink(missing_ok=True)


def _read(path: Path, layout: Layout) -> tuple[str, bytes]:
    """Return the extension and the bytes that are stored for an image."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        if layout.max_side is None or max(image.size) <= layout.max_side:
            suffix = path.suffix.lower()
            if suffix not in IMAGE_SUFFIXES and (suffix := f".{image.format}".lower()) not in IMAGE_SUFFIXES:
                raise ValueError(f"{image.format}, expected one of {' '.join(IMAGE_SUFFIXES)}")
            if layout.decode:
                image.load()
            return suffix[1:], content
        small = to_rgb(image)
    small.thumbnail((layout.max_side, layout.max_side), Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    small.save(stored, "jpeg", quality=layout.quality)
    return "jpg", stored.getvalue()
