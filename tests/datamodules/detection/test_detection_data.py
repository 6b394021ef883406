import pickle
import re

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data._utils.pin_memory import pin_memory

from datamodules.corrupt import CorruptImagesError
from datamodules.detection.data import DetectionData
from datamodules.detection.dataset import ChosenImages
from datamodules.detection.records import Categories, LabelSets, Objects
from datamodules.detection.transforms import DetectionEvalTransform, DetectionTrainTransform, RandomCrop
from datamodules.orders import ClassAware, RepeatFactor

SMALL_TRAIN = DetectionTrainTransform(
    short_sides=(40, 48), long_side=90, crop=RandomCrop(short_sides=(36, 48), sides=(30, 40))
)
SMALL_EVAL = DetectionEvalTransform(short_side=40, long_side=80)


class Drawn:
    """Wide and high images of one to three filled rectangles, whose colour says the class; every sixth has none."""

    has_masks = True
    skipped = {}  # noqa: RUF012 - as the annotations of a file
    categories = Categories(("red", "green", "blue"), (3, 5, 9), ("f", "c", "r"))

    def __init__(self, length, broken=(), wrong_size=(), seed=0):
        self.length, self.broken, self.wrong_size, self.seed = length, broken, wrong_size, seed

    def __len__(self):
        return self.length

    def size(self, index):
        return (45, 60) if index % 3 else (60, 45)

    def objects(self, index):
        random, (height, width) = np.random.default_rng((self.seed, index)), self.size(index)
        count = 0 if index % 6 == 5 else int(random.integers(1, 4))
        corners = random.integers(0, 20, (count, 2))
        boxes = np.concatenate([corners, random.integers(8, 25, (count, 2))], 1).astype(np.float64)
        labels, crowd = random.integers(0, 3, count), np.arange(count) == 2
        masks = []
        for x, y, w, h in boxes.astype(int):
            mask = np.zeros((height, width), dtype=np.uint8, order="F")
            mask[y : y + h, x : x + w] = 1
            masks.append(coco_mask.encode(mask))
        return Objects(boxes, labels, boxes[:, 2:].prod(1), crowd, masks)

    def read(self, index):
        if index in self.broken:
            raise OSError("cut short")
        height, width = self.size(index)
        pixels = np.full((height, width, 3), 30, dtype=np.uint8)
        objects = self.objects(index)
        for (x, y, w, h), label in zip(objects.boxes.astype(int), objects.labels, strict=True):
            pixels[y : y + h, x : x + w, label] = 200
        return Image.fromarray(pixels[:-1] if index in self.wrong_size else pixels)

    def image_id(self, index):
        return 1000 + index

    def name(self, index):
        return f"drawn[{index}]"

    def label_sets(self):
        found = [self.objects(index) for index in range(self.length)]
        images = np.repeat(np.arange(self.length), [int((~each.crowd).sum()) for each in found])
        return LabelSets.from_pairs(images, np.concatenate([each.labels[~each.crowd] for each in found]), self.length)


class DrawnData(DetectionData):
    def __init__(self, train=None, val=None, **options):
        super().__init__(
            **{
                "num_classes": 3,
                "batch_size": 4,
                "num_workers": 0,
                "train_transform": SMALL_TRAIN,
                "eval_transform": SMALL_EVAL,
                **options,
            }
        )
        self.sources = {"train": train or Drawn(36), "val": val or Drawn(7, seed=1)}

    def open_split(self, split):
        return self.sources[split]


def ready(stage="fit", **options):
    datamodule = DrawnData(**options)
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
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, np.ndarray):
        np.testing.assert_array_equal(first, second)
        assert first.dtype == second.dtype
    else:
        assert first == second


def test_training_batches_hold_what_the_contract_says():
    datamodule = ready()
    batches = list(datamodule.train_dataloader())
    assert len(batches) == 7  # 30 images with objects
    for batch in batches:
        assert set(batch) == {"image", "valid", "target"}
        count, channels, height, width = batch["image"].shape
        assert (count, channels, height % 32, width % 32) == (4, 3, 0, 0)
        assert height - max(size[0] for size in batch["valid"]) < 32
        assert width - max(size[1] for size in batch["valid"]) < 32
        for image, (h, w), target in zip(batch["image"], batch["valid"], batch["target"], strict=True):
            assert image[:, h:].abs().sum() == image[:, :, w:].abs().sum() == 0
            assert image[:, :h, :w].abs().min() > 0
            assert target["masks"].shape == (len(target["boxes"]), height, width)
            assert target["masks"][:, h:].sum() == target["masks"][:, :, w:].sum() == 0
            assert (target["boxes"][:, 2:] <= torch.tensor([w, h])).all()
            assert target["labels"].dtype == torch.int64


def check_objects(image, target):
    """Check that each object is where its box and its mask say, in the colour of its class; count those checked."""
    std = torch.tensor(SMALL_TRAIN.std).view(3, 1, 1)
    mean = torch.tensor(SMALL_TRAIN.mean).view(3, 1, 1)
    checked = 0
    for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
        x, y = ((box[:2] + box[2:]) / 2).int().tolist()
        colour = (image * std + mean)[:, y, x] * 255
        # The channel of its class is 200 inside; the edge is soft and crops may be small.
        if min(box[2:] - box[:2]) > 6:
            assert colour[label] > 190
            assert mask[y, x] == 1
            checked += 1
    return checked


def test_pixels_boxes_masks_and_labels_of_a_batch_are_one_object():
    batches = list(ready().train_dataloader())
    pairs = [pair for batch in batches for pair in zip(batch["image"], batch["target"], strict=True)]
    assert sum(check_objects(image, target) for image, target in pairs) > 20


def test_batches_are_the_same_for_any_number_of_workers():
    expected = [list(getattr(ready(), f"{use}_dataloader")()) for use in ("train", "val", "predict")]
    datamodule = ready(num_workers=2)
    for use, batches in zip(("train", "val", "predict"), expected, strict=True):
        assert_same(list(getattr(datamodule, f"{use}_dataloader")()), batches)


def test_training_batches_are_of_one_orientation_where_possible():
    def mixed(**options):
        wide = [[w >= h for h, w in batch["valid"]] for batch in ready(**options).train_dataloader()]
        return sum(0 < sum(batch) < len(batch) for batch in wide)

    still = DetectionTrainTransform(short_sides=(40,), long_side=80)
    assert mixed(train_transform=still) <= 1
    assert mixed(train_transform=still, group_by_aspect=False) > 2


def test_evaluation_has_every_image_once_in_order_with_its_truth_of_the_file():
    datamodule = ready("validate")
    batches = list(datamodule.val_dataloader())
    assert [identity for batch in batches for identity in batch["image_id"]] == list(range(1000, 1007))
    source = datamodule.sources["val"]
    for number, truth in enumerate(truth for batch in batches for truth in batch["truth"]):
        objects = source.objects(number)
        assert_same(truth["boxes"], objects.boxes)
        assert_same(truth["crowd"], objects.crowd)
        assert truth["boxes"].dtype == np.float64
        assert [mask["counts"] for mask in truth["masks"]] == [mask["counts"] for mask in objects.masks]
    assert batches[0]["original_size"] == [(60, 45), (45, 60), (45, 60), (60, 45)]
    assert batches[0]["valid"] == [(53, 40), (40, 53), (40, 53), (53, 40)]
    assert batches[0]["image"].shape == (4, 3, 64, 64)
    assert batches[0]["path"] == [f"drawn[{index}]" for index in range(4)]
    assert "views" not in batches[0]
    assert "truth" not in next(iter(datamodule.predict_dataloader()))


def test_views_for_test_time_augmentation_are_padded_by_themselves():
    transform = DetectionEvalTransform(short_side=40, long_side=80, extra_sizes=((70, 140),), extra_flip=True)
    batch = next(iter(ready("test", eval_transform=transform).test_dataloader()))
    views = batch["views"]
    assert [view["flipped"] for view in views] == [True, False, True]
    assert [view["image"].shape[2:] for view in views] == [(64, 64), (96, 96), (96, 96)]
    assert views[1]["valid"] == [(93, 70), (70, 93), (70, 93), (93, 70)]
    for (h, w), plain, flipped in zip(batch["valid"], batch["image"], views[0]["image"], strict=True):
        assert torch.equal(plain[:, :h, :w].flip(2), flipped[:, :h, :w])


def test_batches_survive_pinning_and_the_move_to_a_device(monkeypatch):
    datamodule = ready("fit")
    # Pinning itself needs a GPU; what is tested is how torch walks through the batch.
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        batch = next(iter(loader))
        assert_same(pin_memory(pickle.loads(pickle.dumps(batch))), batch)
        moved = move_data_to_device(batch, torch.device("meta"))
        assert moved["image"].device.type == "meta"
        assert moved["valid"] == batch["valid"]
        if "target" in batch:
            assert {tensor.device.type for target in moved["target"] for tensor in target.values()} == {"meta"}
        else:
            assert_same(moved["truth"], batch["truth"])
            assert all(isinstance(mask["counts"], bytes) for truth in moved["truth"] for mask in truth["masks"])
    assert len(pinned) > 2


def test_training_leaves_out_images_without_objects_or_too_small_and_evaluation_does_not():
    names = {ready().train_dataloader().dataset.source.name(index) for index in range(30)}
    assert names == {f"drawn[{index}]" for index in range(36) if index % 6 != 5}
    kept = ready(keep_empty=True)
    assert len(kept.train_dataloader().dataset) == 36
    assert sum(len(target["boxes"]) == 0 for batch in kept.train_dataloader() for target in batch["target"]) >= 6
    with pytest.raises(ValueError, match=r"none of 36 .*36 have a side below min_image_size=50, 6 have no objects"):
        ready(min_image_size=50)
    assert len(ready().val_dataloader().dataset) == 7


def test_chosen_images_keep_their_labels():
    source = Drawn(20)
    chosen = np.array([3, 0, 5, 19, 4])
    sets, whole = ChosenImages(source, chosen).label_sets(), source.label_sets()
    assert len(sets) == 5
    for position, index in enumerate(chosen):
        assert sets[position].tolist() == whole[index].tolist()


@pytest.mark.filterwarnings("ignore:.*is unreadable")
@pytest.mark.parametrize("fault", ["broken", "wrong_size"])
def test_training_replaces_what_it_cannot_read_and_counts_it(fault):
    datamodule = ready(train=Drawn(36, **{fault: [7]}), max_corrupt_share=0.1)
    batches = list(datamodule.train_dataloader())
    assert [len(batch["valid"]) for batch in batches] == [4] * 7
    dataset = datamodule.train_dataloader().dataset
    index = next(index for index in range(30) if dataset.source.name(index) == "drawn[7]")
    samples = [dataset[epoch, index] for epoch in range(8)]
    assert sum(check_objects(sample["image"], sample) for sample in samples) > 4
    assert len({tuple(sample["labels"].tolist()) for sample in samples}) > 1
    assert datamodule.corrupt_images == {"train": ["drawn[7]"]}
    with pytest.warns(UserWarning, match=r"DrawnData: 1 of 30 train images are unreadable.*drawn\[7\]"):
        datamodule.teardown("fit")
    strict = ready(train=Drawn(36, **{fault: [7]}), max_corrupt_share=0.0)
    with pytest.raises(CorruptImagesError, match=r"1 of 30 images are unreadable \(drawn\[7\]"):
        list(strict.train_dataloader())


@pytest.mark.parametrize(
    ("fault", "message"), [("broken", "cut short"), ("wrong_size", r"44 x 60 pixels, .* 45 x 60 \(height x width\)")]
)
def test_an_unreadable_evaluation_image_is_an_error_that_names_it(fault, message):
    datamodule = ready("test", val=Drawn(7, **{fault: [5]}), max_corrupt_share=1.0)
    with pytest.raises(ValueError, match=rf"evaluation: cannot use drawn\[5\]: .*{message}"):
        list(datamodule.test_dataloader())


def test_predict_takes_files_turned_as_their_orientation_says(tmp_path):
    (tmp_path / "images").mkdir()
    image = Image.fromarray(np.arange(60 * 45 * 3, dtype=np.uint8).reshape(45, 60, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by a quarter
    image.save(tmp_path / "images" / "b.png", exif=exif)
    image.save(tmp_path / "images" / "a.png")
    datamodule = DrawnData(predict_paths=[tmp_path / "images", tmp_path / "images" / "a.png"])
    datamodule.sources = {}
    datamodule.setup("predict")
    (batch,) = datamodule.predict_dataloader()
    assert batch["image_id"] == [0, 1, 2]
    assert [path.rpartition("/")[2] for path in batch["path"]] == ["a.png", "b.png", "a.png"]
    assert batch["original_size"] == [(45, 60), (60, 45), (45, 60)]
    assert datamodule.class_names is None
    (tmp_path / "images" / "a.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"predict: cannot use .*a\.png"):
        list(datamodule.predict_dataloader())


def test_classes_are_known_after_setup_and_checked():
    datamodule = ready("validate")
    assert datamodule.class_names == ["red", "green", "blue"]
    assert datamodule.category_ids == [3, 5, 9]
    assert datamodule.class_frequency == ["f", "c", "r"]
    with pytest.raises(ValueError, match=r"DrawnData: the train annotations have 3 classes, num_classes=80"):
        ready(num_classes=80)
    others = Drawn(7)
    others.categories = Categories(("red", "blue", "green"), (3, 5, 9))
    with pytest.raises(
        ValueError, match=r"DrawnData: the splits disagree about label 1: (green and blue|blue and green)"
    ):
        ready(val=others)
    boxes_only = Drawn(36)
    boxes_only.has_masks = False
    with pytest.raises(ValueError, match=r"the train annotations have no masks. Set masks=false"):
        ready(train=boxes_only)
    assert "masks" not in next(iter(ready(train=boxes_only, masks=False).train_dataloader()))["target"][0]


def test_batches_too_large_for_the_data_and_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match=r"30 training images do not fill one batch of 64"):
        ready(batch_size=64).train_dataloader()
    for name, value in (("batch_size", 0), ("num_workers", -1), ("min_image_size", 0), ("max_corrupt_share", 2.0)):
        with pytest.raises(ValueError, match=re.escape(f"DrawnData: {name}={value}, expected")):
            DrawnData(**{name: value})


@pytest.mark.parametrize("balance", [RepeatFactor(threshold=0.9), ClassAware()])
def test_balance_shows_rare_classes_more_often(balance):
    class Rare(Drawn):
        def objects(self, index):
            objects = super().objects(index)
            return Objects(
                objects.boxes, np.full(len(objects), int(index == 9)), objects.areas, objects.crowd, objects.masks
            )

    def share(balance):
        loader = ready(train=Rare(36), balance=balance, batch_size=1).train_dataloader()
        names = [loader.dataset.source.name(index % 30) for _, index in loader.sampler]
        return names.count("drawn[9]") / len(names)

    assert share(None) == 1 / 30
    # sqrt(0.9 / (1 / 30)) = 5.2, rounded up: 6 of 29 * 1 + 6. By class: half.
    assert share(balance) == pytest.approx(0.5 if isinstance(balance, ClassAware) else 6 / 35)


def test_an_image_that_comes_again_in_an_epoch_is_changed_differently():
    dataset = ready().train_dataloader().dataset
    samples = [dataset[0, 4 + 30 * time] for time in range(8)]
    assert len({(*sample["image"].shape, sample["image"].sum().item()) for sample in samples}) > 4
    assert_same(dataset[0, 34], samples[1])


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        self.seen[self.trainer.global_step] = [image.sum().item() for image in batch["image"]]
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, steps, ckpt_path=None, **options):
    model = Recorder()
    Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[
            ModelCheckpoint(folder, "step{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=steps,
        max_epochs=-1,
        limit_val_batches=0,
    ).fit(model, datamodule=DrawnData(**options), ckpt_path=ckpt_path, weights_only=True)
    return model.seen


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_sees_the_batches_of_one_that_was_not_stopped(tmp_path):
    options = {"balance": RepeatFactor(threshold=0.5)}
    whole = fit(tmp_path / "whole", 11, **options)
    checkpoint = tmp_path / "whole" / "step3.ckpt"
    resumed = fit(tmp_path / "resumed", 11, ckpt_path=checkpoint, **options)
    assert resumed == {step: whole[step] for step in range(3, 11)}
    with pytest.raises(ValueError, match=r"grouped into batches of 4.*grouped into batches of 2"):
        fit(tmp_path / "other", 11, ckpt_path=checkpoint, batch_size=2, **options)
