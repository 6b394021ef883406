"""Folders of images and of masks that hold the number of a class at each pixel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.batch import Array
from datamodules.detection.images import ORIENTATION, QUARTER_TURNS, upright
from datamodules.loading import Split
from datamodules.segmentation.data import SegmentationData
from datamodules.segmentation.layouts import FolderLayout, Part, known_layout
from datamodules.segmentation.masks import label_table, mask_size, read_mask
from datamodules.segmentation.records import Classes
from datamodules.sources import FileSource, find_images


class PairSource:
    """Image files and mask files.

    Args:
        root: Joined with each path.
        pairs: Path of each image and of its mask.
        classes: The classes by label.
        table: What the values of masks mean, of `masks.label_table`.
    """

    def __init__(self, root: Path, pairs: Sequence[tuple[str, str]], classes: Classes, table: Array) -> None:
        self._root, self.classes, self._table = root, classes, table
        self._images = FileSource(root, ((image, 0) for image, _ in pairs))
        self._masks = FileSource(root, ((mask, 0) for _, mask in pairs))

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Image.Image:
        """Return the RGB image, turned as EXIF says unless only the unturned one has the size of its mask."""
        with Image.open(self.name(index)) as image:
            turned = image.getexif().get(ORIENTATION) in QUARTER_TURNS
            size = mask_size(Path(self._masks.name(index))) if turned else (image.height, image.width)
            return upright(image, size)

    def mask(self, index: int) -> Array:
        """Return the label of each pixel."""
        name = self._masks.name(index)
        return read_mask(Path(name), self._table, name)

    def image_id(self, index: int) -> str:
        """Return the image's path below the root, without its last suffix."""
        return Path(self.name(index)).relative_to(self._root).with_suffix("").as_posix()

    def name(self, index: int) -> str:
        """Return the image's path."""
        return self._images.name(index)


class SegmentationFolders(SegmentationData):
    """A public data set, or your own images and masks.

    Masks are PNG files, or others without loss, of one channel or with a palette: each pixel holds the number of its
    class, or 255 where it counts neither way. Your own lie in `images/train`, `masks/train`, `images/val` and
    `masks/val` of `root`, in pairs of one name; `dataset` describes everything that is otherwise.

    Args:
        root: Holds the folders.
        dataset: One of `layouts.LAYOUTS`, such as `ade20k`, or a layout of your own.
        num_classes: Null: as many as `dataset` names. More leave outputs of the model unused: the authors' models of
            Cityscapes have 150.
        train_parts: Parts of `dataset` to train on.
        val_part: Part to validate on.
        val_root: Where that is, if elsewhere.
        val_dataset: What that is, if another data set; it has the same classes.
        **options: Further arguments of `SegmentationData`.

    Raises:
        ValueError: `num_classes` is missing or less than the named classes; a data set or a part is unknown.
    """

    def __init__(
        self,
        root: Path,
        dataset: str | FolderLayout = FolderLayout(),  # noqa: B008 - it is frozen
        num_classes: int | None = None,
        train_parts: tuple[str, ...] = ("train",),
        val_part: str = "val",
        val_root: Path | None = None,
        val_dataset: str | FolderLayout | None = None,
        **options: Any,
    ) -> None:
        train_layout = known_layout(dataset) if isinstance(dataset, str) else dataset
        val_layout = known_layout(val_dataset) if isinstance(val_dataset, str) else val_dataset or train_layout
        for layout in (train_layout, val_layout):
            num_classes = self._count_classes(layout, num_classes)
        assert num_classes is not None
        super().__init__(num_classes, **options)
        self.roots: dict[Split, Path] = {"train": root, "val": root if val_root is None else val_root}
        self.layouts: dict[Split, FolderLayout] = {"train": train_layout, "val": val_layout}
        self.parts: dict[Split, tuple[str, ...]] = {"train": tuple(train_parts), "val": (val_part,)}
        for split, names in self.parts.items():
            known = self.layouts[split].folders
            if unknown := [name for name in names if name not in known]:
                raise ValueError(
                    f"SegmentationFolders: the {split} data has no part {', '.join(unknown)}, only {', '.join(known)}."
                )

    def open_split(self, split: Split) -> PairSource:
        root, layout = self.roots[split], self.layouts[split]
        pairs = [pair for name in self.parts[split] for pair in find_pairs(root, layout.folders[name], layout)]
        table = label_table(
            len(layout.class_names) or self.num_classes,
            reduce_zero_label=layout.reduce_zero_label,
            class_ids=layout.class_ids,
            ignore_value=layout.ignore_value,
        )
        return PairSource(root, pairs, layout.classes(self.num_classes), table)

    def find_classes(self) -> Classes:
        return self.layouts["val"].classes(self.num_classes)

    @staticmethod
    def _count_classes(layout: FolderLayout, num_classes: int | None) -> int:
        named = len(layout.class_names)
        if num_classes is None and named == 0:
            raise ValueError("SegmentationFolders: num_classes is missing. Give it, or the class_names of the dataset.")
        if num_classes is not None and num_classes < named:
            raise ValueError(f"SegmentationFolders: num_classes={num_classes}, but the data set has {named} classes.")
        return named if num_classes is None else num_classes


def find_pairs(root: Path, part: Part, layout: FolderLayout) -> list[tuple[str, str]]:
    """Return the paths, relative to `root`, of the images of a part and of their masks, sorted.

    Raises:
        FileNotFoundError: A folder or the listing does not exist, or there are no images.
        ValueError: An image lacks its mask, a mask lacks its image, a listed image does not exist, or two files have
            one name.
    """
    images = _by_stem(root, part.images, layout.image_suffix)
    masks = _by_stem(root, part.masks, layout.mask_suffix)
    if not images:
        kind = "image" if layout.image_suffix is None else f"*{layout.image_suffix}"
        raise FileNotFoundError(f"SegmentationFolders: {root / part.images} has no {kind}.")
    if part.listing is not None:
        images = _listed(root, part, images)
    elif orphans := [stem for stem in masks if not _belongs(stem, images)]:
        raise ValueError(
            f"SegmentationFolders: {len(orphans)} masks have no image in {root / part.images}, the first is "
            f"{root / masks[orphans[0]]}. Restore the images, or name those to use in a listing."
        )
    if without := [stem for stem in images if stem not in masks]:
        raise ValueError(
            f"SegmentationFolders: {len(without)} of {len(images)} images of {root / part.images} have no mask, the "
            f"first is {root / images[without[0]]}: {root / part.masks / without[0]}{layout.mask_suffix} does not "
            "exist. Restore the masks, or check mask_suffix."
        )
    return [(image, masks[stem]) for stem, image in images.items()]


def _by_stem(root: Path, folder: str, suffix: str | None) -> dict[str, str]:
    place = root / folder
    if not place.is_dir():
        raise FileNotFoundError(
            f"SegmentationFolders: {place} does not exist. Check root and the parts of the dataset."
        )
    found: dict[str, str] = {}
    for path in find_images(place):
        if suffix is not None and not path.name.endswith(suffix):
            continue
        name = path.relative_to(place).as_posix()
        stem = name.removesuffix(path.suffix if suffix is None else suffix)
        if stem in found:
            raise ValueError(f"SegmentationFolders: {root / found[stem]} and {path} have one name. Set image_suffix.")
        found[stem] = path.relative_to(root).as_posix()
    return found


def _listed(root: Path, part: Part, images: dict[str, str]) -> dict[str, str]:
    assert part.listing is not None
    listing = root / part.listing
    names = {line.strip() for line in listing.read_text(encoding="utf-8").splitlines()} - {""}
    if absent := sorted(names - set(images)):
        raise ValueError(
            f"SegmentationFolders: {len(absent)} of {len(names)} images in {listing} do not exist in "
            f"{root / part.images}, the first is {absent[0]}. The listing has names without suffix."
        )
    if not names:
        raise ValueError(f"SegmentationFolders: {listing} is empty.")
    return {name: images[name] for name in sorted(names)}


def _belongs(stem: str, images: dict[str, str]) -> bool:
    """Whether a mask is that of an image, or was made from one: then something is added to the name, after `_`."""
    return stem in images or any(stem[:end] in images for end, letter in enumerate(stem) if letter == "_")
