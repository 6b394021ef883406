"""COCO's annotation format: one JSON file and a folder of images; boxes, and masks as polygons or run lengths.

LVIS and Objects365 use it too.
"""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from datamodules.detection.categories import choose_categories
from datamodules.detection.coco_json import AnnotationRows, load
from datamodules.detection.data import DetectionData
from datamodules.detection.flat import FlatSource
from datamodules.detection.images import MISSING, find_present
from datamodules.detection.records import Categories, LabelSets
from datamodules.loading import Split
from datamodules.sources import FileSource


class CocoSource(FlatSource):
    """A COCO annotation file.

    Left out and counted in `skipped`: annotations whose box is not four finite numbers, whose image is not listed, or
    whose mask has no polygon of three points or does not fit its image; in training, images whose file is missing.
    What is wrong with the file as a whole is an error. A missing `area` is that of the box, a missing `iscrowd` is 0.

    Args:
        annotations: The JSON file.
        images: Folder that the file names in it are relative to.
        class_names: Classes in the order of their labels; objects of others are not read. None takes all, by id.
        masks: Whether to read masks; a file without any will do.
        training: Leave out images whose file is missing and objects that cannot be learned from (`flat.trainable`), and
            take objects marked `ignore` for crowds. Otherwise every object counts as pycocotools would count it.
        path_parts: Keep only so many last parts of each file name; None keeps all.

    Raises:
        FileNotFoundError: The JSON file is missing; all images are, or in evaluation one is.
        ValueError: It is not COCO's format; a class is unknown; an annotation has no category; two images share an id.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        class_names: Sequence[str] | None = None,
        *,
        masks: bool = True,
        training: bool = False,
        path_parts: int | None = None,
    ) -> None:
        rows = AnnotationRows(masks=masks, training=training)
        content = load(annotations, rows)
        try:
            entries = content["images"]
            names = [_file_name(image, path_parts) for image in entries]
            sizes = np.array([(image["height"], image["width"]) for image in entries], dtype=np.int64).reshape(-1, 2)
            ids = np.array([image["id"] for image in entries])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"CocoSource: {annotations}: {type(error).__name__} {error}; expected `images` with `id`, `file_name`, "
                "`height` and `width`."
            ) from error
        categories = read_categories(annotations, content, class_names)
        present = find_present("CocoSource", annotations, images, names, training=training)
        chosen = np.flatnonzero(present)
        objects = rows.finish(annotations, ids, present, sizes, content["categories"], categories)
        if len(chosen) < len(names):
            rows.skipped[MISSING] = len(names) - len(chosen)
        entries = [entries[number] for number in chosen]
        super().__init__(
            f"CocoSource: {annotations}",
            FileSource(images, ((names[number], 0) for number in chosen)),
            sizes[chosen],
            objects,
            categories,
            training=training,
            masks=rows.masks if rows.has_masks else None,
            image_ids=ids[chosen],
            negative=_listed_labels(entries, "neg_category_ids", categories),
            not_exhaustive=_listed_labels(entries, "not_exhaustive_category_ids", categories),
            skipped=rows.skipped,
        )


class CocoDetection(DetectionData):
    """COCO-format data: COCO itself (the default), or your own with any classes.

    Args:
        train_annotations: JSON file of the training images.
        train_images: Folder that its file names are relative to.
        val_annotations: JSON file of the validation images.
        val_images: Folder that its file names are relative to.
        num_classes: Number of classes; checked when the data is opened.
        class_names: Classes in the order of their labels. The default is the order of the files' category ids.
        **options: Further arguments of `DetectionData`.

    Raises:
        ValueError: `class_names` are not `num_classes`.
    """

    # How many last parts of the file names are kept.
    path_parts: int | None = None

    def __init__(
        self,
        train_annotations: Path,
        train_images: Path,
        val_annotations: Path,
        val_images: Path,
        num_classes: int = 80,
        class_names: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, **options)
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"{type(self).__name__}: class_names has {len(class_names)} names, num_classes={num_classes}."
            )
        self.annotations: dict[Split, Path] = {"train": train_annotations, "val": val_annotations}
        self.images: dict[Split, Path] = {"train": train_images, "val": val_images}
        self.chosen_names = class_names

    def find_categories(self) -> Categories | None:
        path = self.annotations["val"]
        if not path.is_file():
            return None
        return read_categories(path, load(path, AnnotationRows(masks=False, training=False)), self.chosen_names)

    def open_split(self, split: Split) -> CocoSource:
        return CocoSource(
            self.annotations[split],
            self.images[split],
            self.chosen_names,
            masks=self.masks,
            training=split == "train",
            path_parts=self.path_parts,
        )


def read_categories(annotations: Path, content: dict[str, Any], class_names: Sequence[str] | None) -> Categories:
    """Return the classes of a COCO file by label, all of them by id or `class_names`.

    Raises:
        ValueError: A name is unknown or stands for two categories, or a category lacks its id or name.
    """
    try:
        known = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"CocoSource: {annotations}: {type(error).__name__} {error}; expected `categories` with `id` and `name`."
        ) from error
    frequency = {int(category["id"]): category.get("frequency") for category in content["categories"]}
    return choose_categories(f"CocoSource: {annotations}", known, class_names, frequency)


def _file_name(image: dict[str, Any], path_parts: int | None) -> str:
    # LVIS has only the address, which ends in folder and file.
    name = image["file_name"] if "file_name" in image else "/".join(image["coco_url"].split("/")[-2:])
    return name if path_parts is None else "/".join(PurePosixPath(name).parts[-path_parts:])


def _listed_labels(entries: list[dict[str, Any]], key: str, categories: Categories) -> LabelSets | None:
    """Return the labels of the category ids that each image lists under `key`, if any image has such a list."""
    if not any(key in entry for entry in entries):
        return None
    labels = {number: label for label, number in enumerate(categories.ids)}
    pairs = [
        (place, labels[number])
        for place, entry in enumerate(entries)
        for number in entry.get(key, ())
        if number in labels
    ]
    columns = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return LabelSets.from_pairs(columns[:, 0], columns[:, 1], len(entries))
