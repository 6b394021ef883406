import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import EvalTransform, ImageFolders
from datamodules.dataset import CorruptImagesError
from datamodules.sources import to_rgb


def folders(root, **options):
    datamodule = ImageFolders(root, num_classes=3, image_size=24, batch_size=4, **{"num_workers": 0, **options})
    datamodule.setup("fit")
    return datamodule


@pytest.fixture
def two_corrupt(class_folders):
    """24 training images, of which one is cut short and one is no image."""
    cut, text = class_folders / "train" / "cat" / "003.jpg", class_folders / "train" / "owl" / "001.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    text.write_text("not an image")
    return class_folders, {str(cut), str(text)}


@pytest.mark.filterwarnings("ignore:.*is unreadable")
def test_corrupt_images_are_replaced_the_same_way_and_counted(two_corrupt):
    root, corrupt = two_corrupt
    expected = None
    for num_workers in (0, 2):
        datamodule = folders(root, num_workers=num_workers, max_corrupt_share=0.1)
        batches = list(datamodule.train_dataloader())
        assert [len(batch["label"]) for batch in batches] == [4] * 6
        assert set(datamodule.corrupt_images["train"]) == corrupt
        assert datamodule.corrupt_images["val"] == []
        if expected is not None:
            assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches, expected, strict=True))
            assert all(torch.equal(a["label"], b["label"]) for a, b in zip(batches, expected, strict=True))
        expected = batches
        with pytest.warns(UserWarning, match=r"2 of 24 train images are unreadable.*003.jpg"):
            datamodule.teardown("fit")


@pytest.mark.filterwarnings("ignore:.*is unreadable")
def test_a_replacement_is_another_image_with_its_own_label(two_corrupt):
    root, _ = two_corrupt
    datamodule = folders(root, max_corrupt_share=0.1)
    dataset = datamodule.train_dataloader().dataset
    labels = {dataset[epoch, 3]["label"] for epoch in range(30)}  # index 3 is cat/003.jpg, of label 0
    assert labels == {0, 1, 2}


def test_the_first_corrupt_images_are_warned_of_at_once(two_corrupt):
    root, _ = two_corrupt
    dataset = folders(root, max_corrupt_share=0.1).train_dataloader().dataset
    with pytest.warns(UserWarning, match=r"cat/003.jpg is unreadable \(.*[Tt]runcated"):
        dataset[0, 3]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*is unreadable")
def test_past_the_stated_share_it_is_an_error_with_counts_and_paths(two_corrupt, num_workers):
    root, _ = two_corrupt
    with pytest.raises(CorruptImagesError, match=r"(?s)2 of 24 images .*003\.jpg.*max_corrupt_share=0\.05.*repair"):
        list(folders(root, max_corrupt_share=0.05, num_workers=num_workers).train_dataloader())
    with pytest.raises(CorruptImagesError, match="1 of 24"):
        list(folders(root, max_corrupt_share=0.0, num_workers=num_workers).train_dataloader())


@pytest.mark.filterwarnings("ignore:.*is unreadable")
def test_a_lost_mount_stops_at_once(class_folders):
    datamodule = folders(class_folders, max_corrupt_share=1.0)
    for image in (class_folders / "train").glob("*/*.jpg"):
        image.unlink()
    with pytest.raises(CorruptImagesError, match=r"10 images in a row .*Check the path, the mount"):
        next(iter(datamodule.train_dataloader()))


def test_an_image_that_pad_cannot_take_is_named(class_folders):
    datamodule = folders(class_folders, eval_transform=EvalTransform(fit="pad"))
    with pytest.raises(ValueError, match=r"val/cat/000.jpg: image of 45 x 60 pixels does not fit into image_size=24"):
        next(iter(datamodule.val_dataloader()))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path)
    with Image.open(path) as opened:
        rgb = np.asarray(to_rgb(opened)).astype(int)
    assert rgb.shape == (8, 8, 3)
    if mode != "1":
        # A web palette has 51 levels between its greys; the other modes keep 8 bits, CMYK to within rounding.
        assert np.abs(rgb - grey[:, :, None]).max() <= {"P": 51, "CMYK": 1}.get(mode, 0)
