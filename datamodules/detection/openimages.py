"""Open Images: boxes, classes and image labels in CSV files."""

import csv
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.batch import Array
from datamodules.detection.categories import number_categories
from datamodules.detection.data import DetectionData
from datamodules.detection.flat import NO_BOX, FlatSource, ObjectRows
from datamodules.detection.images import measure
from datamodules.detection.records import Categories, LabelSets
from datamodules.loading import Split
from datamodules.sources import FileSource

CORNERS = ("XMin", "YMin", "XMax", "YMax")


class OpenImagesSource(FlatSource):
    """The boxes of Open Images (V4 to V7).

    Boxes around groups (`IsGroupOf`) are crowds. With image labels, an image that has some but no box is listed too,
    and classes that people found to be absent are `negative`. Labels are those of the box file: a box of a class is not
    one of its parent classes too. The files say no image sizes, so those are read from the images, once
    (`images.measure`).

    Args:
        boxes: CSV with `ImageID`, `LabelName`, `XMin`, `XMax`, `YMin`, `YMax` (of the image's width or height) and
            `IsGroupOf`.
        images: Holds `<ImageID>.jpg`.
        classes: `class-descriptions-boxable.csv`: code and name of each class, in the order of their labels.
        image_labels: CSV with `ImageID`, `LabelName` and `Confidence` (0 or 1), of verified labels.
        training: Leave out images that are missing and objects that cannot be learned from (`flat.trainable`).

    Raises:
        FileNotFoundError: A CSV file is missing; all images are, or in evaluation one is.
        ValueError: A CSV file lacks a column; a box has an unknown class; in evaluation, an image is broken.
    """

    def __init__(
        self, boxes: Path, images: Path, classes: Path, image_labels: Path | None = None, *, training: bool = False
    ) -> None:
        codes = read_classes(classes)
        labels = {code: label for label, code in enumerate(codes)}
        numbers: dict[str, int] = {}
        rows, skipped = _read_boxes(boxes, labels, numbers)
        negative = [] if image_labels is None else list(_read_negative(image_labels, labels, numbers))
        names = [f"{name}.jpg" for name in numbers]
        sizes, unusable = measure("OpenImagesSource", boxes, images, names, training=training)
        used: Array = sizes[:, 0] > 0
        objects = rows.finish()
        # From shares of the image to pixels.
        boxes_px = objects.boxes * np.tile(sizes[:, ::-1], 2)[objects.images]
        areas = boxes_px[:, 2] * boxes_px[:, 3]
        pairs = np.array(negative, dtype=np.int64).reshape(-1, 2)
        pairs = pairs[used[pairs[:, 0]]]
        super().__init__(
            f"OpenImagesSource: {boxes}",
            FileSource(images, ((names[number], 0) for number in np.flatnonzero(used))),
            sizes[used],
            replace(objects, boxes=boxes_px, areas=areas).of_images(used),
            number_categories(f"OpenImagesSource: {classes}", list(codes.values())),
            training=training,
            negative=LabelSets.from_pairs((np.cumsum(used) - 1)[pairs[:, 0]], pairs[:, 1], int(used.sum())),
            skipped=skipped + unusable,
        )


class OpenImagesDetection(DetectionData):
    """Open Images, without masks.

    Args:
        train_boxes: CSV of the training boxes.
        train_images: Holds the training images, `<ImageID>.jpg`.
        val_boxes: CSV of the validation boxes.
        val_images: Holds the validation images.
        classes: `class-descriptions-boxable.csv`; labels follow its order, category ids are its line numbers.
        val_labels: CSV of the verified image labels of validation. Without, no class counts as absent.
        num_classes: Number of classes; checked when the data is opened.
        masks: The reader has none.
        **options: Further arguments of `DetectionData`.
    """

    def __init__(
        self,
        train_boxes: Path,
        train_images: Path,
        val_boxes: Path,
        val_images: Path,
        classes: Path,
        val_labels: Path | None = None,
        num_classes: int = 601,
        masks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, masks=masks, **options)
        self.boxes: dict[Split, Path] = {"train": train_boxes, "val": val_boxes}
        self.images: dict[Split, Path] = {"train": train_images, "val": val_images}
        self.classes = classes
        self.val_labels = val_labels

    def find_categories(self) -> Categories | None:
        if not self.classes.is_file():
            return None
        return number_categories(f"OpenImagesSource: {self.classes}", list(read_classes(self.classes).values()))

    def open_split(self, split: Split) -> OpenImagesSource:
        labels = self.val_labels if split == "val" else None
        return OpenImagesSource(self.boxes[split], self.images[split], self.classes, labels, training=split == "train")


def read_classes(path: Path) -> dict[str, str]:
    """Return the name of each code; the file has a header in some releases.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not code and name, or a code stands there twice.
    """
    _check_exists(path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row and row[0] != "LabelName"]
    if not rows or any(len(row) != 2 for row in rows) or len({row[0] for row in rows}) < len(rows):
        raise ValueError(f"OpenImagesSource: {path}: expected lines `code,name`, each code once.")
    return {row[0]: row[1] for row in rows}


def _read_boxes(path: Path, labels: dict[str, int], numbers: dict[str, int]) -> tuple[ObjectRows, Counter[str]]:
    """Read boxes in shares of the image; give each new image the next number in `numbers`."""
    rows = ObjectRows()
    skipped: Counter[str] = Counter()
    for line, (image, code, group, *corners) in _read_columns(path, "ImageID", "LabelName", "IsGroupOf", *CORNERS):
        if code not in labels:
            raise ValueError(f"OpenImagesSource: {path}:{line}: class {code} is not in the class descriptions.")
        number = numbers.setdefault(image, len(numbers))
        try:
            left, top, right, bottom = (float(corner) for corner in corners)
        except ValueError:
            left = top = right = bottom = math.nan
        if math.isfinite(left + top + right + bottom):
            rows.append(number, labels[code], (left, top, right - left, bottom - top), crowd=group == "1")
        else:
            skipped[NO_BOX] += 1
    return rows, skipped


def _read_negative(path: Path, labels: dict[str, int], numbers: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Yield (number of the image, label) of classes that are absent; classes without boxes are passed over."""
    for _, (image, code, confidence) in _read_columns(path, "ImageID", "LabelName", "Confidence"):
        number = numbers.setdefault(image, len(numbers))
        if code in labels and float(confidence) == 0:
            yield number, labels[code]


def _read_columns(path: Path, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and values of the columns."""
    _check_exists(path)
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file)
        header = next(lines, [])
        if missing := [column for column in columns if column not in header]:
            raise ValueError(f"OpenImagesSource: {path} has no column {', '.join(missing)}.")
        places = [header.index(column) for column in columns]
        for line in lines:
            if len(line) != len(header):
                raise ValueError(
                    f"OpenImagesSource: {path}:{lines.line_num}: {len(line)} values for {len(header)} columns."
                )
            yield lines.line_num, [line[place] for place in places]


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"OpenImagesSource: {path} does not exist.")
