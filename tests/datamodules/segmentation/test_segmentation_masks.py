import io

import numpy as np
import pytest
from PIL import Image

from datamodules.segmentation.masks import label_table, mask_size, read_mask
from datamodules.segmentation.records import IGNORE


def stored(values, palette=False):
    image = Image.fromarray(np.asarray(values))
    if palette:
        image.putpalette([255 - number // 3 for number in range(768)])
    content = io.BytesIO()
    image.save(content, "tiff" if image.mode == "I" else "png")
    return content.getvalue()


VALUES = np.array([[0, 1, 2], [3, 255, 0]], dtype=np.uint8)


class TestLabelTable:
    def test_a_value_is_its_label(self):
        table = label_table(4)
        assert table[VALUES].tolist() == VALUES.tolist()
        assert (table[4:255] < 0).all()

    def test_zero_is_reduced_as_mmseg_does(self):
        reduced = label_table(3, reduce_zero_label=True)[VALUES]
        # mmseg: 0 becomes 255, one is subtracted, 254 becomes 255.
        expected = np.where(VALUES == 0, 255, VALUES).astype(np.uint8) - np.uint8(1)
        expected[expected == 254] = 255
        assert reduced.tolist() == expected.tolist() == [[255, 0, 1], [2, 255, 255]]

    def test_150_reduced_classes_end_at_value_150(self):
        table = label_table(150, reduce_zero_label=True)
        assert (table[0], table[1], table[150], table[255]) == (IGNORE, 0, 149, IGNORE)
        assert (table[151:255] < 0).all()

    def test_listed_values_become_labels_and_others_are_ignored(self):
        assert label_table(2, class_ids=((3, 1), (2,)))[VALUES].tolist() == [[255, 0, 1], [0, 255, 255]]

    def test_another_value_can_be_ignored(self):
        assert label_table(3, ignore_value=3)[VALUES].tolist() == [[0, 1, 2], [255, 255, 0]]
        assert label_table(4, ignore_value=0)[VALUES].tolist() == [[255, 1, 2], [3, 255, 255]]


class TestReadMask:
    @pytest.mark.parametrize("values", [VALUES, VALUES.astype(np.uint16), VALUES.astype(np.int32)])
    def test_grey_images_of_any_depth(self, values):
        labels = read_mask(stored(values), label_table(4), "mask")
        assert labels.dtype == np.uint8
        assert labels.tolist() == VALUES.tolist()

    def test_the_numbers_of_a_palette_count_not_its_colours(self):
        assert read_mask(stored(VALUES, palette=True), label_table(4), "mask").tolist() == VALUES.tolist()

    def test_bits(self):
        values = np.array([[True, False], [False, True]])
        assert read_mask(stored(values), label_table(2), "mask").tolist() == [[1, 0], [0, 1]]

    def test_files(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(stored(VALUES))
        assert read_mask(path, label_table(4), str(path)).tolist() == VALUES.tolist()
        assert mask_size(path) == mask_size(path.read_bytes()) == (2, 3)

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            (
                VALUES,
                {"num_classes": 3},
                r"mask m.png has the value 3 at 1 pixels, expected 0 to 2 for 3 classes, or 255",
            ),
            (VALUES, {"num_classes": 1}, r"has the value 1, 2, 3 at 3 pixels, expected 0 to 0 for 1 classes"),
            (
                VALUES,
                {"num_classes": 2, "reduce_zero_label": True},
                r"value 3 .* expected 1 to 2 for 2 classes, or 0, 255",
            ),
            (np.array([[0, 300]], np.uint16), {"num_classes": 4}, r"has the value 300 at 1 pixels, expected 0 to 3"),
            (
                np.zeros((2, 3, 3), np.uint8),
                {"num_classes": 4},
                r"mask m.png is an image of mode RGB, expected one channel",
            ),
            (np.zeros((2, 3, 4), np.uint8), {"num_classes": 4}, r"is an image of mode RGBA, expected one channel"),
        ],
    )
    def test_what_means_nothing_is_an_error_with_the_name_and_the_value(self, values, options, message):
        with pytest.raises(ValueError, match=message):
            read_mask(stored(values), label_table(**options), "m.png")

    def test_a_broken_file_is_an_error_with_its_name(self):
        with pytest.raises(ValueError, match=r"mask m.png cannot be read: .* Repair it"):
            read_mask(stored(np.tile(VALUES, (50, 50)))[:-60], label_table(4), "m.png")
