import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from datamodules.detection.tiles import Rectangle
from datamodules.segmentation.nuclei import NucleiTiles, StarDistNuclei, between, find_folder, quadrants_of

needs_stardist = pytest.mark.skipif(importlib.util.find_spec("stardist") is None, reason="stardist is not installed")


@pytest.fixture
def folder(tmp_path):
    """An image of 64 x 80 pixels with two nuclei that touch, one alone in each other quadrant."""
    nuclei = np.zeros((64, 80), np.uint16)
    nuclei[4:14, 4:14], nuclei[4:14, 14:24] = 1, 2
    nuclei[5:15, 50:60], nuclei[40:50, 6:16], nuclei[44:60, 60:70] = 3, 4, 900
    grey = np.random.default_rng(0).integers(10, 30, nuclei.shape) + 100 * (nuclei > 0)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "img2d.tif")
    Image.fromarray(nuclei).save(tmp_path / "mask2d.tif")
    return tmp_path, nuclei


def test_three_quadrants_train_and_the_fourth_validates():
    seen = np.zeros((64, 80), int)
    for split, mark in (("train", 1), ("val", 10)):
        for part in quadrants_of(split, (64, 80)):
            seen[part.top : part.bottom, part.left : part.right] += mark
    assert (seen[32:, 40:] == 10).all()
    seen[32:, 40:] = 1
    assert (seen == 1).all()


def test_masks_and_instances_are_the_nuclei_of_the_tile(folder):
    root, nuclei = folder
    train, val = (StarDistNuclei(root).open_split(split) for split in ("train", "val"))
    assert [train.image_id(index) for index in range(3)] == ["nuclei_0_0", "nuclei_40_0", "nuclei_0_32"]
    assert np.array_equal(val.mask(0), nuclei[32:, 40:] > 0)
    assert np.array_equal(val.instances(0), nuclei[32:, 40:])
    assert np.array_equal(train.mask(1), nuclei[:32, 40:] > 0)
    assert train.read(0).size == (40, 32)
    assert val.name(0) == "img2d.tif[40:80, 32:64]"
    grey = np.asarray(val.read(0))[..., 0]
    assert grey[val.mask(0) == 1].min() > 180 > 60 > grey[val.mask(0) == 0].max()
    assert train.classes.names == ("background", "nucleus")


def test_small_tiles_cover_the_training_quadrants(folder):
    root, nuclei = folder
    source = StarDistNuclei(root, tile_size=16).open_split("train")
    assert len(source) == 3 * 2 * 3
    assert sum(int(source.mask(index).sum()) for index in range(len(source))) == (nuclei > 0).sum() - 160
    assert len(StarDistNuclei(root, tile_size=16).open_split("val")) == 1


@pytest.mark.parametrize("distance", [1, 3])
def test_the_border_lies_where_two_nuclei_are_near(distance):
    random = np.random.default_rng(1)
    nuclei = np.zeros((40, 50), int)
    for number in range(1, 12):
        top, left = random.integers(0, 34), random.integers(0, 44)
        nuclei[top : top + 6, left : left + 6] = number

    def several(window):
        return len(set(window[window > 0])) > 1

    expected = ndimage.generic_filter(nuclei, several, size=2 * distance + 1, mode="constant", cval=0)
    assert np.array_equal(between(nuclei, distance), expected.astype(bool))
    assert expected.any()


def test_the_border_is_a_third_class(folder):
    root, _ = folder
    datamodule = StarDistNuclei(root, border=1)
    source = datamodule.open_split("train")
    assert datamodule.num_classes == 3
    assert source.classes.names == ("background", "nucleus", "border")
    # The two columns on either side of the line, a pixel more above and below.
    assert np.array_equal(np.argwhere(source.mask(0) == 2), [(y, x) for y in range(3, 15) for x in (13, 14)])
    assert datamodule.open_split("val").mask(0).max() == 1


def test_the_datamodule_yields_batches(folder):
    datamodule = StarDistNuclei(folder[0], crops_per_image=4, batch_size=4, num_workers=0)
    datamodule.setup("fit")
    batches = list(datamodule.train_dataloader())
    assert len(batches) == 3
    assert batches[0]["image"].shape == (4, 3, 192, 192)
    assert set(torch.cat([batch["mask"] for batch in batches]).unique().tolist()) == {0, 1, 255}
    (val,) = datamodule.val_dataloader()
    assert val["truth"][0].shape == (32, 40)
    assert datamodule.class_names == ["background", "nucleus"]


def test_missing_files_and_packages_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps stardist"):
        StarDistNuclei().open_split("val")
    with pytest.raises(FileNotFoundError, match=r"img2d.tif does not exist"):
        StarDistNuclei(tmp_path).open_split("val")
    with pytest.raises(ValueError, match=r"border=-1, expected at least 0"):
        StarDistNuclei(tmp_path, border=-1)


@needs_stardist
def test_the_package_has_125_nuclei():
    train, val = (StarDistNuclei().open_split(split) for split in ("train", "val"))
    numbers = [set(np.unique(source.instances(index))) - {0} for source in (train, val) for index in range(len(source))]
    assert [len(found) for found in numbers] == [35, 33, 40, 29]
    assert len(set.union(*numbers)) == 125
    assert find_folder().name == "images"
    assert isinstance(val, NucleiTiles)
    assert quadrants_of("val", (512, 512)) == [Rectangle(256, 256, 512, 512)]
    # The nuclei are bright.
    grey, mask = np.asarray(val.read(0))[..., 0], val.mask(0)
    assert grey[mask == 1].mean() > 2 * grey[mask == 0].mean()
