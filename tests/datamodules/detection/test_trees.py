import importlib.util
from xml.etree import ElementTree

import numpy as np
import pytest

from datamodules.detection import rle
from datamodules.detection.records import Objects
from datamodules.detection.synthetic import Shapes
from datamodules.detection.tiles import Rectangle, TiledSource, cut_boxes, lay_tiles
from datamodules.detection.trees import HELD_OUT_ROWS, DeepForestTrees, find_folder, open_photographs

needs_deepforest = pytest.mark.skipif(
    importlib.util.find_spec("deepforest") is None, reason="deepforest is not installed"
)


class TestTiles:
    @pytest.mark.parametrize("overlap", [0, 3, 9])
    @pytest.mark.parametrize("region", [(5, 7, 105, 47), (0, 0, 8, 30), (0, 0, 21, 10), (2, 2, 3, 3)])
    def test_they_cover_a_region_evenly_with_the_given_overlap(self, region, overlap):
        left, top, right, bottom = region
        tiles = list(lay_tiles(Rectangle(*region), 10, overlap))
        covered = np.zeros((60, 120), int)
        for tile in tiles:
            covered[tile.top : tile.bottom, tile.left : tile.right] += 1
        outside = covered.copy()
        outside[top:bottom, left:right] = 0
        assert not outside.any()
        assert (covered[top:bottom, left:right] >= 1).all()
        if overlap == 0:
            assert covered.max() == 1
        for low, high in (("left", "right"), ("top", "bottom")):
            spans = sorted({(getattr(tile, low), getattr(tile, high)) for tile in tiles})
            sides = [end - start for start, end in spans]
            assert max(sides) <= 10
            assert max(sides) - min(sides) <= 1
            assert all(spans[i][1] - spans[i + 1][0] == overlap for i in range(len(spans) - 1))

    def test_an_overlap_as_large_as_the_tile_is_an_error(self):
        with pytest.raises(ValueError, match=r"overlap=10, expected 0 to 9 for tiles of 10 pixels"):
            list(lay_tiles(Rectangle(0, 0, 50, 50), 10, 10))

    def test_boxes_are_cut_and_know_how_much_is_left(self):
        boxes = np.array([[12.0, 22, 4, 4], [5, 15, 10, 10], [18, 28, 4, 4], [50, 50, 5, 5], [11, 21, 0, 3]])
        cut, visible = cut_boxes(boxes, Rectangle(10, 20, 20, 30))
        assert visible.tolist() == [1.0, 0.25, 0.25, 0.0, 0.0]
        assert cut[:3].tolist() == [[2, 2, 4, 4], [0, 0, 5, 5], [8, 8, 2, 2]]

    def test_a_tile_shows_its_part_of_image_boxes_and_masks(self):
        whole = Shapes(4, 3, 96)
        tiles = [(index, tile) for index in (2, 0) for tile in lay_tiles(Rectangle(0, 0, 96, 72), 40, 0)]
        source = TiledSource(whole, tiles, num_cached=1)
        assert len(source) == 12
        area = np.zeros(4)
        for index, (number, tile) in enumerate(tiles):
            columns = (slice(tile.top, tile.bottom), slice(tile.left, tile.right))
            assert np.array_equal(np.asarray(source.read(index)), np.asarray(whole.read(number))[columns])
            assert source.size(index) == (tile.bottom - tile.top, tile.right - tile.left)
            found, expected = source.objects(index), whole.objects(number)
            kept = cut_boxes(expected.boxes, tile)[1] > 0
            bitmaps = [rle.decode(mask)[columns] for mask in expected.select(kept).masks]
            assert [rle.decode(mask).tolist() for mask in found.masks] == [bitmap.tolist() for bitmap in bitmaps]
            assert found.areas.tolist() == [bitmap.sum() for bitmap in bitmaps]
            area[number] += found.areas.sum()
        # The tiles do not overlap, so nothing is lost or counted twice.
        assert area[2] == whole.objects(2).areas.sum()
        assert area[0] == whole.objects(0).areas.sum()
        assert len({source.image_id(index) for index in range(12)}) == 12

    def test_small_pieces_are_crowds(self):
        class OneBox(Shapes):
            def objects(self, index):
                box = np.array([[30.0, 10, 20, 20]])
                return Objects(box, np.array([1]), np.array([400.0]), np.array([False]))

        tiles = [(0, Rectangle(0, 0, 35, 72)), (0, Rectangle(35, 0, 96, 72))]
        source = TiledSource(OneBox(1, 3, 96, masks=False), tiles, min_visible=0.5)
        assert [source.objects(index).crowd.tolist() for index in range(2)] == [[True], [False]]
        assert [source.objects(index).areas.tolist() for index in range(2)] == [[100.0], [300.0]]
        assert [source.label_sets()[index].tolist() for index in range(2)] == [[], [1]]


@needs_deepforest
class TestDeepForestTrees:
    def test_all_annotated_trees_are_there(self):
        photographs = open_photographs(find_folder())
        expected = [
            len(ElementTree.parse(find_folder() / f"{name}.xml").getroot().findall("object")) for name in HELD_OUT_ROWS
        ]
        assert [len(photographs.objects(index)) for index in range(4)] == expected == [574, 279, 61, 37]
        assert [photographs.read(index).size for index in (1, 3)] == [(1249, 1035), (400, 400)]
        assert photographs.size(1) == (1035, 1249)
        boxes = photographs.objects(1).boxes
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= [1249, 1035]).all()

    def test_no_pixel_is_in_both_splits_and_every_pixel_is_in_one(self):
        datamodule = DeepForestTrees()
        photographs = open_photographs(find_folder())
        seen = {split: [np.zeros(photographs.size(index), int) for index in range(4)] for split in ("train", "val")}
        for split, pages in seen.items():
            source = datamodule.open_split(split)
            for number, tile in source.tiles:
                pages[number][tile.top : tile.bottom, tile.left : tile.right] += 1
                assert max(tile.bottom - tile.top, tile.right - tile.left) <= 400
        for train, val in zip(seen["train"], seen["val"], strict=True):
            assert not ((train > 0) & (val > 0)).any()
            assert ((train > 0) | (val > 0)).all()
            assert val.max() <= 1
        assert [bool(page.any()) for page in seen["val"]] == [True, True, False, False]

    def test_held_out_trees_are_the_annotated_ones(self):
        source = DeepForestTrees().open_split("val")
        photographs = open_photographs(find_folder())
        # A tree inside the held-out rows counts on the tile that shows half of it; if four tiles share it, on none.
        whole = sum(
            int((photographs.objects(index).boxes[:, 1] >= photographs.size(index)[0] - rows).sum())
            for index, rows in enumerate(HELD_OUT_ROWS.values())
            if rows
        )
        counted = sum(int((~source.objects(index).crowd).sum()) for index in range(len(source)))
        assert 0.95 * whole <= counted <= 1.05 * whole
        assert source.categories.names == ("Tree",)
        assert len(source) == 16

    def test_every_training_box_lies_in_its_tile(self):
        source = DeepForestTrees().open_split("train")
        for index in range(len(source)):
            height, width = source.size(index)
            boxes = source.objects(index).boxes
            assert (boxes[:, :2] >= 0).all()
            assert (boxes[:, :2] + boxes[:, 2:] <= [width, height]).all()
            assert (boxes[:, 2:] >= 1).all()


def test_without_the_package_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps deepforest"):
        DeepForestTrees().open_split("val")
    with pytest.raises(FileNotFoundError, match=r"image_crop2.png does not exist"):
        DeepForestTrees(tmp_path).open_split("val")
