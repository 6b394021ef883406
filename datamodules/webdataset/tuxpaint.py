"""A small real image-caption set: the stamps of Tux Paint, as Debian packages them.

About 800 pictures, most of them cut-out photographs, each with an English caption and in one of 16 categories.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from datamodules.webdataset.commands.write import write_shard

STAMPS = Path("/usr/share/tuxpaint/stamps")
CLASSES = "classes.json"


def write_tuxpaint(
    folder: Path, *, stamps: Path = STAMPS, val_fraction: float = 0.2, samples_per_shard: int = 100
) -> tuple[int, int]:
    """Write `<folder>/train/*.tar`, `<folder>/val/*.tar` and `<folder>/classes.json`, the names of the categories.

    A sample is `<key>.jpg`, the stamp on white; `<key>.txt`, its caption; and `<key>.cls`, the category: the number of
    the stamp's top folder. Shards that are there already are written anew.

    Args:
        folder: Is made.
        stamps: Holds `<category>/**/<name>.png` and `<name>.txt` with the caption in the first line.
        val_fraction: Share of the stamps that is held out. Which ones depends on their names alone.
        samples_per_shard: At most.

    Returns:
        Number of training samples and of held-out ones.

    Raises:
        FileNotFoundError: There are no stamps.
        ValueError: `val_fraction` outside (0, 1), or `samples_per_shard` below 1.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"write_tuxpaint: val_fraction={val_fraction}, expected a share between 0 and 1.")
    if samples_per_shard < 1:
        raise ValueError(f"write_tuxpaint: samples_per_shard={samples_per_shard}, expected at least 1.")
    found = find_stamps(stamps)
    classes = sorted({name.partition("/")[0] for name in found})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CLASSES).write_text(json.dumps(classes, indent=1), encoding="utf-8")
    val = {name for name in found if is_held_out(name, val_fraction)}
    splits = {"train": [name for name in found if name not in val], "val": [name for name in found if name in val]}
    for split, names in splits.items():
        (folder / split).mkdir(exist_ok=True)
        for number, first in enumerate(range(0, len(names), samples_per_shard)):
            chosen = names[first : first + samples_per_shard]
            write_shard(folder / split / f"{number:05}.tar", _samples(stamps, chosen, found, classes))
    return len(splits["train"]), len(splits["val"])


def find_stamps(stamps: Path) -> dict[str, str]:
    """Return the captions of all stamps that have a picture, by their path without suffix, in an order by hash.

    The order mixes the categories over the shards.

    Raises:
        FileNotFoundError: There are none.
    """
    found = {}
    for path in stamps.rglob("*.png"):
        text = path.with_suffix(".txt")
        caption = text.read_text(encoding="utf-8").partition("\n")[0].strip() if text.is_file() else ""
        if caption:
            found[path.relative_to(stamps).with_suffix("").as_posix()] = caption
    if not found:
        raise FileNotFoundError(
            f"write_tuxpaint: {stamps} has no stamps with captions. Install them: apt-get install "
            "tuxpaint-stamps-default (Debian, Ubuntu), or name the folder of a copy."
        )
    return {name: found[name] for name in sorted(found, key=_hash)}


def is_held_out(name: str, fraction: float) -> bool:
    """Tell whether a stamp is held out: its hash, as a number in [0, 1), is below `fraction`."""
    return int.from_bytes(_hash(name)[:8], "big") / 2**64 < fraction


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _samples(
    stamps: Path, names: Sequence[str], captions: Mapping[str, str], classes: Sequence[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for name in names:
        category = classes.index(name.partition("/")[0])
        with Image.open(stamps / f"{name}.png") as stamp:
            stored = _on_white(stamp)
        # A dot in a name would end the key.
        key = name.replace(".", "-")
        yield key, {"jpg": stored, "txt": captions[name].encode(), "cls": str(category).encode()}


def _on_white(stamp: Image.Image) -> bytes:
    with_alpha = stamp.convert("RGBA")
    white = Image.new("RGBA", stamp.size, "white")
    stored = io.BytesIO()
    # The pictures are small and have sharp edges, which half the resolution of colours would smear.
    Image.alpha_composite(white, with_alpha).convert("RGB").save(stored, "jpeg", quality=95, subsampling="4:4:4")
    return stored.getvalue()
