"""Cell nuclei under a fluorescence microscope: the annotated image inside the PyPI package stardist, in quadrants.

Shapes: H W size of a tile.
"""

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from datamodules.batch import Array
from datamodules.detection.tiles import Rectangle, lay_tiles
from datamodules.loading import Split
from datamodules.segmentation.data import SegmentationData
from datamodules.segmentation.records import Classes
from datamodules.segmentation.transforms import SegmentationEvalTransform, SegmentationTrainTransform

CLASSES = Classes(("background", "nucleus"), ((0, 0, 0), (255, 200, 0)))
CLASSES_WITH_BORDER = Classes((*CLASSES.names, "border"), (*CLASSES.palette, (0, 120, 255)))
# Share of the grey values that become black, and at most white.
DARKEST, BRIGHTEST = 1.0, 99.8

TRAIN = SegmentationTrainTransform(short_side=256, long_side=256, crop=(192, 192))
EVAL = SegmentationEvalTransform(short_side=256, long_side=256)


class StarDistNuclei(SegmentationData):
    """125 nuclei in one image of 512 x 512 pixels (from the 2018 Data Science Bowl): background and nucleus.

    The package is found but not imported, so what it depends on is not needed: `pip install --no-deps stardist`.

    The quadrant at the lower right is the validation split and the other three are the training split. A nucleus on the
    line between them is cut. Grey values are stretched to [0, 255] over the whole image.

    Args:
        folder: Holds `img2d.tif` and `mask2d.tif`; null finds the installed package.
        border: With a third class, border: pixels so close to two nuclei or more, in pixels; 0 does without.
        tile_size: Largest side of a training image, pixels.
        overlap: Pixels that neighbouring training images of a quadrant share.
        crops_per_image: How often an epoch shows each training image, each time cropped differently.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation and prediction.
        **options: Further arguments of `SegmentationData`.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        folder: Path | None = None,
        border: int = 0,
        tile_size: int = 256,
        overlap: int = 0,
        crops_per_image: int = 16,
        train_transform: SegmentationTrainTransform = TRAIN,
        eval_transform: SegmentationEvalTransform = EVAL,
        **options: Any,
    ) -> None:
        super().__init__(
            len(CLASSES_WITH_BORDER if border else CLASSES),
            crops_per_image=crops_per_image,
            train_transform=train_transform,
            eval_transform=eval_transform,
            **options,
        )
        self._check_least(border=(border, 0), tile_size=(tile_size, 1))
        self.folder = folder
        self.border = border
        self.tile_size = tile_size
        self.overlap = overlap

    def open_split(self, split: Split) -> "NucleiTiles":
        image, nuclei = read_images(find_folder() if self.folder is None else self.folder)
        quadrants = quadrants_of(split, image.shape[:2])
        if split == "train":
            quadrants = [tile for part in quadrants for tile in lay_tiles(part, self.tile_size, self.overlap)]
        return NucleiTiles(image, nuclei, quadrants, self.border)

    def find_classes(self) -> Classes:
        return CLASSES_WITH_BORDER if self.border else CLASSES


class NucleiTiles:
    """Parts of one image, with the number of the nucleus at each pixel.

    Args:
        image: `(H', W')` uint8, the whole image.
        nuclei: `(H', W')` integers, 0 where there is none.
        tiles: The parts.
        border: As `StarDistNuclei` has it.
    """

    def __init__(self, image: Array, nuclei: Array, tiles: Sequence[Rectangle], border: int = 0) -> None:
        self._image, self._nuclei, self._tiles = image, nuclei, list(tiles)
        self._labels = (nuclei > 0).astype(np.uint8)
        if border:
            self._labels[between(nuclei, border)] = 2
        self.classes = CLASSES_WITH_BORDER if border else CLASSES

    def __len__(self) -> int:
        return len(self._tiles)

    def read(self, index: int) -> Image.Image:
        """Return the RGB tile, which is grey."""
        return Image.fromarray(self._cut(self._image, index)).convert("RGB")

    def mask(self, index: int) -> Array:
        """Return the label of each pixel."""
        return self._cut(self._labels, index)

    def instances(self, index: int) -> Array:
        """Return the number of the nucleus at each pixel of the tile, `(H, W)` int64, 0 where there is none."""
        return self._cut(self._nuclei, index).astype(np.int64)

    def image_id(self, index: int) -> str:
        """Return the tile's place."""
        tile = self._tiles[index]
        return f"nuclei_{tile.left}_{tile.top}"

    def name(self, index: int) -> str:
        """Return the file and the part of it."""
        tile = self._tiles[index]
        return f"img2d.tif[{tile.left}:{tile.right}, {tile.top}:{tile.bottom}]"

    def _cut(self, whole: Array, index: int) -> Array:
        tile = self._tiles[index]
        return np.ascontiguousarray(whole[tile.top : tile.bottom, tile.left : tile.right])


def quadrants_of(split: Split, size: tuple[int, ...]) -> list[Rectangle]:
    """Return the quadrants of an image of this height and width that belong to a split."""
    (height, width), (middle_y, middle_x) = size, (size[0] // 2, size[1] // 2)
    if split == "val":
        return [Rectangle(middle_x, middle_y, width, height)]
    return [
        Rectangle(0, 0, middle_x, middle_y),
        Rectangle(middle_x, 0, width, middle_y),
        Rectangle(0, middle_y, middle_x, height),
    ]


def between(nuclei: Array, distance: int) -> Array:
    """Say which pixels have two nuclei or more within a square of `distance` pixels to each side: `(H, W)` bool."""
    numbers = torch.from_numpy(nuclei.astype(np.float32))[None]
    pool = partial(F.max_pool2d, kernel_size=2 * distance + 1, stride=1, padding=distance)
    highest = pool(numbers)
    lowest = -pool(torch.where(numbers > 0, -numbers, -torch.inf))
    found: Array = ((highest > 0) & (lowest != highest))[0].numpy()
    return found


def find_folder() -> Path:
    """Return the folder of stardist's images.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    found = importlib.util.find_spec("stardist")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "StarDistNuclei: the package stardist is not installed. `pip install --no-deps stardist` is enough, or set "
            "folder to an unpacked copy of its data/images."
        )
    return Path(found.origin).parent / "data" / "images"


def read_images(folder: Path) -> tuple[Array, Array]:
    """Return the whole image `(H', W')` uint8 and the number of the nucleus at each pixel, `(H', W')` int64.

    Raises:
        FileNotFoundError: One of the files is missing.
    """
    arrays = []
    for name in ("img2d.tif", "mask2d.tif"):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"StarDistNuclei: {path} does not exist.")
        with Image.open(path) as image:
            arrays.append(np.asarray(image).astype(np.int64))
    low, high = np.percentile(arrays[0], [DARKEST, BRIGHTEST])
    grey = ((arrays[0] - low) / (high - low)).clip(0, 1) * 255
    return grey.round().astype(np.uint8), arrays[1]
