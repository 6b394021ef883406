"""CrowdHuman: one JSON object a line (odgt), boxes of whole persons."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.batch import Array
from datamodules.detection.data import DetectionData
from datamodules.detection.flat import NO_BOX, FlatSource, ObjectRows, is_box
from datamodules.detection.images import measure
from datamodules.detection.records import Categories
from datamodules.loading import Split
from datamodules.sources import FileSource

CATEGORIES = Categories(("person",), (1,))


class CrowdHumanSource(FlatSource):
    """A CrowdHuman annotation file: the full boxes of persons, hidden parts included.

    Boxes that are tagged `mask` (groups, statues, reflections) or marked `ignore` are crowds. Boxes may reach past the
    border of the image. The files say no image sizes, so those are read from the images, once (`images.measure`).

    Args:
        annotations: `annotation_train.odgt` or `annotation_val.odgt`.
        images: Holds `<ID>.jpg`.
        training: Leave out images that are missing and objects that cannot be learned from (`flat.trainable`).

    Raises:
        FileNotFoundError: The file is missing; all images are, or in evaluation one is.
        ValueError: A line is not an image's annotation; two images share an id; in evaluation, an image is broken.
    """

    def __init__(self, annotations: Path, images: Path, *, training: bool = False) -> None:
        names, rows, skipped = _read(annotations)
        sizes, unusable = measure("CrowdHumanSource", annotations, images, names, training=training)
        used: Array = sizes[:, 0] > 0
        super().__init__(
            f"CrowdHumanSource: {annotations}",
            FileSource(images, ((names[number], 0) for number in np.flatnonzero(used))),
            sizes[used],
            rows.finish().of_images(used),
            CATEGORIES,
            training=training,
            skipped=skipped + unusable,
        )


class CrowdHumanDetection(DetectionData):
    """CrowdHuman, one class, without masks.

    Args:
        train_annotations: `annotation_train.odgt`.
        val_annotations: `annotation_val.odgt`.
        train_images: Holds the training images, `<ID>.jpg`.
        val_images: Holds the validation images; may be the same folder.
        masks: The data has none.
        **options: Further arguments of `DetectionData`.
    """

    def __init__(
        self,
        train_annotations: Path,
        val_annotations: Path,
        train_images: Path,
        val_images: Path,
        masks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(1, masks=masks, **options)
        self.annotations: dict[Split, Path] = {"train": train_annotations, "val": val_annotations}
        self.images: dict[Split, Path] = {"train": train_images, "val": val_images}

    def find_categories(self) -> Categories:
        return CATEGORIES

    def open_split(self, split: Split) -> CrowdHumanSource:
        return CrowdHumanSource(self.annotations[split], self.images[split], training=split == "train")


def _read(annotations: Path) -> tuple[list[str], ObjectRows, Counter[str]]:
    if not annotations.is_file():
        raise FileNotFoundError(f"CrowdHumanSource: {annotations} does not exist.")
    names: list[str] = []
    rows = ObjectRows()
    skipped: Counter[str] = Counter()
    with annotations.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                names.append(f"{entry['ID']}.jpg")
                for person in entry["gtboxes"]:
                    crowd = person["tag"] != "person" or person.get("extra", {}).get("ignore", 0) == 1
                    if is_box(person["fbox"]):
                        rows.append(len(names) - 1, 0, person["fbox"], crowd=crowd)
                    else:
                        skipped[NO_BOX] += 1
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"CrowdHumanSource: {annotations}:{number}: {type(error).__name__} {error}; expected a JSON object "
                    "with `ID` and `gtboxes`, each with `tag` and `fbox`."
                ) from error
    return names, rows, skipped
