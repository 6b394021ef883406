"""Pascal VOC: one XML file an image, lists of images by split."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from datamodules.detection.categories import number_categories
from datamodules.detection.data import DetectionData
from datamodules.detection.flat import NO_BOX, FlatSource, ObjectRows
from datamodules.detection.images import MISSING, find_present
from datamodules.detection.records import Categories
from datamodules.loading import Split
from datamodules.sources import FileSource

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
CORNERS = ("xmin", "ymin", "xmax", "ymax")


class VocSource(FlatSource):
    """Annotations in Pascal VOC's layout.

    VOC counts pixels from 1 and includes the last one, so a box from pixel `xmin` to pixel `xmax` covers
    `xmin - 1 <= x <= xmax`. Objects marked `difficult` are crowds: they count neither way.

    Args:
        root: `VOCdevkit`, or a folder like it.
        image_sets: Such as `VOC2007/trainval`: `<root>/VOC2007/ImageSets/Main/trainval.txt` lists images of
            `VOC2007/JPEGImages`, whose objects are in `VOC2007/Annotations`.
        class_names: Classes in the order of their labels. Category ids are label + 1.
        training: Leave out images that are missing and objects that cannot be learned from (`flat.trainable`).

    Raises:
        FileNotFoundError: A list or an XML file is missing; all images are, or in evaluation one is.
        ValueError: An XML file is broken, says no image size, or has an unknown class; two images share a name.
    """

    def __init__(
        self, root: Path, image_sets: Sequence[str], class_names: Sequence[str] = VOC_CLASSES, *, training: bool = False
    ) -> None:
        categories = number_categories("VocSource: class_names", class_names)
        names: list[str] = []
        files: list[Path] = []
        for image_set in image_sets:
            folder, _, listed = image_set.rpartition("/")
            for stem in _read_list(root / folder / "ImageSets" / "Main" / f"{listed}.txt"):
                names.append(f"{folder}/JPEGImages/{stem}.jpg")
                files.append(root / folder / "Annotations" / f"{stem}.xml")
        origin = f"VocSource: {root} ({', '.join(image_sets)})"
        present = find_present("VocSource", root, root, names, training=training)
        skipped = Counter({MISSING: int((~present).sum())})
        rows = ObjectRows()
        sizes = np.zeros((len(names), 2), dtype=np.int64)
        labels = {name: label for label, name in enumerate(class_names)}
        for number in map(int, np.flatnonzero(present)):
            sizes[number], objects = read_voc(files[number])
            for found in objects:
                if found.name not in labels:
                    raise ValueError(f"VocSource: {files[number]} has an object of the unknown class {found.name!r}.")
                if found.box is None:
                    skipped[NO_BOX] += 1
                else:
                    rows.append(number, labels[found.name], found.box, crowd=found.difficult)
        super().__init__(
            origin,
            FileSource(root, ((names[number], 0) for number in np.flatnonzero(present))),
            sizes[present],
            rows.finish().of_images(present),
            categories,
            training=training,
            skipped=+skipped,  # without zeros
        )


class VocDetection(DetectionData):
    """Pascal VOC, without masks.

    Args:
        root: `VOCdevkit`, which holds `VOC2007/` and `VOC2012/`.
        train_sets: Lists of training images, such as `VOC2007/trainval`.
        val_sets: Lists of validation images.
        num_classes: Number of classes; checked when the data is opened.
        class_names: Classes in the order of their labels.
        masks: The reader has none.
        **options: Further arguments of `DetectionData`.
    """

    def __init__(
        self,
        root: Path,
        train_sets: Sequence[str] = ("VOC2007/trainval", "VOC2012/trainval"),
        val_sets: Sequence[str] = ("VOC2007/test",),
        num_classes: int = 20,
        class_names: Sequence[str] = VOC_CLASSES,
        masks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, masks=masks, **options)
        self.root = root
        self.sets: dict[Split, Sequence[str]] = {"train": train_sets, "val": val_sets}
        self.chosen_names = class_names

    def find_categories(self) -> Categories:
        return number_categories("VocDetection: class_names", self.chosen_names)

    def open_split(self, split: Split) -> VocSource:
        return VocSource(self.root, self.sets[split], self.chosen_names, training=split == "train")


class VocObject(NamedTuple):
    """One object of an XML file."""

    name: str
    box: tuple[float, float, float, float] | None  # left, top, width, height; None if it is not four finite numbers
    difficult: bool


def read_voc(path: Path) -> tuple[tuple[int, int], list[VocObject]]:
    """Read an XML file: height and width of its image, and the objects.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not XML, or lacks the image's size.
    """
    try:
        root = ElementTree.parse(path).getroot()
        size = int(root.findtext("size/height", "")), int(root.findtext("size/width", ""))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"VocSource: {path} does not exist.") from error
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"VocSource: {path}: {error}; expected VOC's XML with the size of the image.") from error
    return size, [_read_object(element) for element in root.iterfind("object")]


def _read_object(element: ElementTree.Element) -> VocObject:
    try:
        xmin, ymin, xmax, ymax = (float(element.findtext(f"bndbox/{corner}", "")) for corner in CORNERS)
    except ValueError:
        xmin = ymin = xmax = ymax = math.nan
    box = (xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1)
    difficult = element.findtext("difficult", "0").strip() == "1"
    return VocObject(element.findtext("name", "").strip(), box if math.isfinite(sum(box)) else None, difficult)


def _read_list(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"VocSource: {path} does not exist.")
    # Lists of one class have a second column.
    return [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
