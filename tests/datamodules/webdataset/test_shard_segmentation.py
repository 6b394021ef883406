"""Segmentation over shards: the samples of `SegmentationShards`, and what becomes of those that cannot be used."""

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from changed_shards import change_parts, read_part
from PIL import Image
from shard_data import Ranks

from datamodules.segmentation.shards import SegmentationShards, ShardSource, write_shards
from datamodules.segmentation.synthetic import Scenes
from datamodules.segmentation.transforms import SegmentationEvalTransform, SegmentationTrainTransform
from datamodules.webdataset.records import Draw
from datamodules.webdataset.segmentation import ImageMaskShards
from datamodules.webdataset.settings import Shuffling
from datamodules.webdataset.sources import Shards
from tasks.cli import main

PER_SHARD = 4
TRAIN = SegmentationTrainTransform(short_side=48, long_side=64, crop=(48, 48))
EVAL = SegmentationEvalTransform(short_side=40, long_side=64, extra_flip=True)


class Photographs(Scenes):
    """Scenes whose even images are JPEG files, one of them turned by its EXIF orientation."""

    folder: Path

    def save(self) -> None:
        for index in range(0, len(self), 2):
            image = super().read(index)
            exif = Image.Exif()
            if index == 2:
                # A quarter turn to the right brings it back.
                image = image.transpose(Image.Transpose.ROTATE_90)
                exif[0x0112] = 6
            image.save(self.folder / f"{index}.jpg", exif=exif)

    def name(self, index: int) -> str:
        return str(self.folder / f"{index}.jpg") if index % 2 == 0 else super().name(index)


@pytest.fixture
def folder(tmp_path):
    """Sixteen images in four shards."""
    scenes = Photographs(16, 4, 64)
    scenes.folder = tmp_path
    scenes.save()
    write_shards(scenes, tmp_path / "scenes", images_per_shard=PER_SHARD)
    return tmp_path / "scenes"


def opened(ranks: Ranks | None = None, **options: Any) -> ImageMaskShards:
    data = ImageMaskShards(
        **{
            "num_classes": 4,
            "num_workers": 0,
            "batch_size": 4,
            "train_transform": TRAIN,
            "eval_transform": EVAL,
            "shuffling": Shuffling(lanes=2, window_shards=2),
            **options,
        }
    )
    data.setup("fit")
    data.trainer = ranks or Ranks()
    return data


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_samples_are_those_of_segmentation_shards(folder, num_workers):
    data = opened(train=Shards(urls=str(folder)), seed=5, num_workers=num_workers)
    source, pipeline = ShardSource(folder), TRAIN.build()
    plan, seen = data._plan(), []
    for step, batch in enumerate(data.train_dataloader()):
        places = plan.rows(0, step, 0, 4)
        for row in range(4):
            index = int(places.shard[row]) * PER_SHARD + int(places.sample[row])
            draw = Draw(5, 0, int(places.epoch[row]), int(places.position[row]))
            sample = pipeline(source.read(index), source.mask(index), draw.sequence())
            assert torch.equal(batch["image"][row], sample["image"])
            assert batch["mask"].dtype == torch.int64
            assert torch.equal(batch["mask"][row], sample["mask"].long())
            seen.append(index)
    assert sorted(seen) == list(range(16))


@pytest.mark.parametrize("eval_batch_size", [1, 3])
def test_evaluation_and_prediction_are_those_of_segmentation_shards(folder, eval_batch_size):
    options = {"num_classes": 4, "num_workers": 0, "eval_batch_size": eval_batch_size, "eval_transform": EVAL}
    expected = SegmentationShards(folder, folder, **options)
    expected.setup("validate")
    data = opened(val=Shards(urls=str(folder)), **options)
    for loader, others in (
        (data.val_dataloader(), expected.val_dataloader()),
        (data.test_dataloader(), expected.test_dataloader()),
        (data.predict_dataloader(), expected.predict_dataloader()),
    ):
        for batch, other in zip(loader, others, strict=True):
            assert torch.equal(batch["image"], other["image"])
            (view,), (other_view,) = batch["views"], other["views"]
            assert torch.equal(view["image"], other_view["image"])
            assert (view["flipped"], view["valid"]) == (True, other_view["valid"])
            for key in ("valid", "original_size", "image_id", "path"):
                assert batch[key] == other[key]
            assert ("truth" in batch) == ("truth" in other)
            for truth, other_truth in zip(batch.get("truth", ()), other.get("truth", ()), strict=True):
                assert truth.dtype == np.uint8
                assert np.array_equal(truth, other_truth)
    assert (data.class_names, data.palette) == (expected.class_names, expected.palette)


def test_samples_that_cannot_be_used_are_replaced_and_counted(folder):
    mask = np.asarray(Image.open(io.BytesIO(read_part(folder, "000000006.png"))))
    change_parts(
        folder,
        {
            "000000000.jpg": read_part(folder, "000000000.jpg")[:400],
            "000000001.image.png": None,
            "000000002.png": None,
            "000000003.png": b"no image",
            "000000004.png": png(np.full((48, 64), 4)),
            "000000005.png": png(np.zeros((48, 64, 3))),
            "000000006.png": png(mask[1:]),
        },
    )
    causes = {0: "decode", 1: "parts", 2: "parts", 3: "label", 4: "label", 5: "label", 6: "label"}
    loader = opened(train=Shards(urls=str(folder)), batch_size=16).train_dataloader()
    (batch,) = list(loader)
    assert len(batch["image"]) == 16
    meter, _ = loader.take_meter()
    assert {int(entry.name.rpartition("/")[2]): entry.cause for entry in meter.entries} == causes
    assert meter.samples == {0: 16}


def test_evaluation_leaves_out_what_cannot_be_used_and_ranks_take_as_many_steps(folder):
    change_parts(folder, {f"{number:09}.png": None for number in (0, 4, 5, 6, 14, 15)})

    def numbers(rank: int, world: int) -> list[list[int]]:
        data = opened(Ranks(rank, world), val=Shards(urls=str(folder)), eval_batch_size=2)
        with pytest.warns(UserWarning, match="bad and left out"):
            return [[int(name.rpartition("/")[2]) for name in batch["image_id"]] for batch in data.val_dataloader()]

    # Where no sample is left, the batch before comes again.
    assert numbers(0, 1) == [[1], [2, 3], [2, 3], [7], [8, 9], [10, 11], [12, 13], [12, 13]]
    assert numbers(0, 2) == [[2], [2], [8, 10], [12]]
    assert numbers(1, 2) == [[1, 3], [7], [9, 11], [13]]


def test_classes_lie_beside_the_shards_or_are_arguments(folder):
    assert opened(train=Shards(urls=str(folder))).class_names == ["ground", "class_1", "class_2", "class_3"]
    with pytest.raises(ValueError, match=r"scenes/classes.json has 4 classes, num_classes=5"):
        opened(train=Shards(urls=str(folder)), num_classes=5)
    (folder / "classes.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"ImageMaskShards: there is no classes.json for"):
        opened(train=Shards(urls=str(folder)))
    data = opened(train=Shards(urls=str(folder)), classes=["a", "b", "c", "d"])
    assert data.class_names == ["a", "b", "c", "d"]
    assert len(set(data.palette)) == 4


def test_shards_of_one_name_cannot_be_told_apart_in_evaluation(tmp_path):
    for part in ("one", "two"):
        write_shards(Scenes(2, 4, 64), tmp_path / part)
    urls = [str(tmp_path / part / "shard-000000.tar") for part in ("one", "two")]
    with pytest.raises(ValueError, match=r"2 shards of both are called shard-000000, and results are listed"):
        opened(val=Shards(urls=urls, index=tmp_path / "index", name="both"))


def test_a_segmentor_is_fitted_and_validated_by_the_command(folder, tmp_path, monkeypatch):
    change_parts(folder, {"000000003.png": None})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["internimage"])
    config = yaml.safe_load((Path(__file__).parents[3] / "experiments/debug/upernet.yaml").read_text())
    config["trainer"] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    }
    config["model"]["init_args"] |= {"warmup_steps": 0}
    del config["global_batch_size"]
    config["data"] = {
        "class_path": "datamodules.ImageMaskShards",
        "init_args": {
            "num_classes": 4,
            "train": {"urls": str(folder)},
            "val": {"urls": str(folder)},
            "batch_size": 8,
            "num_workers": 0,
            "max_bad_share": 0.2,
            "train_transform": {"short_side": 48, "long_side": 64, "crop": [48, 48]},
            "eval_transform": {"short_side": 48, "long_side": 64},
        },
    }
    Path("scenes.yaml").write_text(yaml.safe_dump(config))
    with pytest.warns(UserWarning, match="bad and left out"):
        cli = main(["fit", "-c", "scenes.yaml"])
    score = cli.trainer.callback_metrics["val/miou"]
    assert 0 <= score <= 1
    assert cli.model.class_names == ["ground", "class_1", "class_2", "class_3"]
    with pytest.warns(UserWarning, match="bad and left out"):
        again = main(["validate", "-c", "scenes.yaml", "--ckpt_path", "runs/scenes/version_0/checkpoints/last.ckpt"])
    assert again.trainer.callback_metrics["val/miou"] == score
