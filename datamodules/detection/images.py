"""Files of annotated images: which exist, how large they are, and which way up they are read."""

import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image, ImageOps

from datamodules.batch import Array
from datamodules.sources import UNREADABLE, to_rgb

MISSING = "images whose file is missing"
BROKEN = "images that cannot be read"
# Reading a header is mostly waiting for the disk.
NUM_HEADER_THREADS = 16
# EXIF orientations that exchange height and width.
ORIENTATION, QUARTER_TURNS = 0x0112, (5, 6, 7, 8)


def upright(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Decode to RGB, turned as EXIF says, unless only the unturned image has the annotated height and width."""
    turned = ImageOps.exif_transpose(image)
    fits = [(found.height, found.width) == size for found in (turned, image)]
    return to_rgb(image if fits == [False, True] else turned)


def find_present(owner: str, annotations: Path, root: Path, names: Sequence[str], *, training: bool) -> Array:
    """Say which files exist: `(I,)` bool.

    Each folder is listed once, which is faster than a look at each file.

    Raises:
        FileNotFoundError: One is missing and this is evaluation, or all are.
        ValueError: There are no names.
    """
    if not names:
        raise ValueError(f"{owner}: {annotations} lists no images.")
    folders: dict[str, set[str]] = {}
    present = np.zeros(len(names), dtype=bool)
    for index, name in enumerate(names):
        folder, file = os.path.split(name)
        if folder not in folders:
            place = root / folder
            folders[folder] = {entry.name for entry in os.scandir(place)} if place.is_dir() else set()
        present[index] = file in folders[folder]
    missing = np.flatnonzero(~present)
    if len(missing) == 0:
        return present
    found = f"{owner}: {len(missing)} of {len(names)} images of {annotations} do not exist, the first is"
    first = root / names[missing[0]]
    if len(missing) == len(names):
        raise FileNotFoundError(f"{found} {first}. Check the folder of the images.")
    if not training:
        raise FileNotFoundError(
            f"{found} {first}. In evaluation each must be there, or its objects would count as missed. Restore them, "
            "or remove them from the annotations."
        )
    return present


def measure(
    owner: str, annotations: Path, root: Path, names: Sequence[str], *, training: bool
) -> tuple[Array, Counter[str]]:
    """Read the sizes of image files from their headers, for formats that do not say them.

    A million headers take minutes, so the sizes are kept beside the annotations, in `<annotations>.sizes.npz`, and read
    from there while the list of files is the same.

    Returns:
        Height and width of each, `(I, 2)` int64, 0 for files that cannot be used; and how many those are, by reason.

    Raises:
        FileNotFoundError: A file is missing and this is evaluation, or all are.
        ValueError: There are no names, or a file is no image and this is evaluation.
    """
    present = find_present(owner, annotations, root, names, training=training)
    chosen: Array = np.flatnonzero(present)
    sizes = np.zeros((len(names), 2), dtype=np.int64)
    sizes[chosen] = found = _read_sizes(annotations, root, [names[number] for number in chosen])
    broken: Array = chosen[~found.all(axis=1)]
    if len(broken) and not training:
        raise ValueError(
            f"{owner}: {len(broken)} images of {annotations} cannot be read, the first is "
            f"{root / names[broken[0]]}. In evaluation each must be, or its objects would count as missed. Repair "
            "them, or remove their annotations."
        )
    counts = {MISSING: len(names) - len(chosen), BROKEN: len(broken)}
    return sizes, Counter({reason: count for reason, count in counts.items() if count})


def write_whole(path: Path, **arrays: Array) -> None:
    """Write an npz file so that no other process ever sees half of it."""
    # Not the process's number, which another machine may have too.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stub takes them for `allow_pickle`
    temporary.replace(path)


def _read_sizes(annotations: Path, root: Path, names: Sequence[str]) -> Array:
    cache = annotations.with_name(annotations.name + ".sizes.npz")
    listed = hashlib.sha256("\n".join([str(root), *names]).encode()).hexdigest()
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(cache) as kept:
        if str(kept["listed"]) == listed:
            return np.array(kept["sizes"])
    with ThreadPoolExecutor(NUM_HEADER_THREADS) as pool:
        sizes = np.array(list(pool.map(_read_size, (root / name for name in names))), dtype=np.int64).reshape(-1, 2)
    # Not kept where a file could not be read, since it may be repaired, or where the folder cannot be written.
    if sizes.all():
        with suppress(OSError):
            write_whole(cache, listed=np.array(listed), sizes=sizes)
    return sizes


def _read_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION) in QUARTER_TURNS
            return (image.width, image.height) if turned else (image.height, image.width)
    except UNREADABLE:
        return 0, 0
