"""How the files of a segmentation data set lie and what the values in its masks mean: public data sets, and your own.

Names and colours of the public ones are in `data/*.csv`, read when first asked for. Colours are those of the data set
where it has some (ADE20K, Cityscapes, Mapillary Vistas), otherwise generated (COCO-Stuff, NYU Depth, PASCAL Context).
"""

import csv
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from datamodules.segmentation.records import IGNORE, Classes, Colour, generated_palette


@dataclass(frozen=True, kw_only=True)
class Part:
    """A folder of images and one of masks; a mask has its image's name, and lies in a subfolder of the same name.

    Args:
        images: Folder, relative to the root of the data set.
        masks: Folder, relative to the root of the data set.
        listing: Text file, relative to the root, with the names of the images to use, a line each, without suffix;
            null takes all.
    """

    images: str
    masks: str
    listing: str | None = None


def own_parts() -> dict[str, Part]:
    """Return the folders of your own data: `images` and `masks`, each with `train` and `val`."""
    return {split: Part(images=f"images/{split}", masks=f"masks/{split}") for split in ("train", "val")}


@dataclass(frozen=True, kw_only=True)
class FolderLayout:
    """One data set.

    Args:
        class_names: Classes in the order of their labels; empty: they have none.
        palette: RGB of each class; null generates colours.
        parts: Folders by name, from which a datamodule picks; null: `own_parts`.
        image_suffix: How the names of images end; null: any suffix of images.
        mask_suffix: How the names of masks end.
        reduce_zero_label: The value 0 in a mask is ignored and value v is label v - 1.
        class_ids: The values of each class in a mask, for values that are no labels; all others are ignored.
        ignore_value: Value in a mask that is ignored; 255 always is.

    Raises:
        ValueError: Lengths differ, a name stands for two classes, or two rules for the values contradict each other.
    """

    class_names: tuple[str, ...] = ()
    palette: tuple[Colour, ...] | None = None
    parts: dict[str, Part] | None = None
    image_suffix: str | None = None
    mask_suffix: str = ".png"
    reduce_zero_label: bool = False
    class_ids: tuple[tuple[int, ...], ...] | None = None
    ignore_value: int = IGNORE

    def __post_init__(self) -> None:
        for name, values in (("palette", self.palette), ("class_ids", self.class_ids)):
            if values is not None and len(values) != len(self.class_names):
                raise ValueError(f"FolderLayout: {len(self.class_names)} class_names and {len(values)} {name}.")
        if len(set(self.class_names)) < len(self.class_names):
            twice = sorted({name for name in self.class_names if self.class_names.count(name) > 1})
            raise ValueError(f"FolderLayout: class_names has {', '.join(twice[:5])} more than once.")
        if self.reduce_zero_label and self.class_ids is not None:
            raise ValueError(
                "FolderLayout: reduce_zero_label and class_ids exclude each other; list the values of each class."
            )
        numbers = [self.ignore_value, *(value for ids in self.class_ids or () for value in ids)]
        if not 0 <= min(numbers) <= max(numbers) <= 255:
            raise ValueError("FolderLayout: class_ids and ignore_value are values of masks, expected 0 to 255.")
        if lost := {self.ignore_value, IGNORE} & set(numbers[1:]):
            raise ValueError(
                f"FolderLayout: class_ids has {min(lost)}, which is ignored. Write another number into the masks."
            )

    @property
    def folders(self) -> dict[str, Part]:
        """The parts by name."""
        return own_parts() if self.parts is None else self.parts

    def classes(self, num_classes: int) -> Classes:
        """Return names and colours of so many classes; those without a name are called `class_3` or `unused_19`."""
        names = self.class_names or tuple(f"class_{label}" for label in range(num_classes))
        return Classes(names, self.palette or generated_palette(len(names))).extended(num_classes)


def known_layout(name: str) -> FolderLayout:
    """Return the layout of a public data set.

    Raises:
        ValueError: It is not in the table.
    """
    if name not in LAYOUTS:
        similar = difflib.get_close_matches(name, LAYOUTS, n=3)
        hint = f"Did you mean {' or '.join(similar)}?" if similar else f"Known are {', '.join(LAYOUTS)}."
        raise ValueError(f"FolderLayout: no data set is called {name}. {hint}")
    return LAYOUTS[name]()


@cache
def read_table(name: str) -> list[dict[str, str]]:
    """Return the rows of `data/<name>.csv`, one per class."""
    text = files("datamodules.segmentation").joinpath(f"data/{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def _ade20k() -> FolderLayout:
    return FolderLayout(
        class_names=_names("ade20k"),
        palette=_palette("ade20k"),
        parts={
            "train": Part(images="images/training", masks="annotations/training"),
            "val": Part(images="images/validation", masks="annotations/validation"),
        },
        image_suffix=".jpg",
        reduce_zero_label=True,
    )


def _cityscapes(mask_suffix: str, ids: str | None = None) -> FolderLayout:
    # `train_extra` are the coarsely annotated images with the refined masks that the authors train on.
    return FolderLayout(
        class_names=_names("cityscapes"),
        palette=_palette("cityscapes"),
        parts={
            "train": Part(images="leftImg8bit/train", masks="gtFine/train"),
            "train_extra": Part(images="leftImg8bit/train_extra", masks="refinement_final/train_extra"),
            "val": Part(images="leftImg8bit/val", masks="gtFine/val"),
        },
        image_suffix="_leftImg8bit.png",
        mask_suffix=mask_suffix,
        class_ids=_ids("cityscapes", ids),
    )


def _mapillary(classes: str, ids: str | None = None) -> FolderLayout:
    return FolderLayout(
        class_names=_names(classes),
        palette=_palette(classes),
        parts={
            "train": Part(images="training/images", masks="training/labels"),
            "val": Part(images="validation/images", masks="validation/labels"),
        },
        image_suffix=".jpg",
        class_ids=_ids(classes, ids),
    )


def _coco_stuff(
    train: str, val: str, mask_suffix: str, *, reduce_zero: bool = False, ids: str | None = None
) -> FolderLayout:
    return FolderLayout(
        class_names=_names("coco_stuff"),
        parts={
            "train": Part(images=f"images/{train}", masks=f"annotations/{train}"),
            "val": Part(images=f"images/{val}", masks=f"annotations/{val}"),
        },
        image_suffix=".jpg",
        mask_suffix=mask_suffix,
        reduce_zero_label=reduce_zero,
        class_ids=_ids("coco_stuff", ids),
    )


def _nyu_depth_v2() -> FolderLayout:
    return FolderLayout(
        class_names=_names("nyu_depth_v2"),
        parts={
            "train": Part(images="image", masks="label40", listing="train.txt"),
            "val": Part(images="image", masks="label40", listing="test.txt"),
        },
        image_suffix=".png",
        reduce_zero_label=True,
    )


def _pascal_context(*, background: bool) -> FolderLayout:
    lists, folders = "ImageSets/SegmentationContext", {"images": "JPEGImages", "masks": "SegmentationClassContext"}
    return FolderLayout(
        class_names=_names("pascal_context")[0 if background else 1 :],
        parts={split: Part(**folders, listing=f"{lists}/{split}.txt") for split in ("train", "val")},
        image_suffix=".jpg",
        reduce_zero_label=not background,
    )


def _names(table: str) -> tuple[str, ...]:
    return tuple(row["name"] for row in read_table(table))


def _palette(table: str) -> tuple[Colour, ...]:
    return tuple((int(row["red"]), int(row["green"]), int(row["blue"])) for row in read_table(table))


def _ids(table: str, column: str | None) -> tuple[tuple[int, ...], ...] | None:
    if column is None:
        return None
    return tuple(tuple(int(number) for number in row[column].split()) for row in read_table(table))


# Folders and suffixes are those of the authors' configurations. `_ids` are the masks as they are downloaded, without
# the conversion to labels that the authors' framework asks for.
LAYOUTS: Mapping[str, Callable[[], FolderLayout]] = {
    "ade20k": _ade20k,
    "cityscapes": lambda: _cityscapes("_gtFine_labelTrainIds.png"),
    "cityscapes_ids": lambda: _cityscapes("_gtFine_labelIds.png", "label_id"),
    "mapillary": lambda: _mapillary("mapillary_vistas"),
    # Folded to the classes of Cityscapes.
    "mapillary_19": lambda: _mapillary("cityscapes", "mapillary_ids"),
    "coco_stuff164k": lambda: _coco_stuff("train2017", "val2017", "_labelTrainIds.png"),
    "coco_stuff164k_ids": lambda: _coco_stuff("train2017", "val2017", ".png", ids="stuffthing_id"),
    "coco_stuff10k": lambda: _coco_stuff("train2014", "test2014", "_labelTrainIds.png", reduce_zero=True),
    "nyu_depth_v2": _nyu_depth_v2,
    "pascal_context_59": lambda: _pascal_context(background=False),
    "pascal_context_60": lambda: _pascal_context(background=True),
}
