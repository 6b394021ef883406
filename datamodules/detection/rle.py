"""Masks as COCO's compressed run lengths: from every form that annotation files hold, and to bitmaps.

The rasterisation is COCO's (`maskApi.c`), through hotcoco, whose bytes are those of pycocotools.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hotcoco import mask as run_lengths

from datamodules.batch import Array, RunLengths


def from_polygons(polygons: Sequence[Sequence[float] | Array], height: int, width: int) -> RunLengths:
    """Return the union of polygons, each x1, y1, x2, y2, ... in pixels with three points or more."""
    assert all(len(polygon) >= 6 for polygon in polygons)  # four numbers first would be taken for boxes
    parts = run_lengths.frPyObjects([list(polygon) for polygon in polygons], height, width)
    return _named(parts[0] if len(parts) == 1 else run_lengths.merge(parts))


def from_counts(counts: Sequence[int] | str | bytes, height: int, width: int) -> RunLengths:
    """Return run lengths of either form (a list, or COCO's compressed string) in the compressed one.

    Raises:
        ValueError: The runs do not fill `height` x `width` pixels exactly, or are no run lengths.
    """
    runs = decompressed(counts) if isinstance(counts, str | bytes) else [int(count) for count in counts]
    found, negative = sum(runs), any(run < 0 for run in runs)
    if found != height * width or negative:
        problem = "a negative run" if negative else f"{found} pixels"
        raise ValueError(f"run lengths have {problem}, expected {height} x {width} = {height * width} pixels.")
    return _named(run_lengths.frPyObjects({"size": [height, width], "counts": runs}, height, width))


def decompressed(counts: str | bytes) -> list[int]:
    """Return the runs behind COCO's string: five bits a character, the lowest first, differences from the third on.

    Raises:
        ValueError: It ends within a number, or has a character that no such string has.
    """
    text = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    value, shift = 0, 0
    for byte in text:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError(f"run lengths have the character {chr(byte)!r}.")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("run lengths end within a number.")
    return runs


def encode(mask: Array) -> RunLengths:
    """Return the run lengths of a bitmap `(H, W)`, bool or uint8 with 0 outside."""
    return _named(run_lengths.encode(np.ascontiguousarray(mask != 0)))


def decode(mask: RunLengths) -> Array:
    """Return the bitmap `(H, W)` uint8, 1 inside.

    Raises:
        ValueError: The run lengths do not fit the mask's size.
    """
    bitmap: Array = np.ascontiguousarray(run_lengths.decode(dict(mask)))
    return bitmap


def area(mask: RunLengths) -> int:
    """Return the number of pixels inside."""
    return int(run_lengths.area(dict(mask)))


def bounding_box(bitmap: Array) -> tuple[int, int, int, int]:
    """Return left, top, width and height of what is inside a bitmap `(H, W)`, which is not empty."""
    rows, columns = (np.flatnonzero(bitmap.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1


def _named(mask: dict[str, Any]) -> RunLengths:
    return RunLengths(size=[int(side) for side in mask["size"]], counts=bytes(mask["counts"]))
