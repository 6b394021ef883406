"""Small tar shards of coloured squares with texts and labels, and parts to break them with."""

import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210), "yellow": (220, 210, 40)}
NAMES = list(COLOURS)


def square(number: int, *, size: tuple[int, int] = (40, 48), quality: int = 90) -> bytes:
    """Return a JPEG of height and width `size` in the colour of `number`, with noise of its own."""
    noise = np.random.default_rng(number).integers(-25, 26, (*size, 3))
    pixels = np.array(COLOURS[NAMES[number % len(NAMES)]]) + noise
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=quality)
    return file.getvalue()


def sample(number: int) -> dict[str, bytes]:
    """Return the parts of a sample by extension."""
    name = NAMES[number % len(NAMES)]
    return {
        "jpg": square(number),
        "txt": f"a {name} square, number {number}".encode(),
        "cls": str(number % len(NAMES)).encode(),
    }


def write_tar(path: Path, members: Iterator[tuple[str, bytes]]) -> None:
    """Write files into a tar, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_pairs(
    folder: Path,
    *,
    num_shards: int,
    per_shard: int,
    first: int = 0,
    changed: Mapping[int, Mapping[str, bytes | None]] | None = None,
) -> list[str]:
    """Write shards of samples that are numbered on, and return their keys.

    `changed` gives parts of some samples other contents; None leaves the part out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = []
    for shard in range(num_shards):
        numbers = range(first + shard * per_shard, first + (shard + 1) * per_shard)
        members = []
        for number in numbers:
            parts = {**sample(number), **(changed or {}).get(number, {})}
            members += [(f"{number:06}.{part}", data) for part, data in parts.items() if data is not None]
            keys.append(f"{number:06}")
        write_tar(folder / f"{shard:05}.tar", iter(members))
    return keys
