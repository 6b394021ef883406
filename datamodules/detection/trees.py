"""Trees in aerial photographs: the annotated images inside the PyPI package deepforest, in tiles."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.detection.data import DetectionData
from datamodules.detection.flat import FlatSource, ObjectRows
from datamodules.detection.records import Categories
from datamodules.detection.tiles import Rectangle, TiledSource, lay_tiles
from datamodules.detection.voc import read_voc
from datamodules.loading import Split
from datamodules.sources import FileSource

CATEGORIES = Categories(("Tree",), (1,))
# The annotated images and how many of their lowest rows are held out for validation.
HELD_OUT_ROWS = {
    "2019_YELL_2_528000_4978000_image_crop2": 800,  # of 2472
    "2019_YELL_2_541000_4977000_image_crop": 400,  # of 1035
    "OSBS_029": 0,  # 400 x 400, as the next
    "SOAP_061": 0,
}


class DeepForestTrees(DetectionData):
    """About 950 tree crowns in four aerial photographs of US forests (NEON, 0.1 m a pixel), one class.

    The package is found but not imported, so what it depends on is not needed: `pip install --no-deps deepforest`.

    The lowest rows of the two large photographs are the validation split and everything else is the training split, so
    that no pixel is in both; a tree on the line between them is cut, and counts where half of its box or more lies. The
    training tiles overlap, the validation tiles do not. Trees cut by a tile's border: see `tiles.TiledSource`. Dead and
    live trees, told apart in one photograph only, are one class.

    Args:
        folder: Holds the images and their XML files; null finds the installed package.
        tile_size: Largest side of a tile, pixels.
        overlap: Pixels that neighbouring training tiles share.
        min_visible: Share of a tree's box on a tile that makes it an object.
        masks: The data has none.
        **options: Further arguments of `DetectionData`.
    """

    def __init__(
        self,
        folder: Path | None = None,
        tile_size: int = 400,
        overlap: int = 100,
        min_visible: float = 0.5,
        masks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(1, masks=masks, **options)
        self._check_least(tile_size=(tile_size, 32), overlap=(overlap, 0))
        self.folder = folder
        self.tile_size = tile_size
        self.overlap = overlap
        self.min_visible = min_visible

    def find_categories(self) -> Categories:
        return CATEGORIES

    def open_split(self, split: Split) -> TiledSource:
        photographs = open_photographs(find_folder() if self.folder is None else self.folder)
        tiles = [
            (index, tile)
            for index, rows in enumerate(HELD_OUT_ROWS.values())
            for region in [region_of(split, photographs.size(index), rows)]
            if region.top < region.bottom
            for tile in lay_tiles(region, self.tile_size, self.overlap if split == "train" else 0)
        ]
        return TiledSource(photographs, tiles, self.min_visible, training=split == "train")


def region_of(split: Split, size: tuple[int, int], held_out_rows: int) -> Rectangle:
    """Return the part of a photograph (of this height and width) that belongs to a split."""
    height, width = size
    line = height - held_out_rows
    return Rectangle(0, 0, width, line) if split == "train" else Rectangle(0, line, width, height)


def find_folder() -> Path:
    """Return the folder of deepforest's images.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    found = importlib.util.find_spec("deepforest")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "DeepForestTrees: the package deepforest is not installed. `pip install --no-deps deepforest` is enough, "
            "or set folder to an unpacked copy of its data."
        )
    return Path(found.origin).parent / "data"


def open_photographs(folder: Path) -> FlatSource:
    """Return the whole photographs, in the order of `HELD_OUT_ROWS`.

    Raises:
        FileNotFoundError: One of them or its XML file is missing.
    """
    rows = ObjectRows()
    sizes: list[tuple[int, int]] = []
    for number, name in enumerate(HELD_OUT_ROWS):
        if not (folder / f"{name}.png").is_file():
            raise FileNotFoundError(f"DeepForestTrees: {folder / name}.png does not exist.")
        size, trees = read_voc(folder / f"{name}.xml")
        sizes.append(size)
        for tree in trees:
            assert tree.box is not None
            rows.append(number, 0, tree.box)
    files = FileSource(folder, ((f"{name}.png", 0) for name in HELD_OUT_ROWS))
    return FlatSource(f"DeepForestTrees: {folder}", files, np.array(sizes), rows.finish(), CATEGORIES, training=False)
