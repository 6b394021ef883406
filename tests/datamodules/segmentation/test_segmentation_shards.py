import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from datamodules.segmentation.folders import PairSource
from datamodules.segmentation.masks import label_table
from datamodules.segmentation.records import Classes
from datamodules.segmentation.shards import SegmentationShards, ShardSource, write_shards
from datamodules.segmentation.synthetic import Scenes
from datamodules.segmentation.transforms import SegmentationEvalTransform, SegmentationTrainTransform

CLASSES = Classes(("a", "b", "c"), ((1, 2, 3), (4, 5, 6), (7, 8, 9)))


@pytest.fixture
def source(tmp_path):
    """Five pairs, the odd images PNG and the others JPEG, with masks whose 0 is ignored."""
    random, pairs = np.random.default_rng(0), []
    for number in range(5):
        image = tmp_path / f"{number}{'.png' if number % 2 else '.jpg'}"
        Image.fromarray(random.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)).save(image)
        mask = tmp_path / f"mask_{number}.png"
        Image.fromarray(random.integers(0, 4, (30 + number, 40), dtype=np.uint8)).save(mask)
        pairs.append((image.name, mask.name))
    return PairSource(tmp_path, pairs, CLASSES, label_table(3, reduce_zero_label=True))


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_what_was_written_is_read(source, tmp_path):
    write_shards(source, tmp_path / "shards", images_per_shard=2)
    shards = ShardSource(tmp_path / "shards")
    assert [path.name for path in sorted((tmp_path / "shards").glob("*.tar"))] == [
        f"shard-00000{number}.tar" for number in range(3)
    ]
    assert len(shards) == 5
    assert shards.classes == CLASSES
    for index in range(5):
        assert np.array_equal(shards.mask(index), source.mask(index))
        assert np.array_equal(np.asarray(shards.read(index)), np.asarray(source.read(index)))
    assert shards.image_id(3) == "shard-000001/000000003"
    assert shards.name(3) == f"{tmp_path}/shards/shard-000001.tar/000000003"


def test_images_that_are_no_files_are_stored_without_loss(tmp_path):
    scenes = Scenes(3, 4, 64)
    write_shards(scenes, tmp_path / "shards")
    shards = ShardSource(tmp_path / "shards")
    for index in range(3):
        assert np.array_equal(np.asarray(shards.read(index)), np.asarray(scenes.read(index)))
        assert np.array_equal(shards.mask(index), scenes.mask(index))


def test_webdataset_reads_them_too(source, tmp_path):
    write_shards(source, tmp_path / "shards")
    samples = list(wds.WebDataset(str(tmp_path / "shards/shard-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:09}" for number in range(5)]
    assert samples[0]["jpg"] == (tmp_path / "0.jpg").read_bytes()
    assert samples[1]["image.png"] == (tmp_path / "1.png").read_bytes()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(samples[1]["png"]))), source.mask(1))


def test_the_same_data_gives_the_same_bytes(source, tmp_path):
    for name in ("one", "two"):
        write_shards(source, tmp_path / name)
    files = ("shard-000000.tar", "classes.json")
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


def test_the_index_follows_the_shards(source, tmp_path):
    folder = tmp_path / "shards"
    write_shards(source, folder, images_per_shard=4)
    (folder / "shard-000001.tar").unlink()
    assert len(ShardSource(folder)) == 4
    (folder / "index.npz").write_bytes(b"no index")
    assert len(ShardSource(folder)) == 4
    # Now stored again, and valid: without the shards' bytes it still says how many there are.
    with np.load(folder / "index.npz") as index:
        assert index["mask"].shape == (4, 2)


def test_the_datamodule_yields_batches(source, tmp_path):
    write_shards(source, tmp_path / "shards")
    options = {
        "batch_size": 2,
        "num_workers": 0,
        "train_transform": SegmentationTrainTransform(short_side=30, long_side=40, crop=(32, 32)),
        "eval_transform": SegmentationEvalTransform(short_side=30, long_side=40),
    }
    datamodule = SegmentationShards(tmp_path / "shards", tmp_path / "shards", 3, **options)
    datamodule.setup("fit")
    assert datamodule.class_names == ["a", "b", "c"]
    assert next(iter(datamodule.train_dataloader()))["mask"].dtype == torch.int64
    assert np.array_equal(next(iter(datamodule.val_dataloader()))["truth"][0], source.mask(0))
    with pytest.raises(ValueError, match=r"the val data has 3 classes, num_classes=4"):
        SegmentationShards(tmp_path / "shards", tmp_path / "shards", 4, **options).setup("validate")


class TestErrors:
    def test_no_shards_or_no_classes(self, source, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere has no \*.tar"):
            ShardSource(tmp_path / "nowhere")
        write_shards(source, tmp_path / "shards")
        (tmp_path / "shards/classes.json").write_text(json.dumps({"names": ["a"]}))
        with pytest.raises(ValueError, match=r"classes.json: KeyError 'palette'; expected `names` and `palette`"):
            ShardSource(tmp_path / "shards")
        (tmp_path / "shards/classes.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"classes.json does not exist"):
            ShardSource(tmp_path / "shards")

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (("0.jpg",), r"sample 0 has no mask"),
            (("0.png",), r"sample 0 has no image"),
            (("0.txt",), r"sample 0 has no image and no mask"),
            ((), r"the shards are empty"),
        ],
    )
    def test_missing_parts(self, tmp_path, names, message):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name in names:
                add(tar, name, b"x")
        (tmp_path / "classes.json").write_text(json.dumps({"names": ["a"], "palette": [[0, 0, 0]]}))
        with pytest.raises(ValueError, match=message):
            ShardSource(tmp_path)

    def test_a_broken_shard(self, source, tmp_path):
        write_shards(source, tmp_path / "shards")
        (tmp_path / "shards/shard-000000.tar").write_bytes(b"no tar" * 200)
        with pytest.raises(ValueError, match=r"shard-000000.tar is broken: .* Make it again"):
            ShardSource(tmp_path / "shards")

    def test_a_label_past_the_classes(self, source, tmp_path):
        write_shards(source, tmp_path / "shards")
        (tmp_path / "shards/classes.json").write_text(json.dumps({"names": ["a"], "palette": [[0, 0, 0]]}))
        with pytest.raises(ValueError, match=r"shard-000000.tar/000000000.png has the value 1, 2 at"):
            ShardSource(tmp_path / "shards").mask(0)

    def test_a_folder_with_shards_is_not_overwritten(self, source, tmp_path):
        write_shards(source, tmp_path / "shards")
        with pytest.raises(FileExistsError, match=r"has shards \(shard-000000.tar, ...\)"):
            write_shards(source, tmp_path / "shards")
        with pytest.raises(ValueError, match=r"images_per_shard=0, expected at least 1"):
            write_shards(source, tmp_path / "other", images_per_shard=0)
