import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
import webdataset

from datamodules.detection import shard_index
from datamodules.detection.records import Categories, Objects
from datamodules.detection.shards import DetectionShards, ShardSource, write_shards
from datamodules.detection.synthetic import SMALL_EVAL, SMALL_TRAIN, Shapes, SyntheticDetection


class Changed(Shapes):
    """Shapes with everything that objects can have, some of it unfit for training, and one image as a file."""

    file = None

    def objects(self, index):
        found = super().objects(index)
        if index != 1:
            return found
        return Objects(
            np.array([[2.0, 3.0, 0.1 + 0.2, 9.0], [1.0, 1.0, 8.0, 8.0]]),
            np.array([0, 2]),
            np.array([5.0, 1 / 3]),
            np.array([False, True]),
            super().objects(3).masks[:1] * 2,
            negative=[1],
            not_exhaustive=[0, 2],
        )

    def image_id(self, index):
        return f"odd.name/{index}"

    def name(self, index):
        return str(self.file) if index == 3 else super().name(index)


@pytest.fixture
def source(tmp_path):
    source = Changed(10, 3, 64)
    source.file = tmp_path / "photograph.jpg"
    source.read(3).save(source.file, quality=50)
    source.categories = Categories(("a", "b", "c"), (4, 7, 9), ("r", "c", "f"))
    return source


@pytest.fixture
def folder(source, tmp_path):
    write_shards(source, tmp_path / "shards", images_per_shard=4)
    return tmp_path / "shards"


def assert_same(found, expected):
    for part in ("boxes", "labels", "areas", "crowd"):
        assert np.array_equal(getattr(found, part), getattr(expected, part))
        assert getattr(found, part).dtype == getattr(expected, part).dtype
    for part in ("masks", "negative", "not_exhaustive"):
        assert getattr(found, part) == getattr(expected, part)


def test_shards_give_back_the_source(source, folder):
    shards = ShardSource(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "categories.json",
        "index.npz",
        *(f"shard-00000{number}.tar" for number in range(3)),
    ]
    assert len(shards) == len(source)
    assert shards.categories == source.categories
    assert shards.has_masks
    for index in (9, 0, 4, 1, 3, 7):  # in any order
        assert shards.image_id(index) == source.image_id(index)
        assert shards.size(index) == source.size(index)
        assert_same(shards.objects(index), source.objects(index))
        if index != 3:
            assert np.array_equal(np.asarray(shards.read(index)), np.asarray(source.read(index)))
    sets, expected = shards.label_sets(), [source.objects(index) for index in range(10)]
    assert [set(sets[index]) for index in range(10)] == [set(found.labels[~found.crowd]) for found in expected]


def test_odd_objects_survive_and_training_leaves_out_the_unfit(source, folder):
    found = ShardSource(folder).objects(1)
    assert found.boxes[0, 2] == 0.1 + 0.2  # to the last bit
    assert (found.crowd.tolist(), found.areas.tolist()) == ([False, True], [5.0, 1 / 3])
    assert (found.negative, found.not_exhaustive) == ([1], [0, 2])
    with pytest.warns(UserWarning, match="left out objects outside .* than a pixel: 1"):
        training = ShardSource(folder, training=True, masks=False)
    assert training.objects(1).boxes.tolist() == [[1.0, 1.0, 8.0, 8.0]]
    assert training.objects(1).masks is None
    assert training.label_sets()[1].tolist() == []
    assert ShardSource(folder).label_sets()[1].tolist() == [0]


def test_image_files_are_copied_byte_for_byte(source, folder):
    with tarfile.open(folder / "shard-000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000000.png", "000000000.json"]
        assert tar.extractfile("000000003.jpg").read() == source.file.read_bytes()


def test_webdataset_reads_the_shards(source, folder):
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [sample["json"]["image_id"] for sample in samples] == [source.image_id(index) for index in range(10)]
    assert [sample["__key__"] for sample in samples] == [f"{index:09}" for index in range(10)]
    assert np.array_equal(np.asarray(samples[5]["png"]), np.asarray(source.read(5)))
    assert samples[5]["json"]["boxes"] == source.objects(5).boxes.tolist()


def test_the_same_data_gives_the_same_bytes(source, folder, tmp_path):
    write_shards(source, tmp_path / "again", images_per_shard=4)
    for path in folder.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


class TestIndex:
    def test_it_is_used_while_the_shards_stay_the_same(self, folder, monkeypatch):
        monkeypatch.setattr(shard_index, "_make_index", lambda shards: pytest.fail("made again"))
        assert len(ShardSource(folder)) == 10

    @pytest.mark.parametrize("damage", ["missing", "broken", "stale"])
    def test_it_is_made_again_otherwise(self, folder, damage):
        before = ShardSource(folder)
        index = folder / "index.npz"
        if damage == "missing":
            index.unlink()
        elif damage == "broken":
            index.write_bytes(index.read_bytes()[:100])
        else:
            # One shard is replaced by another of the same size in bytes.
            shards = sorted(folder.glob("*.tar"))
            content, state = shards[0].read_bytes(), shards[0].stat()
            with_other_ids = content.replace(b"odd.name", b"new.name")
            shards[0].write_bytes(with_other_ids)
            os.utime(shards[0], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        after = ShardSource(folder)
        expected = "new.name/2" if damage == "stale" else "odd.name/2"
        assert after.image_id(2) == expected
        assert_same(after.objects(9), before.objects(9))
        with np.load(index) as kept:
            assert kept["image_ids"][2] == expected

    def test_a_source_reaches_worker_processes_whole(self, folder):
        source = ShardSource(folder)
        copy = pickle.loads(pickle.dumps(source))
        assert_same(copy.objects(6), source.objects(6))


def test_shards_that_tar_has_made_are_read_too(source, folder, tmp_path):
    """`tar cf x.tar ./*` puts a folder before each name."""
    shard, unpacked = folder / "shard-000000.tar", tmp_path / "unpacked"
    with tarfile.open(shard) as tar:
        tar.extractall(unpacked, filter="data")
    with tarfile.open(shard, "w") as tar:
        for path in sorted(unpacked.iterdir()):
            tar.add(path, f"./{path.name}")
    shards = ShardSource(folder)
    for index in range(3):
        assert_same(shards.objects(index), source.objects(index))
        assert np.array_equal(np.asarray(shards.read(index)), np.asarray(source.read(index)))


class TestErrors:
    def test_a_folder_without_shards_or_with_some_already(self, source, folder, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no \*.tar"):
            ShardSource(tmp_path / "nowhere")
        with pytest.raises(FileExistsError, match=r"has shards \(shard-000000.tar"):
            write_shards(source, folder)
        with pytest.raises(ValueError, match=r"images_per_shard=0, expected at least 1"):
            write_shards(source, tmp_path / "other", images_per_shard=0)

    def test_a_shard_that_is_cut_short(self, folder):
        shard = folder / "shard-000001.tar"
        with tarfile.open(shard) as tar:
            last = tar.getmembers()[-1]
        shard.write_bytes(shard.read_bytes()[: last.offset_data + 5])
        with pytest.raises(ValueError, match=r"shard-000001.tar is broken: unexpected end of data"):
            ShardSource(folder)

    def test_a_sample_without_a_part(self, folder, tmp_path):
        shard = folder / "shard-000002.tar"
        (tmp_path / "x").mkdir()
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path / "x", filter="data")

        def rewrite(name):
            with tarfile.open(shard, "w") as tar:
                tar.add(tmp_path / "x" / name, name)
                tar.add(tmp_path / "x" / "000000008.png", "000000008.png")

        rewrite("000000009.json")
        with pytest.raises(ValueError, match=r"sample 000000009 has no image"):
            ShardSource(folder)
        content = json.loads((tmp_path / "x" / "000000008.json").read_text())
        count = len(content["areas"])
        content["masks"].pop()
        (tmp_path / "x" / "000000008.json").write_text(json.dumps(content))
        rewrite("000000008.json")
        with pytest.raises(ValueError, match=rf"different lengths: .* {count} crowd, {count - 1} masks"):
            ShardSource(folder)
        del content["areas"]
        (tmp_path / "x" / "000000008.json").write_text(json.dumps(content))
        rewrite("000000008.json")
        with pytest.raises(ValueError, match=r"shard-000002.tar/000000008.json: KeyError 'areas'"):
            ShardSource(folder)

    def test_categories_that_are_missing_or_too_few(self, folder):
        categories = folder / "categories.json"
        categories.write_text(json.dumps({"names": ["a"], "ids": [1], "frequency": None}))
        with pytest.raises(ValueError, match=r"has an object of label 2 and 1 categories"):
            ShardSource(folder)
        categories.write_text("{}")
        with pytest.raises(ValueError, match=r"KeyError 'frequency'; expected `names`, `ids` and `frequency`"):
            ShardSource(folder)
        categories.unlink()
        with pytest.raises(FileNotFoundError, match=r"categories.json does not exist"):
            ShardSource(folder)


def test_batches_are_those_of_the_source(tmp_path):
    """Order, grouping, random changes and truth: nothing depends on where the images come from."""
    options = {"num_workers": 0, "batch_size": 3, "train_transform": SMALL_TRAIN, "eval_transform": SMALL_EVAL}
    expected = SyntheticDetection(num_classes=3, image_size=128, num_samples=16, num_val_samples=5, **options)
    for split in ("train", "val"):
        write_shards(expected.open_split(split), tmp_path / split, images_per_shard=6)
    found = DetectionShards(tmp_path / "train", tmp_path / "val", num_classes=3, **options)
    for datamodule in (found, expected):
        datamodule.setup("fit")
    pairs = list(zip(found.train_dataloader(), expected.train_dataloader(), strict=True))
    assert len(pairs) == 4  # 14 of 16 images have objects
    for batch, other in pairs:
        assert torch.equal(batch["image"], other["image"])
        for target, truth in zip(batch["target"], other["target"], strict=True):
            assert {key: value.tolist() for key, value in target.items()} == {k: v.tolist() for k, v in truth.items()}
    pairs = list(zip(found.val_dataloader(), expected.val_dataloader(), strict=True))
    assert [batch["image_id"] for batch, _ in pairs] == [[16, 17, 18], [19, 20]]
    for batch, other in pairs:
        assert torch.equal(batch["image"], other["image"])
        assert [truth["masks"] for truth in batch["truth"]] == [truth["masks"] for truth in other["truth"]]


def test_the_datamodule_opens_a_folder_for_each_split(folder):
    datamodule = DetectionShards(folder, folder, num_classes=3, masks=False)
    with pytest.warns(UserWarning, match=r"left out"):
        assert len(datamodule.open_split("train").objects(1)) == 1
    source = datamodule.open_split("val")
    assert len(source.objects(1)) == 2
    assert not source.has_masks
    assert datamodule.find_categories() == source.categories
