"""Segmentation data in tar files that `webdataset` reads too, with random access.

A sample is `<key>.jpg` (or another image suffix; a PNG is `<key>.image.png`) and `<key>.png`, whose values are labels
or 255. Beside the shards lie `classes.json`, and `index.npz` with the place of each sample, so that a data set of few
large files is sampled and resumed like one of many small files. The index is made again when it is missing or a shard
has changed.
"""

import io
import json
import tarfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from datamodules.batch import Array
from datamodules.detection.images import ORIENTATION, QUARTER_TURNS, upright, write_whole
from datamodules.detection.shard_index import INDEX, find_shards
from datamodules.loading import Split
from datamodules.segmentation.data import SegmentationData
from datamodules.segmentation.masks import label_table, mask_size, read_mask
from datamodules.segmentation.records import Classes, SegmentationSource
from datamodules.sources import IMAGE_SUFFIXES

CLASSES = "classes.json"
_PARTS = ("image", "mask")


def write_shards(source: SegmentationSource, folder: Path, images_per_shard: int = 1000) -> None:
    """Write a source as shards. Image files are copied byte for byte; images that are no files are stored as PNG.

    Args:
        source: The images and masks.
        folder: Is made; holds no shards yet.
        images_per_shard: Images of a shard, the last one aside.

    Raises:
        ValueError: `images_per_shard` is less than 1, or a mask is wrong.
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
                _add(tar, f"{index:09}.png", _png(Image.fromarray(source.mask(index))))
        unfinished.replace(shard)
    (folder / CLASSES).write_text(json.dumps(asdict(source.classes), indent=1), encoding="utf-8")
    open_index(folder)


def open_index(folder: Path) -> dict[str, Array]:
    """Return the index of a folder's shards: the stored one, or a new one if it is missing or a shard has changed.

    Arrays: `shards` (I,), number of the shard; `keys` (I,); `image` and `mask` (I, 2), where the bytes start and how
    many they are.

    Raises:
        ValueError: A shard is broken, or a sample lacks its image or its mask.
    """
    shards = find_shards(folder)
    state = json.dumps([(shard.name, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards])
    with suppress(OSError, ValueError, KeyError, BadZipFile), np.load(folder / INDEX) as kept:
        if str(kept["state"]) == state:
            return {name: kept[name] for name in kept.files}
    index = {"state": np.array(state), **_make_index(shards)}
    # A folder that cannot be written is read each time.
    with suppress(OSError):
        write_whole(folder / INDEX, **index)
    return index


class ShardSource:
    """A `SegmentationSource` of shards.

    Args:
        folder: Holds `*.tar` and `classes.json`, as `write_shards` makes them.

    Raises:
        FileNotFoundError: There are no shards or no classes.
        ValueError: A shard is broken, or a sample lacks its image or its mask.
    """

    def __init__(self, folder: Path) -> None:
        self._shards = find_shards(folder)
        if not self._shards:
            raise FileNotFoundError(f"SegmentationShards: {folder} has no *.tar.")
        self.classes = read_classes(folder)
        self._table = label_table(len(self.classes))
        self._index = open_index(folder)

    def __len__(self) -> int:
        return len(self._index["shards"])

    def read(self, index: int) -> Image.Image:
        """Return the RGB image, turned as EXIF says unless only the unturned one has the size of its mask."""
        with Image.open(io.BytesIO(self._member(index, "image"))) as image:
            turned = image.getexif().get(ORIENTATION) in QUARTER_TURNS
            size = mask_size(self._member(index, "mask")) if turned else (image.height, image.width)
            return upright(image, size)

    def mask(self, index: int) -> Array:
        """Return the label of each pixel."""
        return read_mask(self._member(index, "mask"), self._table, f"{self.name(index)}.png")

    def image_id(self, index: int) -> str:
        """Return the shard's name and the key in it."""
        return f"{self._shards[self._index['shards'][index]].stem}/{self._index['keys'][index].decode()}"

    def name(self, index: int) -> str:
        """Return the shard's path and the key in it."""
        return f"{self._shards[self._index['shards'][index]]}/{self._index['keys'][index].decode()}"

    def _member(self, index: int, kind: str) -> bytes:
        start, length = self._index[kind][index]
        # Opened each time: an open file does not survive a fork, and the call is cheap beside decoding.
        with self._shards[self._index["shards"][index]].open("rb") as file:
            file.seek(int(start))
            content: bytes = file.read(int(length))
        return content


class SegmentationShards(SegmentationData):
    """Shards that `write_shards` made.

    Args:
        train_shards: Folder of the training shards.
        val_shards: Folder of the validation shards.
        num_classes: Number of classes; checked when the data is opened.
        **options: Further arguments of `SegmentationData`.
    """

    def __init__(self, train_shards: Path, val_shards: Path, num_classes: int, **options: Any) -> None:
        super().__init__(num_classes, **options)
        self.folders: dict[Split, Path] = {"train": train_shards, "val": val_shards}

    def open_split(self, split: Split) -> ShardSource:
        return ShardSource(self.folders[split])


def read_classes(folder: Path) -> Classes:
    """Return the classes of a folder of shards.

    Raises:
        FileNotFoundError: There is no `classes.json`.
        ValueError: It lacks a part.
    """
    path = folder / CLASSES
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Classes(tuple(content["names"]), tuple((red, green, blue) for red, green, blue in content["palette"]))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"SegmentationShards: {path} does not exist.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"SegmentationShards: {path}: {type(error).__name__} {error}; expected `names` and `palette`."
        ) from error


def _make_index(shards: list[Path]) -> dict[str, Array]:
    columns: defaultdict[str, list[Any]] = defaultdict(list)
    for number, shard in enumerate(shards):
        places: defaultdict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        try:
            with tarfile.open(shard, mode="r:") as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    kind = "mask" if suffix == "png" else "image" if member.name.endswith(IMAGE_SUFFIXES) else suffix
                    places[key][kind] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ValueError(f"SegmentationShards: {shard} is broken: {error}. Make it again.") from error
        for key, parts in places.items():
            if missing := [kind for kind in _PARTS if kind not in parts]:
                raise ValueError(f"SegmentationShards: {shard}: sample {key} has no {' and no '.join(missing)}.")
            columns["shards"].append(number)
            columns["keys"].append(key.encode())
            for kind in _PARTS:
                columns[kind].append(parts[kind])
    if not columns:
        raise ValueError(f"SegmentationShards: {shards[0].parent}: the shards are empty.")
    return {name: np.array(values) for name, values in columns.items()}


def _image_bytes(source: SegmentationSource, index: int) -> tuple[str, bytes]:
    path = Path(source.name(index))
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES and path.is_file():
        return ".image.png" if suffix == ".png" else suffix, path.read_bytes()
    return ".image.png", _png(source.read(index))


def _png(image: Image.Image) -> bytes:
    stored = io.BytesIO()
    image.save(stored, "png")
    return stored.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # No time stamp, so that the same data gives the same bytes.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
