"""Annotated image files whose objects lie in flat arrays: what every reader of an annotation format returns.

Worker processes copy the memory pages of each Python object that they touch, and annotation files hold millions of
objects, so what lasts are arrays and blocks of bytes.

Shapes: I images, M objects of all images.
"""

import math
import warnings
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import numpy as np
from PIL import Image

from datamodules.batch import Array
from datamodules.detection.images import upright
from datamodules.detection.masks import MaskRows
from datamodules.detection.records import Categories, LabelSets, Objects
from datamodules.sources import FileSource

NO_BOX = "annotations without a box of four finite numbers"
UNFIT = "objects outside of their image, without area, or thinner than a pixel"


class ObjectRows:
    """Objects that are appended one by one, in any order of images."""

    def __init__(self) -> None:
        self._images, self._labels = array("q"), array("q")
        self._boxes, self._areas = array("d"), array("d")
        self._crowd = array("b")

    def append(
        self, image: int, label: int, box: Sequence[float], *, crowd: bool = False, area: float | None = None
    ) -> None:
        """Add an object.

        Args:
            image: Number of its image.
            label: Its label.
            box: Left, top, width, height, pixels.
            crowd: Whether it is a crowd.
            area: Pixels; None takes that of the box.
        """
        self._images.append(image)
        self._labels.append(label)
        self._boxes.extend(box)
        self._areas.append(box[2] * box[3] if area is None else area)
        self._crowd.append(crowd)

    def finish(self) -> "ObjectColumns":
        """Return all that was added, as arrays."""
        return ObjectColumns(
            images=np.array(self._images, dtype=np.int64),
            labels=np.array(self._labels, dtype=np.int64),
            boxes=np.array(self._boxes, dtype=np.float64).reshape(-1, 4),
            areas=np.array(self._areas, dtype=np.float64),
            crowd=np.array(self._crowd, dtype=bool),
        )


@dataclass(frozen=True)
class ObjectColumns:
    """The objects of all images."""

    images: Array  # (M,) int64, number of the image; -1 leaves the object out
    labels: Array  # (M,) int64
    boxes: Array  # (M, 4) float64, left, top, width, height
    areas: Array  # (M,) float64
    crowd: Array  # (M,) bool

    def of_images(self, kept: Array) -> "ObjectColumns":
        """Leave out the objects of other images and number those of `kept`, `(I,)` bool, among themselves."""
        numbers = np.where(kept, np.cumsum(kept) - 1, -1)
        return replace(self, images=np.where(self.images >= 0, numbers[self.images], -1))


class FlatSource:
    """A `DetectionSource` of image files.

    Args:
        origin: Where the annotations came from, for messages.
        files: I images.
        sizes: Height and width of each, `(I, 2)` integers.
        objects: Of all images. Those of an image keep their order.
        categories: The classes.
        training: Leave out the objects that `trainable` does not name. Otherwise every object stays as it is.
        masks: One per object, or None.
        image_ids: What the annotation file calls each image, `(I,)` integers or strings; None takes the names of the
            files without suffix.
        negative: Labels known to be absent from each image.
        not_exhaustive: Labels of which objects of an image may lack a box.
        skipped: What the reader left out; reported here as a warning.

    Raises:
        ValueError: Two images share an id.
    """

    def __init__(
        self,
        origin: str,
        files: FileSource,
        sizes: Array,
        objects: ObjectColumns,
        categories: Categories,
        *,
        training: bool,
        masks: MaskRows | None = None,
        image_ids: Array | None = None,
        negative: LabelSets | None = None,
        not_exhaustive: LabelSets | None = None,
        skipped: Mapping[str, int] | None = None,
    ) -> None:
        self.categories, self.skipped = categories, dict(skipped or {})
        self._files, self._objects, self._masks = files, objects, masks
        self._sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
        self._negative, self._not_exhaustive = negative, not_exhaustive
        self._image_ids = image_ids
        self._check_ids(origin)
        kept = objects.images >= 0
        if training:
            fit = trainable(objects.boxes, objects.areas, self._sizes[objects.images])
            if unfit := int((kept & ~fit).sum()):
                self.skipped[UNFIT] = unfit
            kept &= fit
        order = np.argsort(objects.images, kind="stable")
        # Row of each object, image by image; those of image i start at `starts[i]`.
        self._rows = order[kept[order]]
        self._starts = np.searchsorted(objects.images[self._rows], np.arange(len(files) + 1))
        report_skipped(origin, self.skipped)

    @property
    def has_masks(self) -> bool:
        """Whether `objects` have masks."""
        return self._masks is not None

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Image.Image:
        """Return the RGB image, EXIF orientation applied."""
        with Image.open(self.name(index)) as image:
            return upright(image, self.size(index))

    def objects(self, index: int) -> Objects:
        """Return what is on the image."""
        rows = self._rows[self._starts[index] : self._starts[index + 1]]
        columns, size = self._objects, self.size(index)
        return Objects(
            columns.boxes[rows],
            columns.labels[rows],
            columns.areas[rows],
            columns.crowd[rows],
            None if self._masks is None else [self._masks.read(row, size) for row in rows],
            [] if self._negative is None else self._negative[index].tolist(),
            [] if self._not_exhaustive is None else self._not_exhaustive[index].tolist(),
        )

    def image_id(self, index: int) -> int | str:
        """Return what the annotation file calls the image."""
        if self._image_ids is None:
            return Path(self.name(index)).stem
        found = self._image_ids[index]
        return int(found) if isinstance(found, np.integer) else str(found)

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width."""
        return int(self._sizes[index, 0]), int(self._sizes[index, 1])

    def name(self, index: int) -> str:
        """Return the image's path."""
        return self._files.name(index)

    def label_sets(self) -> LabelSets:
        """Return the labels of each image's objects, crowds left out."""
        rows = self._rows[~self._objects.crowd[self._rows]]
        return LabelSets.from_pairs(self._objects.images[rows], self._objects.labels[rows], len(self))

    def _check_ids(self, origin: str) -> None:
        ids = [self.image_id(index) for index in range(len(self))] if self._image_ids is None else self._image_ids
        unique, counts = np.unique(np.asarray(ids), return_counts=True)
        if len(unique) < len(self):
            twice = ", ".join(str(value) for value in unique[counts > 1][:3])
            raise ValueError(
                f"{origin}: only {len(unique)} of {len(self)} image ids are different; given twice: {twice}. Results "
                "are listed by image id."
            )


def report_skipped(origin: str, skipped: Mapping[str, int]) -> None:
    """Warn of what a source left out, if anything."""
    if skipped:
        counts = "; ".join(f"{reason}: {count}" for reason, count in skipped.items())
        warnings.warn(f"{origin}: left out {counts}.", stacklevel=4)


def is_box(value: object) -> TypeGuard[list[float]]:
    """Whether `value` is a list of four finite numbers."""
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, int | float) and math.isfinite(number) for number in value)
    )


def trainable(boxes: Array, areas: Array, sizes: Array) -> Array:
    """Say which objects can be learned from: `(M,)` bool. The rule is mmdet's.

    Args:
        boxes: `(M, 4)` left, top, width, height. They must overlap the image and be 1 pixel wide and high or more.
        areas: `(M,)`, more than 0.
        sizes: `(M, 2)` or `(1, 2)`, height and width of the object's image.
    """
    left, top, width, height = boxes.T
    overlap_x = np.minimum(left + width, sizes[:, 1]) - np.maximum(left, 0)
    overlap_y = np.minimum(top + height, sizes[:, 0]) - np.maximum(top, 0)
    kept: Array = (overlap_x > 0) & (overlap_y > 0) & (areas > 0) & (width >= 1) & (height >= 1)
    return kept
