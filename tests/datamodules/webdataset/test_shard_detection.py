"""Detection over shards: the samples of `DetectionShards`, and what becomes of those that cannot be used."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from changed_shards import change_parts, read_part
from shard_data import Ranks

from datamodules.detection.collate import collate_train
from datamodules.detection.shards import DetectionShards, ShardSource, write_shards
from datamodules.detection.synthetic import SMALL_EVAL, Shapes
from datamodules.detection.transforms import DetectionTrainTransform, RandomCrop
from datamodules.webdataset.detection import ImageObjectShards
from datamodules.webdataset.records import Draw
from datamodules.webdataset.settings import Shuffling
from datamodules.webdataset.sources import Shards
from tasks.cli import main

PER_SHARD = 5
TRAIN = DetectionTrainTransform(
    short_sides=(48, 64), long_side=96, crop=RandomCrop(short_sides=(60, 80), long_side=120, sides=(40, 60))
)


@pytest.fixture
def folder(tmp_path):
    """Twenty images in four shards; number 7 and number 15 are without objects."""
    write_shards(Shapes(20, 3, 64), tmp_path / "shapes", images_per_shard=PER_SHARD)
    return tmp_path / "shapes"


def opened(ranks: Ranks | None = None, **options: Any) -> ImageObjectShards:
    data = ImageObjectShards(
        **{
            "num_classes": 3,
            "num_workers": 0,
            "batch_size": 4,
            "train_transform": TRAIN,
            "eval_transform": SMALL_EVAL,
            "shuffling": Shuffling(lanes=2, window_shards=2),
            **options,
        }
    )
    data.setup("fit")
    data.trainer = ranks or Ranks()
    return data


def assert_equal(found, expected):
    """Compare nested lists, dicts, tensors and arrays."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_equal(found[key], expected[key])
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(found, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(found, np.ndarray):
        assert np.array_equal(found, expected)
    else:
        assert found == expected


def broken(folder: Path) -> dict[str, tuple[str, bytes | None]]:
    """Return the cause and the content for one file of each sample to break."""

    def changed(number: int, **parts: Any) -> bytes:
        return json.dumps({**json.loads(read_part(folder, f"{number:09}.json")), **parts}).encode()

    def objects(number: int) -> int:
        return len(json.loads(read_part(folder, f"{number:09}.json"))["labels"])

    return {
        "000000000.png": ("decode", read_part(folder, "000000000.png")[:200]),
        "000000001.json": ("parts", None),
        "000000002.json": ("label", b"no json"),
        "000000003.json": ("label", changed(3, labels=[], boxes=[[1, 2, 3, 4]])),
        "000000004.json": ("label", changed(4, size=[64, 64])),
        "000000005.png": ("parts", None),
        "000000006.json": ("label", changed(6, labels=[3] * objects(6))),
        # Runs of more pixels than the image has.
        "000000009.json": ("label", changed(9, masks=["PPPPPP3"] * objects(9))),
        "000000010.json": ("label", changed(10, boxes=[[1, 2, 3, float("nan")]] * objects(10))),
    }


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_samples_are_those_of_detection_shards(folder, num_workers):
    data = opened(train=Shards(urls=str(folder)), seed=3, num_workers=num_workers)
    source, pipeline = ShardSource(folder, training=True), TRAIN.build(masks=True)
    plan, seen = data._plan(), []
    for step, batch in enumerate(data.train_dataloader()):
        places, samples = plan.rows(0, step, 0, 4), []
        for row in range(4):
            index = int(places.shard[row]) * PER_SHARD + int(places.sample[row])
            draw = Draw(3, 0, int(places.epoch[row]), int(places.position[row]))
            samples.append(pipeline(source.read(index), source.objects(index), draw.sequence()))
            seen.append(index)
        assert_equal(batch, collate_train(samples))
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("masks", [True, False])
def test_evaluation_batches_are_those_of_detection_shards(folder, masks):
    options = {"num_classes": 3, "batch_size": 3, "num_workers": 0, "masks": masks, "eval_transform": SMALL_EVAL}
    expected = DetectionShards(folder, folder, **options)
    expected.setup("validate")
    data = opened(val=Shards(urls=str(folder)), **options)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        for batch, other in zip(loader, expected.val_dataloader(), strict=True):
            assert_equal(batch, other)
    for batch, other in zip(data.predict_dataloader(), expected.predict_dataloader(), strict=True):
        assert_equal(batch, other)
    assert (data.class_names, data.category_ids) == (expected.class_names, expected.category_ids)


def test_samples_that_cannot_be_used_are_replaced_and_counted(folder):
    bad = broken(folder)
    change_parts(folder, {name: content for name, (_, content) in bad.items()})
    data = opened(train=Shards(urls=str(folder), name="shapes"), batch_size=20)
    loader = data.train_dataloader()
    (batch,) = list(loader)
    assert len(batch["image"]) == len(batch["target"]) == 20
    meter, _ = loader.take_meter()
    found = {int(entry.name.rpartition("/")[2]): entry.cause for entry in meter.entries}
    assert found == {int(name[:9]): cause for name, (cause, _) in bad.items()}
    assert meter.samples == {0: 20}


def test_images_without_objects_are_background_or_replaced(folder):
    def empty(**options):
        data = opened(
            train=Shards(urls=str(folder)), batch_size=20, train_transform=DetectionTrainTransform(), **options
        )
        loader = data.train_dataloader()
        (batch,) = list(loader)
        meter, _ = loader.take_meter()
        names = {int(entry.name.rpartition("/")[2]) for entry in meter.entries}
        return sum(len(target["labels"]) == 0 for target in batch["target"]), names

    assert empty() == (2, set())
    assert empty(keep_empty=False) == (0, {7, 15})


def test_shards_without_masks_say_so_when_masks_are_wanted(tmp_path):
    write_shards(Shapes(4, 3, 64, masks=False), tmp_path)
    with pytest.raises(ValueError, match=r"was written without masks. Set masks=false"):
        next(iter(opened(train=Shards(urls=str(tmp_path))).train_dataloader()))
    batch = next(iter(opened(train=Shards(urls=str(tmp_path)), masks=False).train_dataloader()))
    assert all(target.keys() == {"boxes", "labels"} for target in batch["target"])
    assert "masks" not in next(iter(opened(val=Shards(urls=str(tmp_path))).val_dataloader()))["truth"][0]


class TestEvaluation:
    """Numbers 4 to 7, and some others, cannot be used."""

    @pytest.fixture
    def holes(self, folder):
        change_parts(folder, {f"{number:09}.json": None for number in (4, 5, 6, 7, 10, 19)})
        return folder

    def batches(self, holes, rank, world, batch_size=2):
        data = opened(Ranks(rank, world), val=Shards(urls=str(holes)), batch_size=batch_size)
        with pytest.warns(UserWarning, match="bad and left out"):
            return [batch["image_id"] for batch in data.val_dataloader()]

    def test_what_cannot_be_used_is_left_out_and_each_rank_takes_as_many_steps(self, holes):
        # The third and fourth batches have no sample left: the one before comes again.
        assert self.batches(holes, 0, 1) == [
            [0, 1], [2, 3], [2, 3], [2, 3], [8, 9], [11], [12, 13], [14, 15], [16, 17], [18],
        ]  # fmt: skip
        first, second = (self.batches(holes, rank, 2) for rank in range(2))
        assert first == [[0, 2], [0, 2], [8], [12, 14], [16, 18]]
        assert second == [[1, 3], [1, 3], [9, 11], [13, 15], [17]]

    def test_a_rank_that_begins_without_a_sample_takes_the_next_ones_twice(self, holes):
        assert self.batches(holes, 2, 5, 1) == [[2], [2], [12], [17]]
        assert self.batches(holes, 4, 5, 1) == [[9], [9], [14], [14]]

    def test_predictions_have_each_image_once(self, holes):
        data = opened(val=Shards(urls=str(holes)), batch_size=2)
        with pytest.warns(UserWarning, match="bad and left out"):
            ids = [number for batch in data.predict_dataloader() for number in batch["image_id"]]
        assert ids == [0, 1, 2, 3, 8, 9, 11, 12, 13, 14, 15, 16, 17, 18]

    def test_a_rank_without_any_sample_is_an_error(self, folder):
        data = opened(Ranks(rank=20, num_replicas=21), val=Shards(urls=str(folder)))
        with pytest.raises(ValueError, match=r"none of the 1 evaluation batches of this rank .* fewer devices"):
            list(data.val_dataloader())


def test_files_to_predict_are_numbered_over_all_ranks(tmp_path, folder):
    for number in range(3):
        Shapes(3, 3, 64).read(number).save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in range(3)]
    data = opened(Ranks(1, 2), val=Shards(urls=str(folder)), predict_paths=files)
    (batch,) = list(data.predict_dataloader())
    assert (batch["image_id"], batch["path"]) == ([1], [str(files[1])])


class TestCategories:
    def test_they_lie_beside_the_shards_or_in_the_index_or_are_arguments(self, folder, tmp_path):
        shards = Shards(urls=str(folder), index=tmp_path / "index", name="shapes")
        assert opened(train=shards).class_names == ["class_0", "class_1", "class_2"]
        (folder / "categories.json").rename(tmp_path / "index" / "categories.json")
        assert opened(train=shards).category_ids == [1, 2, 3]
        (tmp_path / "index" / "categories.json").rename(tmp_path / "categories.json")
        assert opened(train=shards, categories=tmp_path).category_ids == [1, 2, 3]
        assert opened(train=shards, categories=["a", "b", "c"]).class_names == ["a", "b", "c"]
        with pytest.raises(FileNotFoundError, match=r"no categories.json for shapes in .*/shapes, .*/index. Put it"):
            opened(train=shards)

    def test_another_number_of_classes_and_sources_that_disagree_are_errors(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"shapes/categories.json has 3 classes, num_classes=4"):
            opened(train=Shards(urls=str(folder)), num_classes=4)
        write_shards(Shapes(4, 3, 64), tmp_path / "others")
        path = tmp_path / "others" / "categories.json"
        path.write_text(path.read_text().replace("class_1", "dog"))
        with pytest.raises(ValueError, match="disagree about label 1: class_1 and dog"):
            opened(train=[Shards(urls=str(folder)), Shards(urls=str(tmp_path / "others"))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes=0"),
        ({"mean": (0.0, 0.0, 0.0)}, "mean=.* have no effect here. Give them to train_transform"),
    ],
)
def test_arguments_that_mean_nothing_are_errors(folder, options, message):
    with pytest.raises(ValueError, match=message):
        opened(train=Shards(urls=str(folder)), **options)


def test_a_detector_is_fitted_and_validated_by_the_command(folder, tmp_path, monkeypatch):
    write_shards(Shapes(5, 3, 64), tmp_path / "few")
    for shards in (folder, tmp_path / "few"):
        change_parts(shards, {"000000003.json": None})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["internimage"])
    config = yaml.safe_load((Path(__file__).parents[3] / "experiments/debug/mask_rcnn.yaml").read_text())
    config["trainer"] |= {"max_steps": 2, "check_val_every_n_epoch": 1, "enable_progress_bar": False}
    config["model"]["init_args"] |= {"warmup_steps": 0, "schedule": {"class_path": "tasks.Poly"}}
    del config["global_batch_size"]
    config["data"] = {
        "class_path": "datamodules.ImageObjectShards",
        "init_args": {
            "num_classes": 3,
            "train": {"urls": str(folder)},
            "val": {"urls": str(tmp_path / "few")},
            "batch_size": 4,
            "shuffling": {"epoch_samples": 8},
            "num_workers": 0,
            "max_bad_share": 0.2,
            "train_transform": {"short_sides": [48], "long_side": 64},
            "eval_transform": {"short_side": 48, "long_side": 64},
        },
    }
    Path("shapes.yaml").write_text(yaml.safe_dump(config))
    with pytest.warns(UserWarning, match="bad and left out"):
        cli = main(["fit", "-c", "shapes.yaml"])
    assert "val/box_ap" in cli.trainer.callback_metrics
    assert cli.model.class_names == ["class_0", "class_1", "class_2"]
    with pytest.warns(UserWarning, match="bad and left out"):
        again = main(["validate", "-c", "shapes.yaml", "--ckpt_path", "runs/shapes/version_0/checkpoints/last.ckpt"])
    assert again.trainer.callback_metrics["val/box_ap"] == cli.trainer.callback_metrics["val/box_ap"]
