"""Reading COCO's JSON without holding its annotations as Python objects: those of COCO itself take 3 GB."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.batch import Array
from datamodules.detection.flat import NO_BOX, ObjectColumns, ObjectRows, is_box
from datamodules.detection.masks import MaskRows
from datamodules.detection.records import Categories

DROPPED = -1


class AnnotationRows:
    """A hook for `json` that takes each annotation as soon as it is parsed, so that they never exist all at once."""

    def __init__(self, *, masks: bool, training: bool) -> None:
        self._with_masks, self._training = masks, training
        self._image_numbers: dict[int | str, int] = {}  # by id, in the order met
        self._objects = ObjectRows()
        self.masks = MaskRows()
        self.skipped: Counter[str] = Counter()

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        if "image_id" not in entry or "category_id" not in entry:
            return entry
        if problem := self._append(entry):
            self.skipped[problem] += 1
        return None

    def _append(self, entry: dict[str, Any]) -> str | None:
        if not is_box(box := entry.get("bbox")):
            return NO_BOX
        if self._with_masks and (problem := self.masks.append(entry.get("segmentation"))):
            return problem
        image = self._image_numbers.setdefault(entry["image_id"], len(self._image_numbers))
        crowd = bool(entry.get("iscrowd")) or (self._training and bool(entry.get("ignore")))
        self._objects.append(image, entry["category_id"], box, crowd=crowd, area=entry.get("area"))
        return None

    @property
    def has_masks(self) -> bool:
        """Whether any annotation has a mask."""
        return self._with_masks and not self.masks.absent().all()

    def finish(
        self,
        annotations: Path,
        ids: Array,
        present: Array,
        sizes: Array,
        known: list[dict[str, Any]],
        categories: Categories,
    ) -> ObjectColumns:
        """Return the annotations as objects of the images that are present, now that these and the classes are known.

        Args:
            annotations: The file, for messages.
            ids: Of all listed images.
            present: Which of them are used.
            sizes: Their heights and widths.
            known: The categories of the file.
            categories: Those that are used.
        """
        objects = self._objects.finish()
        labels = {number: label for label, number in enumerate(categories.ids)}
        found, places = np.unique(objects.labels, return_inverse=True)
        listed_ids = {category["id"] for category in known}
        if unknown := [str(number) for number in found if number not in listed_ids]:
            raise ValueError(
                f"CocoSource: {annotations}: annotations have category_id {', '.join(unknown[:5])}, which `categories` "
                "does not list."
            )
        label_of = np.array([labels.get(int(number), -1) for number in found], dtype=np.int64)[places]
        listed = {number: place for place, number in enumerate(ids.tolist())}
        place_of = np.array([listed.get(number, DROPPED) for number in self._image_numbers], dtype=np.int64)
        images = place_of[objects.images]
        if unlisted := int((images < 0).sum()):
            self.skipped["annotations of an image that is not listed"] = unlisted
        if self.has_masks:
            mask_sizes = self.masks.sizes()
            wrong = mask_sizes.any(axis=1) & (mask_sizes != sizes[images]).any(axis=1)
            self._drop(images, wrong, "annotations whose run lengths have another size than their image")
            self._drop(images, self.masks.absent(), "annotations without a mask, beside others with one")
        images[label_of < 0] = DROPPED
        return replace(objects, images=images, labels=label_of).of_images(present)

    def _drop(self, images: Array, wrong: Array, reason: str) -> None:
        wrong = wrong & (images >= 0)
        images[wrong] = DROPPED
        if wrong.any():
            self.skipped[reason] = int(wrong.sum())


def load(path: Path, rows: AnnotationRows) -> dict[str, Any]:
    """Read a COCO file; its annotations go to `rows`, the rest is returned.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, or an annotation lacks `image_id` or `category_id`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"CocoSource: {path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_hook=rows)
    except ValueError as error:
        raise ValueError(f"CocoSource: {path} is not JSON: {error}") from error
    except TypeError as error:  # from the hook
        raise ValueError(
            f"CocoSource: {path}: an annotation's `category_id` or `area` is no number: {error}"
        ) from error
    left = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(left, list):
        raise ValueError(f"CocoSource: {path} has no list `annotations`; expected COCO's format.")
    # The hook has put None where it took an annotation.
    for number, annotation in enumerate(left):
        if annotation is not None:
            raise ValueError(f"CocoSource: {path}: annotations[{number}] has no `image_id` or no `category_id`.")
    assert isinstance(content, dict)
    return content
