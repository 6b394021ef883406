"""What a detection data set is to the rest of this package: images by index, and the objects on each of them.

Shapes: N objects of an image. Boxes are left, top, width, height in pixels of the original image, as COCO stores them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image

from datamodules.batch import Array, DetectionTruth, RunLengths


@dataclass(frozen=True)
class Categories:
    """The classes by label: position 0 is label 0."""

    names: tuple[str, ...]
    # What the annotation file calls each class; results are written with them.
    ids: tuple[int, ...]
    # LVIS: r, c or f for rare, common and frequent classes.
    frequency: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Objects:
    """The objects of one image."""

    boxes: Array  # (N, 4) float64
    labels: Array  # (N,) int64 in [0, num_classes)
    areas: Array  # (N,) float64, of the mask where the data has one
    crowd: Array  # (N,) bool: a group, or an object that counts neither way
    masks: list[RunLengths] | None = None  # N, of the original image's size
    # Federated annotation: labels known to be absent, labels of which objects may lack a box.
    negative: list[int] = field(default_factory=list)
    not_exhaustive: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, keep: Array) -> "Objects":
        """Return the objects of `keep`, `(N,)` bool or any number of indices."""
        chosen = np.arange(len(self))[keep]
        return Objects(
            self.boxes[chosen],
            self.labels[chosen],
            self.areas[chosen],
            self.crowd[chosen],
            None if self.masks is None else [self.masks[index] for index in chosen],
            self.negative,
            self.not_exhaustive,
        )

    def truth(self) -> DetectionTruth:
        """Return the same as one entry of a `DetectionEvalBatch`."""
        truth = DetectionTruth(
            boxes=self.boxes,
            labels=self.labels,
            areas=self.areas,
            crowd=self.crowd,
            negative=self.negative,
            not_exhaustive=self.not_exhaustive,
        )
        if self.masks is not None:
            truth["masks"] = self.masks
        return truth


@dataclass(frozen=True)
class LabelSets:
    """A set of labels for each image, in two flat arrays: those of image i are `labels[starts[i]:starts[i + 1]]`."""

    labels: np.ndarray[Any, np.dtype[np.int64]]  # sorted within an image, each once
    starts: np.ndarray[Any, np.dtype[np.int64]]  # (images + 1,), first 0

    @classmethod
    def from_pairs(cls, images: Array, labels: Array, num_images: int) -> "LabelSets":
        """Build from one (image, label) pair per object, `(M,)` integers each, in any order."""
        width = int(labels.max(initial=0)) + 1
        pairs = np.unique(images.astype(np.int64) * width + labels)
        starts = np.searchsorted(pairs, np.arange(num_images + 1) * width)
        return cls(pairs % width, starts.astype(np.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return self.labels[self.starts[index] : self.starts[index + 1]]


class DetectionSource(Protocol):
    """Annotated images by index, before any transform. Worker processes share it, so it is arrays and bytes inside.

    The source of a training split has left out what cannot be trained on; crowds are still in it, marked.
    """

    @property
    def categories(self) -> Categories:
        """The classes by label."""

    @property
    def has_masks(self) -> bool:
        """Whether `objects` have masks."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """Reason and number of the annotations and images that were left out because they are broken."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Return the RGB image, EXIF orientation applied. An error of `sources.UNREADABLE` marks it as corrupt."""

    def objects(self, index: int) -> Objects:
        """Return what is on the image."""

    def image_id(self, index: int) -> int | str:
        """Return what the annotation file calls the image; no two images of a source share it."""

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width of the original image without decoding it."""

    def name(self, index: int) -> str:
        """Return where the image came from, for messages and predictions."""

    def label_sets(self) -> LabelSets:
        """Return the labels of each image's objects, crowds left out, for samplers."""
