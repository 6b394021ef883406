import pickle

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from PIL import Image

from datamodules.segmentation.records import Classes
from datamodules.segmentation.synthetic import Scenes, SyntheticSegmentation
from datamodules.segmentation.transforms import SegmentationEvalTransform, SegmentationTrainTransform


def ready(stage="fit", **options):
    datamodule = SyntheticSegmentation(**{"num_samples": 12, "num_val_samples": 5, "batch_size": 4, **options})
    datamodule.setup(stage)
    return datamodule


def assert_same(first, second):
    """Compare nested batches, types included."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
    elif isinstance(first, torch.Tensor | np.ndarray):
        assert first.dtype == second.dtype
        assert np.array_equal(np.asarray(first), np.asarray(second))
    else:
        assert first == second


def test_training_batches_hold_what_the_contract_says():
    batches = list(ready().train_dataloader())
    assert len(batches) == 3
    for batch in batches:
        assert set(batch) == {"image", "mask"}
        assert (batch["image"].shape, batch["image"].dtype) == ((4, 3, 64, 64), torch.float32)
        assert (batch["mask"].shape, batch["mask"].dtype) == ((4, 64, 64), torch.int64)
        assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, 3, 255}
        # What is padded is both 255 and zero; the noisy images have no pixel of exactly the mean colour.
        assert torch.equal(batch["mask"] == 255, (batch["image"] == 0).all(1))


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_evaluation_batches_hold_what_the_contract_says(stage):
    datamodule = ready(stage, eval_batch_size=2)
    loader = datamodule.test_dataloader() if stage == "test" else datamodule.val_dataloader()
    batches, source = list(loader), Scenes(5, 4, 64, first=12)
    assert [len(batch["path"]) for batch in batches] == [2, 2, 1]
    number = 0
    for batch in batches:
        assert set(batch) == {"image", "valid", "original_size", "path", "image_id", "truth"}
        for image, valid, original, truth, path, image_id in zip(
            *(batch[key] for key in ("image", "valid", "original_size", "truth", "path", "image_id")), strict=True
        ):
            assert original == truth.shape == source.mask(number).shape
            assert (truth.dtype, image_id, path) == (np.uint8, f"scene_{12 + number}", f"scenes[{12 + number}]")
            assert np.array_equal(truth, source.mask(number))
            assert (valid[0] % 32, valid[1] % 32) == (0, 0)
            assert not image[:, valid[0] :].any()
            assert not image[:, :, valid[1] :].any()
            assert image[:, : valid[0], : valid[1]].abs().min() > 0
            number += 1


def test_evaluation_takes_one_image_at_a_time_unless_asked_so_that_none_is_padded():
    batches = list(ready("validate").val_dataloader())
    assert [tuple(batch["image"].shape[2:]) for batch in batches] == [batch["valid"][0] for batch in batches]
    assert len(batches) == 5


def test_views_are_padded_by_themselves():
    transform = SegmentationEvalTransform(short_side=48, long_side=64, extra_scales=(0.5,), extra_flip=True)
    (first, *_) = list(ready("validate", eval_transform=transform, eval_batch_size=2).val_dataloader())
    assert [view["flipped"] for view in first["views"]] == [True, False, True]
    # Scene 12 is wide (48 x 64 is stretched to 64 x 64), scene 13 is high.
    assert [tuple(view["image"].shape) for view in first["views"]] == [(2, 3, 64, 64)] + [(2, 3, 32, 32)] * 2
    assert first["views"][1]["valid"] == [(32, 32), (32, 32)]
    assert torch.equal(first["views"][0]["image"], first["image"].flip(-1))


def test_the_truth_stays_on_the_host():
    (batch, *_) = list(ready("validate").val_dataloader())
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved["image"].is_meta
    assert isinstance(moved["truth"][0], np.ndarray)


def test_batches_do_not_depend_on_the_number_of_workers():
    options = {"train_transform": SegmentationTrainTransform(short_side=48, long_side=64, crop=(40, 56))}
    alone, shared = (ready(num_workers=workers, **options) for workers in (0, 2))
    assert_same(list(alone.train_dataloader()), list(shared.train_dataloader()))
    assert_same(list(alone.val_dataloader()), list(shared.val_dataloader()))


def test_two_ranks_share_the_batches_of_one():
    options = {"num_samples": 16, "train_transform": SegmentationTrainTransform(short_side=48, long_side=64)}
    whole = next(iter(ready(batch_size=4, **options).train_dataloader()))
    halves = []
    for rank in range(2):
        datamodule = ready(batch_size=2, **options)
        datamodule._ranks = lambda rank=rank: {"num_replicas": 2, "rank": rank}
        halves.append(next(iter(datamodule.train_dataloader())))
    for rank, half in enumerate(halves):
        assert torch.equal(half["image"], whole["image"][rank::2])
        assert torch.equal(half["mask"], whole["mask"][rank::2])


def test_epochs_and_seeds_differ_and_runs_do_not():
    dataset = ready()._sets["train"]
    again, other = ready()._sets["train"], ready(seed=1)._sets["train"]
    assert_same(dataset[(2, 5)], pickle.loads(pickle.dumps(again))[(2, 5)])
    assert not torch.equal(dataset[(2, 5)]["image"], dataset[(3, 5)]["image"])
    assert not torch.equal(dataset[(2, 5)]["image"], other[(2, 5)]["image"])
    assert_same(dataset[5], dataset[(0, 5)])


def test_an_epoch_can_show_several_crops_of_each_image():
    datamodule = ready(num_samples=3, crops_per_image=4, batch_size=4)
    loader = datamodule.train_dataloader()
    assert sorted(loader.sampler) == [(0, index) for index in range(12)]
    dataset = datamodule._sets["train"]
    crops = [dataset[(0, index)]["image"] for index in (1, 4, 7, 10)]
    assert len({crop.numpy().tobytes() for crop in crops}) == 4
    next(iter(loader))
    assert "4 crops of each image" in loader.state_dict()["order"]


def test_predict_takes_files_or_the_validation_images(tmp_path):
    for number, size in enumerate([(60, 40), (50, 50)]):
        Image.new("RGB", size, (number, 200, 9)).save(tmp_path / f"{number}.png")
    datamodule = SyntheticSegmentation(predict_paths=[tmp_path], num_workers=0)
    datamodule.setup("predict")
    first, second = list(datamodule.predict_dataloader())
    assert set(first) == {"image", "valid", "original_size", "path", "image_id"}
    assert (first["original_size"], first["path"], first["image_id"]) == ([(40, 60)], [str(tmp_path / "0.png")], [0])
    assert second["image_id"] == [1]
    assert datamodule.class_names == ["ground", "class_1", "class_2", "class_3"]
    (batch, *_) = list(ready("predict").predict_dataloader())
    assert batch["image_id"] == ["scene_12"]
    assert "truth" not in batch
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"predict: cannot use .*0.png"):
        next(iter(datamodule.predict_dataloader()))


class TestScenes:
    def test_colour_and_mask_agree(self):
        source = Scenes(6, 4, 64)
        for index in range(6):
            pixels, mask = np.asarray(source.read(index)).astype(int), source.mask(index)
            for label in np.unique(mask):
                inside = pixels[mask == label]
                # One colour with noise of at most 12 to each side.
                assert np.ptp(inside, axis=0).max() <= 24
        assert set(np.unique(np.concatenate([source.mask(index).ravel() for index in range(6)]))) == {0, 1, 2, 3}

    def test_they_are_the_same_each_time_and_differ_from_each_other(self):
        first, second = Scenes(4, 3, 64), Scenes(2, 3, 64, first=2)
        assert np.array_equal(first.mask(3), second.mask(1))
        assert np.array_equal(np.asarray(first.read(3)), np.asarray(second.read(1)))
        assert len({first.mask(index).tobytes() for index in range(4)}) == 4
        assert [first.mask(index).shape for index in range(2)] == [(48, 64), (64, 48)]

    def test_classes_have_names_and_colours(self):
        assert Scenes(1, 2, 64).classes == Classes(("ground", "class_1"), ((0, 0, 0), (128, 0, 0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, r"num_classes=1, expected at least 2"),
        ({"num_classes": 256}, r"num_classes=256, expected at most 255"),
        ({"image_size": 8}, r"image_size=8, expected at least 32"),
        ({"eval_batch_size": 0}, r"eval_batch_size=0, expected at least 1"),
        ({"crops_per_image": 0}, r"crops_per_image=0, expected at least 1"),
    ],
)
def test_numbers_out_of_range_are_errors(options, message):
    with pytest.raises(ValueError, match=rf"SyntheticSegmentation: {message}"):
        SyntheticSegmentation(**options)


def test_data_of_another_number_of_classes_is_an_error():
    class Wrong(SyntheticSegmentation):
        def open_split(self, split):
            return Scenes(4, 3, 64)

    with pytest.raises(ValueError, match=r"Wrong: the train data has 3 classes, num_classes=4"):
        Wrong().setup("fit")
