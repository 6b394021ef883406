"""The nuclei of stardist's image as objects with masks."""

import numpy as np
import pytest
from PIL import Image

from datamodules import StarDistInstances
from datamodules.detection import rle
from datamodules.detection.nuclei import NucleiImage
from datamodules.segmentation.nuclei import find_folder, read_images


@pytest.fixture
def folder(tmp_path):
    """An image of 8 x 8 with three nuclei, one across the middle."""
    nuclei = np.zeros((8, 8), np.uint16)
    nuclei[0:2, 0:3], nuclei[3:5, 3:6], nuclei[6:8, 5:8] = 4, 7, 2
    Image.fromarray((nuclei > 0).astype(np.uint8) * 200).save(tmp_path / "img2d.tif")
    Image.fromarray(nuclei).save(tmp_path / "mask2d.tif")
    return tmp_path


def test_each_number_is_an_object_with_its_box_and_mask(folder):
    image, nuclei = read_images(folder)
    found = NucleiImage(image, nuclei).objects(0)
    assert found.boxes.tolist() == [[5, 6, 3, 2], [0, 0, 3, 2], [3, 3, 3, 2]]  # by number: 2, 4, 7
    assert found.areas.tolist() == [6, 6, 6]
    for mask, number in zip(found.masks, (2, 4, 7), strict=True):
        assert np.array_equal(rle.decode(mask), nuclei == number)


def test_a_nucleus_on_the_line_between_quadrants_is_cut_and_small_pieces_are_crowds(folder):
    held_out = StarDistInstances(folder, num_workers=0).open_split("val")
    (found,) = [held_out.objects(index) for index in range(len(held_out))]
    # The quadrant is [4:8, 4:8]: of nucleus 7, two of six pixels lie in it.
    assert found.boxes.tolist() == [[1, 2, 3, 2], [0, 0, 2, 1]]
    assert found.crowd.tolist() == [False, True]
    assert [rle.area(mask) for mask in found.masks] == [6, 2]


def test_the_installed_image_has_125_nuclei():
    datamodule = StarDistInstances(num_workers=0, batch_size=3)
    datamodule.setup("fit")
    assert len(NucleiImage(*read_images(find_folder())).objects(0)) == 125
    batch = next(iter(datamodule.train_dataloader()))
    for target in batch["target"]:
        assert target["masks"].shape[0] == len(target["boxes"]) > 10
