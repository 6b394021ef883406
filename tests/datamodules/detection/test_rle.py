import numpy as np
import pytest
from pycocotools import mask as coco

from datamodules.detection import rle
from datamodules.detection.masks import MaskRows

HEIGHT, WIDTH = 37, 53


@pytest.fixture
def bitmap():
    coarse = np.random.default_rng(0).random((6, 8)) > 0.5
    return np.kron(coarse, np.ones((7, 7), bool))[:HEIGHT, :WIDTH]


def runs_of(bitmap):
    """Run lengths by definition: column by column, outside first."""
    pixels = bitmap.T.reshape(-1)
    changes = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff([0, *changes, len(pixels)]).tolist()
    return [0, *runs] if pixels[0] else runs


def test_encoding_is_pycocotools_bytes_and_decoding_undoes_it(bitmap):
    mask = rle.encode(bitmap)
    assert mask == coco.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    decoded = rle.decode(mask)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert np.array_equal(decoded, bitmap)
    assert rle.area(mask) == bitmap.sum()


def test_runs_are_those_of_the_definition_in_every_form(bitmap):
    for pixels in (bitmap, ~bitmap, np.zeros_like(bitmap), np.ones_like(bitmap)):
        runs, mask = runs_of(pixels), rle.encode(pixels)
        assert rle.decompressed(mask["counts"]) == runs
        for counts in (runs, mask["counts"], mask["counts"].decode()):
            assert rle.from_counts(counts, HEIGHT, WIDTH) == mask


def test_polygons_are_rasterised_and_joined_as_by_pycocotools():
    random = np.random.default_rng(1)
    for _ in range(20):
        # Past the border too.
        polygons = [random.uniform(-8, 60, 2 * count).round(2).tolist() for count in (3, 4, 9)]
        expected = coco.merge(coco.frPyObjects(polygons, HEIGHT, WIDTH))
        assert rle.from_polygons(polygons, HEIGHT, WIDTH) == expected
        assert rle.from_polygons([np.array(polygons[0])], HEIGHT, WIDTH) == coco.merge(
            coco.frPyObjects(polygons[:1], HEIGHT, WIDTH)
        )


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ([3, 4, 20], r"27 pixels, expected 5 x 7 = 35"),
        ([3, 40], r"43 pixels"),
        ([40, -5], r"a negative run"),
        (rle.encode(np.ones((5, 6), bool))["counts"], r"30 pixels"),
        (b"P", r"end within a number"),
        ("\x01", r"the character"),
    ],
)
def test_run_lengths_that_do_not_fit_are_an_error(counts, problem):
    with pytest.raises(ValueError, match=problem):
        rle.from_counts(counts, 5, 7)


class TestMaskRows:
    def test_each_form_comes_back_as_run_lengths(self, bitmap):
        polygon = [1.5, 2.0, 30.25, 4.0, 20.0, 33.0]
        second = [40.0, 2.0, 50.0, 2.0, 50.0, 12.0, 40.0, 12.0]
        mask = rle.encode(bitmap)
        rows = MaskRows()
        for segmentation in (
            [polygon],
            {"size": [HEIGHT, WIDTH], "counts": runs_of(bitmap)},
            None,
            [polygon, second],
            {"size": [HEIGHT, WIDTH], "counts": mask["counts"].decode()},
        ):
            assert rows.append(segmentation) is None
        assert rows.absent().tolist() == [False, False, True, False, False]
        assert rows.sizes().tolist() == [[0, 0], [HEIGHT, WIDTH], [0, 0], [0, 0], [HEIGHT, WIDTH]]
        read = [rows.read(row, (HEIGHT, WIDTH)) for row in (0, 1, 3, 4)]
        assert read[1] == read[3] == mask
        assert read[0] == coco.merge(coco.frPyObjects([polygon], HEIGHT, WIDTH))
        assert read[2] == coco.merge(coco.frPyObjects([polygon, second], HEIGHT, WIDTH))

    def test_what_is_no_mask_is_refused_with_its_reason_and_not_added(self):
        rows = MaskRows()
        assert "three points" in rows.append([[1.0, 2.0, 3.0, 4.0]])
        assert "not lists of finite numbers" in rows.append([["a", "b"] * 3])
        assert "not lists of finite numbers" in rows.append([5.0])
        for broken in ({"size": [5, 7], "counts": [3]}, {"counts": [35]}, {"size": [5], "counts": [5]}):
            assert "run lengths" in rows.append(broken)
        assert rows.append([[0.0, 0.0, 4.0, 0.0, 4.0, 4.0], [1.0, 2.0]]) is None  # one polygon of two is good
        assert len(rows.absent()) == 1
        assert rows.read(0, (5, 7)) == rle.from_polygons([[0.0, 0.0, 4.0, 0.0, 4.0, 4.0]], 5, 7)
