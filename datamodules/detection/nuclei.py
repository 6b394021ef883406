"""Cell nuclei, one by one, under a fluorescence microscope: the annotated image inside the PyPI package stardist.

The image and its quadrants are those of `datamodules.segmentation.nuclei`.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.batch import Array
from datamodules.detection import rle
from datamodules.detection.data import DetectionData
from datamodules.detection.records import Categories, LabelSets, Objects
from datamodules.detection.tiles import TiledSource, lay_tiles
from datamodules.detection.transforms import DetectionEvalTransform, DetectionTrainTransform
from datamodules.loading import Split
from datamodules.segmentation.nuclei import find_folder, quadrants_of, read_images

# Nuclei are about 30 pixels long; the quadrants of 256 pixels are shown at two times their size.
TRAIN = DetectionTrainTransform(short_sides=(416, 480, 512, 544, 608), long_side=608)
EVAL = DetectionEvalTransform(short_side=512, long_side=512)


class StarDistInstances(DetectionData):
    """125 nuclei with masks in one image of 512 x 512 pixels (from the 2018 Data Science Bowl), one class.

    The package is found but not imported, so what it depends on is not needed: `pip install --no-deps stardist`.

    The quadrant at the lower right is the validation split, one image, and the other three are the training split.
    Nuclei cut by a tile's border: see `tiles.TiledSource`.

    Args:
        folder: Holds `img2d.tif` and `mask2d.tif`; null finds the installed package.
        tile_size: Largest side of a training image, pixels.
        overlap: Pixels that neighbouring training images of a quadrant share.
        min_visible: Share of a nucleus's box on a tile that makes it an object.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation and prediction.
        **options: Further arguments of `DetectionData`.
    """

    def __init__(
        self,
        folder: Path | None = None,
        tile_size: int = 256,
        overlap: int = 0,
        min_visible: float = 0.5,
        train_transform: DetectionTrainTransform = TRAIN,
        eval_transform: DetectionEvalTransform = EVAL,
        **options: Any,
    ) -> None:
        super().__init__(1, train_transform=train_transform, eval_transform=eval_transform, **options)
        self.folder = folder
        self.tile_size = tile_size
        self.overlap = overlap
        self.min_visible = min_visible

    def open_split(self, split: Split) -> TiledSource:
        whole = NucleiImage(*read_images(find_folder() if self.folder is None else self.folder))
        regions = quadrants_of(split, whole.size(0))
        if split == "train":
            regions = [tile for region in regions for tile in lay_tiles(region, self.tile_size, self.overlap)]
        return TiledSource(whole, [(0, region) for region in regions], self.min_visible, training=split == "train")


class NucleiImage:
    """The whole image as a source of one.

    Args:
        image: `(H, W)` uint8.
        nuclei: `(H, W)` integers, the number of the nucleus at each pixel, 0 where there is none.
    """

    categories = Categories(("nucleus",), (1,))
    has_masks = True

    def __init__(self, image: Array, nuclei: Array) -> None:
        self._image, self._nuclei = image, nuclei
        self.skipped: Mapping[str, int] = {}

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Image.Image:
        """Return the RGB image, which is grey."""
        return Image.fromarray(self._image).convert("RGB")

    def objects(self, index: int) -> Objects:
        """Return the nuclei by their number."""
        return self._objects

    def image_id(self, index: int) -> str:
        """Return what results are listed under."""
        return "nuclei"

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width."""
        height, width = self._image.shape
        return height, width

    def name(self, index: int) -> str:
        """Return the file."""
        return "img2d.tif"

    def label_sets(self) -> LabelSets:
        """Return the only label."""
        return LabelSets.from_pairs(np.zeros(1, np.int64), np.zeros(1, np.int64), 1)

    @cached_property
    def _objects(self) -> Objects:
        numbers = np.unique(self._nuclei[self._nuclei > 0])
        bitmaps = [self._nuclei == number for number in numbers]
        boxes = [rle.bounding_box(bitmap) for bitmap in bitmaps]
        return Objects(
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            labels=np.zeros(len(numbers), dtype=np.int64),
            areas=np.array([bitmap.sum() for bitmap in bitmaps], dtype=np.float64),
            crowd=np.zeros(len(numbers), dtype=bool),
            masks=[rle.encode(bitmap) for bitmap in bitmaps],
        )
