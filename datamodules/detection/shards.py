"""Detection data in tar files that `webdataset` reads too, with random access.

A sample is `<key>.jpg` (or another image suffix) and `<key>.json`. Beside the shards lie `categories.json`, and
`index.npz` with the place of each sample, so that a data set of few large files is sampled, grouped, balanced and
resumed like one of many small files. The index is made again when it is missing or a shard has changed.
"""

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.detection.data import DetectionData
from datamodules.detection.flat import UNFIT, report_skipped, trainable
from datamodules.detection.images import upright
from datamodules.detection.records import Categories, DetectionSource, LabelSets, Objects
from datamodules.detection.shard_index import find_shards, from_json, open_index
from datamodules.loading import Split
from datamodules.sources import IMAGE_SUFFIXES

CATEGORIES = "categories.json"


def write_shards(source: DetectionSource, folder: Path, images_per_shard: int = 1000) -> None:
    """Write a source as shards. Image files are copied byte for byte; images that are no files are stored as PNG.

    Args:
        source: Open it as for evaluation, so that nothing is missing from the shards.
        folder: Is made; holds no shards yet.
        images_per_shard: Images of a shard, the last one aside. A thousand photographs take about 150 MB.

    Raises:
        ValueError: `images_per_shard` is less than 1.
        FileExistsError: `folder` has shards.
    """
    if images_per_shard < 1:
        raise ValueError(f"write_shards: images_per_shard={images_per_shard}, expected at least 1.")
    folder.mkdir(parents=True, exist_ok=True)
    if found := find_shards(folder):
        raise FileExistsError(f"write_shards: {folder} has shards ({found[0].name}, ...). Choose another folder.")
    for number, first in enumerate(range(0, len(source), images_per_shard)):
        shard = folder / f"shard-{number:06}.tar"
        unfinished = shard.with_suffix(".unfinished")
        with tarfile.open(unfinished, "w") as tar:
            for index in range(first, min(first + images_per_shard, len(source))):
                suffix, image = _image_bytes(source, index)
                _add(tar, f"{index:09}{suffix}", image)
                _add(tar, f"{index:09}.json", json.dumps(to_json(source, index)).encode())
        unfinished.replace(shard)
    (folder / CATEGORIES).write_text(json.dumps(asdict(source.categories), indent=1), encoding="utf-8")
    open_index(folder)


class ShardSource:
    """A `DetectionSource` of shards.

    Args:
        folder: Holds `*.tar` and `categories.json`, as `write_shards` makes them.
        masks: Whether to read masks.
        training: Leave out objects that cannot be learned from (`flat.trainable`).

    Raises:
        FileNotFoundError: There are no shards or no categories.
        ValueError: A shard is broken, or a sample lacks its image, its JSON or a part of that; two share an image id.
    """

    def __init__(self, folder: Path, *, masks: bool = True, training: bool = False) -> None:
        self._shards, self._masks, self._training = find_shards(folder), masks, training
        if not self._shards:
            raise FileNotFoundError(f"ShardSource: {folder} has no *.tar.")
        self.categories = read_categories(folder)
        self._index = open_index(folder)
        ids, counts = np.unique(self._index["image_ids"], return_counts=True)
        if len(ids) < len(self):
            raise ValueError(f"ShardSource: {folder}: more than one image has the id {ids[counts > 1][0]}.")
        if (most := int(self._index["labels"].max(initial=0))) >= len(self.categories):
            raise ValueError(
                f"ShardSource: {folder} has an object of label {most} and {len(self.categories)} categories."
            )
        unfit = int((~self._index["trainable"]).sum()) if training else 0
        self.skipped: Mapping[str, int] = {UNFIT: unfit} if unfit else {}
        report_skipped(f"ShardSource: {folder}", self.skipped)

    @property
    def has_masks(self) -> bool:
        """Whether `objects` have masks."""
        return self._masks and bool(self._index["has_masks"])

    def __len__(self) -> int:
        return len(self._index["sizes"])

    def read(self, index: int) -> Image.Image:
        """Return the RGB image, EXIF orientation applied."""
        with Image.open(io.BytesIO(self._member(index, "image"))) as image:
            return upright(image, self.size(index))

    def objects(self, index: int) -> Objects:
        """Return what is on the image."""
        found = from_json(json.loads(self._member(index, "json")), masks=self.has_masks)
        if not self._training:
            return found
        return found.select(trainable(found.boxes, found.areas, self._index["sizes"][index][None]))

    def image_id(self, index: int) -> int | str:
        """Return what the annotation file called the image."""
        found = self._index["image_ids"][index]
        return int(found) if isinstance(found, np.integer) else str(found)

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width."""
        height, width = self._index["sizes"][index]
        return int(height), int(width)

    def name(self, index: int) -> str:
        """Return the shard's path and the key in it."""
        return f"{self._shards[self._index['shards'][index]]}/{self._index['keys'][index].decode()}"

    def label_sets(self) -> LabelSets:
        """Return the labels of each image's objects, crowds and, in training, what cannot be learned from left out."""
        columns = self._index
        used = ~columns["crowd"]
        if self._training:
            used &= columns["trainable"]
        return LabelSets.from_pairs(columns["images"][used], columns["labels"][used], len(self))

    def _member(self, index: int, kind: str) -> bytes:
        start, length = self._index[kind][index]
        # Opened each time: an open file does not survive a fork, and the call is cheap beside decoding.
        with self._shards[self._index["shards"][index]].open("rb") as file:
            file.seek(int(start))
            content: bytes = file.read(int(length))
        return content


class DetectionShards(DetectionData):
    """Shards that `write_shards` made.

    Args:
        train_shards: Folder of the training shards.
        val_shards: Folder of the validation shards.
        num_classes: Number of classes; checked when the data is opened.
        **options: Further arguments of `DetectionData`.
    """

    def __init__(self, train_shards: Path, val_shards: Path, num_classes: int = 80, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.folders: dict[Split, Path] = {"train": train_shards, "val": val_shards}

    def find_categories(self) -> Categories | None:
        folder = self.folders["val"]
        return read_categories(folder) if (folder / CATEGORIES).is_file() else None

    def open_split(self, split: Split) -> ShardSource:
        return ShardSource(self.folders[split], masks=self.masks, training=split == "train")


def read_categories(folder: Path) -> Categories:
    """Return the classes of a folder of shards.

    Raises:
        FileNotFoundError: There is no `categories.json`.
        ValueError: It lacks a part.
    """
    path = folder / CATEGORIES
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        frequency = None if content["frequency"] is None else tuple(content["frequency"])
        return Categories(tuple(content["names"]), tuple(content["ids"]), frequency)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"ShardSource: {path} does not exist.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"ShardSource: {path}: {type(error).__name__} {error}; expected `names`, `ids` and `frequency`."
        ) from error


def to_json(source: DetectionSource, index: int) -> dict[str, Any]:
    """Return the JSON of a sample, which `from_json` reads."""
    found = source.objects(index)
    masks = None if found.masks is None else [mask["counts"].decode() for mask in found.masks]
    return {
        "image_id": source.image_id(index),
        "size": source.size(index),
        "boxes": found.boxes.tolist(),
        "labels": found.labels.tolist(),
        "areas": found.areas.tolist(),
        "crowd": found.crowd.tolist(),
        "masks": masks,
        "negative": found.negative,
        "not_exhaustive": found.not_exhaustive,
    }


def _image_bytes(source: DetectionSource, index: int) -> tuple[str, bytes]:
    path = Path(source.name(index))
    if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        return path.suffix.lower(), path.read_bytes()
    stored = io.BytesIO()
    source.read(index).save(stored, "png")
    return ".png", stored.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # No time stamp, so that the same data gives the same bytes.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
