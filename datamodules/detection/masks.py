"""The masks of a data set's objects in flat arrays and blocks of bytes, in the form that the annotation file has."""

import math
from array import array
from typing import Any

import numpy as np

from datamodules.batch import Array, RunLengths
from datamodules.detection import rle

BAD_POLYGONS = "annotations whose polygons are not lists of finite numbers"


class MaskRows:
    """Masks of objects that are appended one by one: polygons as one array of coordinates, run lengths as bytes.

    Polygons become run lengths when an image is loaded. Doing it for all of COCO at once would take minutes.
    """

    def __init__(self) -> None:
        self._coordinates, self._polygon_ends = array("d"), array("q")
        self._object_ends = array("q", [0])  # in polygons
        self._counts, self._count_ends = bytearray(), array("q", [0])
        self._sizes = array("q")  # height, width of run lengths; 0, 0 for polygons

    def append(self, segmentation: object) -> str | None:
        """Add the mask of the next object, in any form that COCO files have; None or an empty list if it has none.

        Returns:
            None, or what is wrong with the mask, which then was not added.
        """
        if isinstance(segmentation, dict):
            return self._append_counts(segmentation)
        if not segmentation:
            self._end((0, 0))
            return None
        try:
            polygons = [array("d", polygon) for polygon in segmentation]  # type: ignore[attr-defined]  # is caught
        except TypeError:
            return BAD_POLYGONS
        if not math.isfinite(sum(map(sum, polygons))):
            return BAD_POLYGONS
        usable = [polygon for polygon in polygons if len(polygon) >= 6 and len(polygon) % 2 == 0]
        if not usable:
            return "annotations without a polygon of three points or more"
        for polygon in usable:
            self._coordinates.extend(polygon)
            self._polygon_ends.append(len(self._coordinates))
        self._end((0, 0))
        return None

    def _append_counts(self, segmentation: dict[str, Any]) -> str | None:
        try:
            height, width = segmentation["size"]
            self._counts += rle.from_counts(segmentation["counts"], height, width)["counts"]
        except (KeyError, TypeError, ValueError):
            return "annotations whose run lengths do not fit their own size"
        self._end((height, width))
        return None

    def _end(self, size: tuple[int, int]) -> None:
        self._object_ends.append(len(self._polygon_ends))
        self._count_ends.append(len(self._counts))
        self._sizes.extend(size)

    def absent(self) -> Array:
        """Say which objects have no mask, `(M,)` bool."""
        without: Array = (np.diff(self._object_ends) == 0) & (np.diff(self._count_ends) == 0)
        return without

    def sizes(self) -> Array:
        """Return height and width of the masks that are run lengths, 0 of the others, `(M, 2)` int64."""
        return np.array(self._sizes, dtype=np.int64).reshape(-1, 2)

    def read(self, row: int, size: tuple[int, int]) -> RunLengths:
        """Return the mask that was added as number `row`, for an image of this height and width."""
        first, last = self._object_ends[row], self._object_ends[row + 1]
        if first == last:
            counts = bytes(self._counts[self._count_ends[row] : self._count_ends[row + 1]])
            return RunLengths(size=list(size), counts=counts)
        starts = [self._polygon_ends[polygon - 1] if polygon else 0 for polygon in range(first, last)]
        ends = self._polygon_ends[first:last]
        return rle.from_polygons([self._coordinates[a:b] for a, b in zip(starts, ends, strict=True)], *size)
