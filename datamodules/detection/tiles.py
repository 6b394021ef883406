"""Large images cut into tiles, each an image of its own."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from datamodules.batch import Array, RunLengths
from datamodules.detection import rle
from datamodules.detection.flat import trainable
from datamodules.detection.records import Categories, DetectionSource, LabelSets, Objects


class Rectangle(NamedTuple):
    """Part of an image, pixels."""

    left: int
    top: int
    right: int
    bottom: int


class TiledSource:
    """The tiles of a source's images.

    An object is on every tile that it reaches into, cut at the border. Where less than `min_visible` of its box is
    left, the piece is a crowd: a detector can neither be asked for it nor be blamed for finding it.

    Args:
        source: The large images.
        tiles: Number of the image and part of it, one entry per tile.
        min_visible: Share of a box's area that makes an object, in (0, 1].
        training: Leave out objects that cannot be learned from (`flat.trainable`).
        num_cached: Decoded large images that each process keeps.

    Raises:
        ValueError: `min_visible` out of range.
    """

    def __init__(
        self,
        source: DetectionSource,
        tiles: Sequence[tuple[int, Rectangle]],
        min_visible: float = 0.5,
        *,
        training: bool = False,
        num_cached: int = 4,
    ) -> None:
        if not 0 < min_visible <= 1:
            raise ValueError(f"TiledSource: min_visible={min_visible}, expected more than 0 and at most 1.")
        self._source, self.tiles = source, list(tiles)
        self._min_visible, self._training, self._num_cached = min_visible, training, num_cached
        self._recent: dict[int, Image.Image] = {}

    @property
    def categories(self) -> Categories:
        """The classes by label."""
        return self._source.categories

    @property
    def has_masks(self) -> bool:
        """Whether `objects` have masks."""
        return self._source.has_masks

    @property
    def skipped(self) -> Mapping[str, int]:
        """What the source of the large images left out."""
        return self._source.skipped

    def __len__(self) -> int:
        return len(self.tiles)

    def read(self, index: int) -> Image.Image:
        """Return the RGB tile."""
        number, tile = self.tiles[index]
        whole = self._recent.get(number)
        if whole is None:
            whole = self._source.read(number)
            if len(self._recent) >= self._num_cached:
                del self._recent[next(iter(self._recent))]
            self._recent[number] = whole
        return whole.crop(tile)

    def objects(self, index: int) -> Objects:
        """Return what is on the tile."""
        number, tile = self.tiles[index]
        whole = self._source.objects(number)
        boxes, visible = cut_boxes(whole.boxes, tile)
        kept = np.flatnonzero(visible > 0)
        part, boxes = whole.select(kept), boxes[kept]
        masks = None if part.masks is None else [_cut_mask(rle.decode(mask), tile) for mask in part.masks]
        areas = boxes[:, 2] * boxes[:, 3] if masks is None else np.array([float(rle.area(mask)) for mask in masks])
        crowd = part.crowd | (visible[kept] < self._min_visible)
        tiled = Objects(boxes, part.labels, areas, crowd, masks, part.negative, part.not_exhaustive)
        size = np.array([self.size(index)])
        return tiled.select(trainable(boxes, areas, size)) if self._training else tiled

    def image_id(self, index: int) -> str:
        """Return the image's id and the tile's place."""
        number, tile = self.tiles[index]
        return f"{self._source.image_id(number)}_{tile.left}_{tile.top}"

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width of the tile."""
        tile = self.tiles[index][1]
        return tile.bottom - tile.top, tile.right - tile.left

    def name(self, index: int) -> str:
        """Return the path of the large image and the part of it."""
        number, tile = self.tiles[index]
        return f"{self._source.name(number)}[{tile.left}:{tile.right}, {tile.top}:{tile.bottom}]"

    def label_sets(self) -> LabelSets:
        """Return the labels of each tile's objects, crowds left out."""
        labels = [found.labels[~found.crowd] for found in map(self.objects, range(len(self)))]
        images = np.repeat(np.arange(len(self)), [len(part) for part in labels])
        return LabelSets.from_pairs(images, np.concatenate([np.zeros(0, np.int64), *labels]), len(self))


def cut_boxes(boxes: Array, tile: Rectangle) -> tuple[Array, Array]:
    """Cut boxes `(N, 4)` (left, top, width, height) at the border of a tile.

    Returns:
        Boxes in pixels of the tile, and the share of each box's area that is left, `(N,)`; 0 for boxes without area.
    """
    low = np.maximum(boxes[:, :2], [tile.left, tile.top])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], [tile.right, tile.bottom])
    sides = np.maximum(high - low, 0)
    areas = boxes[:, 2] * boxes[:, 3]
    visible = np.divide(sides.prod(axis=1), areas, out=np.zeros(len(boxes)), where=areas > 0)
    return np.concatenate([low - [tile.left, tile.top], sides], axis=1), visible


def lay_tiles(region: Rectangle, tile_size: int, overlap: int) -> Iterator[Rectangle]:
    """Yield the fewest tiles of at most `tile_size` pixels a side that cover a region; equal, up to a pixel.

    Neighbours share `overlap` pixels; with 0 each pixel is on one tile.

    Raises:
        ValueError: `overlap` is negative or not less than `tile_size`.
    """
    if not 0 <= overlap < tile_size:
        raise ValueError(
            f"lay_tiles: overlap={overlap}, expected 0 to {tile_size - 1} for tiles of {tile_size} pixels."
        )
    rows = list(_lay_along(region.top, region.bottom, tile_size, overlap))
    for left, right in _lay_along(region.left, region.right, tile_size, overlap):
        yield from (Rectangle(left, top, right, bottom) for top, bottom in rows)


def _lay_along(start: int, stop: int, tile_size: int, overlap: int) -> Iterator[tuple[int, int]]:
    length = stop - start - overlap
    count = max(math.ceil(length / (tile_size - overlap)), 1)
    for number in range(count):
        yield start + number * length // count, min(start + (number + 1) * length // count + overlap, stop)


def _cut_mask(bitmap: Array, tile: Rectangle) -> RunLengths:
    return rle.encode(bitmap[tile.top : tile.bottom, tile.left : tile.right])
