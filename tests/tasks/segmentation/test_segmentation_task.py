"""The segmentation task by the trainer's door: steps in every mode, metrics, checkpoints, predictions."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hotcoco import mask
from lightning.fabric.plugins.precision.utils import _DtypeContextManager as DtypeContext
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn

from datamodules.segmentation.synthetic import SyntheticSegmentation
from datamodules.segmentation.transforms import SegmentationEvalTransform
from internimage import internimage_debug
from internimage.checkpoints import CheckpointError
from tasks.base import InitCheckpoint
from tasks.segmentation import Mask2Former, SegFormer, SlidingWindow, UPerNet, inference
from tasks.segmentation import task as task_module
from tasks.segmentation.mask2former_layers import _centres
from tasks.segmentation.task import Segmentation

NUM_CLASSES = 4


def upernet(backbone, num_classes):
    return UPerNet(backbone, num_classes, channels=32, aux_channels=16)


def segformer(backbone, num_classes):
    return SegFormer(backbone, num_classes, channels=32)


def mask2former(backbone, num_classes):
    sizes = {"dim": 32, "num_heads": 4, "encoder_hidden_dim": 48, "hidden_dim": 64, "encoder_layers": 2}
    return Mask2Former(backbone, num_classes, num_queries=10, decoder_layers=3, num_points=100, **sizes)


SEGMENTORS = {"upernet": upernet, "segformer": segformer, "mask2former": mask2former}


def build(kind="segformer", checkpointing=False, **options):
    torch.manual_seed(0)
    defaults = {
        "num_classes": NUM_CLASSES,
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05),
        "segmentor": SEGMENTORS[kind],
    }
    task = Segmentation(internimage_debug(activation_checkpointing=checkpointing), **(defaults | options))
    spread(task.model)
    return task


def spread(model):
    """Let every class win somewhere, which an untrained model would not: its scores hardly depend on the image."""
    if isinstance(model, Mask2Former):
        nn.init.normal_(model.decoder.class_predictor.weight)
    elif isinstance(model, UPerNet | SegFormer):
        weight = model.head.classifier.weight
        nn.init.normal_(weight, std=10)
        with torch.no_grad():
            weight -= weight.mean(1, keepdim=True)


class Scenes(SyntheticSegmentation):
    """Small images, wide and high in turn; `objects` adds what instances and segments are compared with."""

    def __init__(self, objects=False, **options):
        evaluation = {"short_side": 48, "long_side": 96} | options.pop("evaluation", {})
        sizes = {"num_samples": 8, "num_val_samples": 5, "batch_size": 2}
        super().__init__(NUM_CLASSES, eval_transform=SegmentationEvalTransform(**evaluation), **(sizes | options))
        self.objects = objects

    def collate(self, use):
        plain = super().collate(use)
        return (lambda samples: with_objects(plain(samples))) if self.objects and use != "predict" else plain


def with_objects(batch):
    """Each class in an image as one object."""
    if "mask" in batch:
        labels = [one.unique() for one in batch["mask"]]
        labels = [present[present != 255] for present in labels]
        masks = [one == present[:, None, None] for one, present in zip(batch["mask"], labels, strict=True)]
        batch["target"] = [{"labels": a, "masks": b} for a, b in zip(labels, masks, strict=True)]
        return batch
    batch["segments"] = [objects_of(truth, np.unique(truth)) for truth in batch["truth"]]
    batch["objects"] = [objects_of(truth, np.setdiff1d(np.unique(truth), [0])) for truth in batch["truth"]]
    return batch


def objects_of(truth, labels):
    masks = [truth == label for label in labels]
    return {
        "boxes": np.zeros((len(labels), 4)),
        "labels": labels.astype(np.int64),
        "areas": np.array([float(one.sum()) for one in masks]),
        "crowd": np.zeros(len(labels), bool),
        "masks": [mask.encode(np.asfortranarray(one, np.uint8)) for one in masks],
    }


def trainer(tmp_path, **options):
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **({"max_steps": 2} | options),
    )


def one_step(task, tmp_path, data=None, **options):
    """The losses of the first step and the weights after it."""
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0, **options)
    run.fit(task, data or Scenes())
    return {name: value.item() for name, value in run.callback_metrics.items()}, task.state_dict()


def validate(task, data, tmp_path, **options):
    return trainer(tmp_path, **options).validate(task, data, verbose=False)[0]


def val_batches(data):
    data.setup("validate")
    return list(data.val_dataloader())


def by_hand(pairs):
    """mIoU, mean accuracy and accuracy of (found, truth) pairs, counted class by class."""
    found, truth = (np.concatenate([np.asarray(one).ravel() for one in side]) for side in zip(*pairs, strict=True))
    known = truth != 255
    found, truth = found[known], truth[known]
    ious, accuracies = [], []
    for label in range(NUM_CLASSES):
        right = ((found == label) & (truth == label)).sum()
        if either := ((found == label) | (truth == label)).sum():
            ious.append(right / either)
        if there := (truth == label).sum():
            accuracies.append(right / there)
    return {"val/miou": np.mean(ious), "val/macc": np.mean(accuracies), "val/aacc": (found == truth).mean()}


@pytest.mark.parametrize("kind", SEGMENTORS)
def test_bfloat16_steps_lose_what_float32_steps_lose(kind, tmp_path):
    expected, _ = one_step(build(kind), tmp_path)
    parts = [value for name, value in expected.items() if name.startswith("train/") and name != "train/loss"]
    # Float32 numbers added in another order.
    assert expected["train/loss"] == pytest.approx(sum(parts), rel=1e-5)
    for precision in ("bf16-mixed", "bf16-true"):
        losses, state = one_step(build(kind), tmp_path, precision=precision)
        # Eight bits of mantissa; other points of a mask may be drawn.
        assert losses["train/loss"] == pytest.approx(expected["train/loss"], rel=0.1), precision
        assert all(value.isfinite().all() for value in state.values())


def test_pixels_have_their_exact_place_in_a_bfloat16_run():
    with DtypeContext(torch.bfloat16):
        places = _centres([(1, 600)], torch.device("cpu"))
    assert torch.equal(places[:, 0], (torch.arange(600, dtype=torch.float32) + 0.5) / 600)


@pytest.mark.parametrize("kind", SEGMENTORS)
def test_activation_checkpointing_changes_nothing(kind, tmp_path):
    losses, state = one_step(build(kind), tmp_path)
    again, other = one_step(build(kind, checkpointing=True), tmp_path)
    assert again == losses
    for name, value in state.items():
        assert torch.equal(other[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEGMENTORS)
def test_a_compiled_backbone_has_the_loss_of_a_plain_one(kind, tmp_path):
    losses, _ = one_step(build(kind), tmp_path)
    compiled, state = one_step(build(kind, compile=True), tmp_path)
    # The compiler reorders sums; a point of a mask near a tie may be drawn or not.
    assert compiled["train/loss"] == pytest.approx(losses["train/loss"], rel=1e-3)
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("kind", SEGMENTORS)
def test_validation_is_a_metric_computed_by_hand_on_the_original_images(kind, tmp_path):
    task, data = build(kind).eval(), Scenes(evaluation={"short_side": 64, "long_side": 96})
    pairs = []
    with torch.no_grad():
        for batch in val_batches(data):
            (truth,) = batch["truth"]
            assert truth.shape != batch["image"].shape[-2:]
            scores = F.interpolate(task.model.scores(batch["image"]), truth.shape, mode="bilinear")
            pairs.append((scores[0].argmax(0), truth))
    numbers = validate(task, data, tmp_path)
    # Counts are whole numbers; ours divides in float64 too.
    assert numbers == pytest.approx(by_hand(pairs), rel=1e-6)
    assert set(trainer(tmp_path).test(task, data, verbose=False)[0]) == {"test/miou", "test/macc", "test/aacc"}


def test_padding_is_cut_off_before_the_map_is_enlarged(tmp_path):
    task, data = build().eval(), Scenes(eval_batch_size=5, evaluation={"multiple": None})
    (batch,) = val_batches(data)
    assert len(set(batch["valid"])) == 2
    with torch.no_grad():
        scores = task.model.scores(batch["image"])
    pairs = []
    for one, (height, width), truth in zip(scores, batch["valid"], batch["truth"], strict=True):
        pairs.append((F.interpolate(one[None, :, :height, :width], truth.shape, mode="bilinear")[0].argmax(0), truth))
    assert validate(task, data, tmp_path) == pytest.approx(by_hand(pairs), rel=1e-6)


def test_sliding_windows_see_no_more_than_a_window(tmp_path):
    seen = []
    task = build(window=SlidingWindow(crop=(32, 32), stride=(16, 16)))
    task.model.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    numbers = validate(task, Scenes(), tmp_path)
    assert set(seen) == {(32, 32)}
    assert len(seen) > 5 * 2
    whole = validate(build(window=SlidingWindow(crop=(96, 96), stride=(96, 96))), Scenes(), tmp_path)
    assert whole == validate(build(), Scenes(), tmp_path)
    assert numbers != whole


def test_probabilities_of_the_views_of_a_batch_are_averaged(tmp_path):
    task, data = build().eval(), Scenes(evaluation={"extra_flip": True, "extra_scales": (1.5,)})
    pairs = []
    with torch.no_grad():
        for batch in val_batches(data):
            (truth,) = batch["truth"]
            views = [batch | {"flipped": False}, *batch["views"]]
            assert len(views) == 4
            total = 0
            for view in views:
                height, width = view["valid"][0]
                scores = F.interpolate(
                    task.model.scores(view["image"][..., :height, :width]), truth.shape, mode="bilinear"
                )
                total = total + (scores.flip(-1) if view["flipped"] else scores).softmax(1)
            pairs.append((total[0].argmax(0), truth))
    numbers = validate(task, data, tmp_path)
    # Sums in another order may break a tie otherwise.
    assert numbers == pytest.approx(by_hand(pairs), abs=1e-3)
    assert numbers != validate(task, Scenes(), tmp_path)
    twice = build(test_time=inference.TestTime(flip=True))
    with pytest.raises(ValueError, match="the data gives 4 views of each image already"):
        validate(twice, data, tmp_path)
    assert validate(twice, Scenes(), tmp_path) != validate(task, Scenes(), tmp_path)


def test_an_image_that_comes_again_counts_once():
    task = build().eval()
    first, second, *_ = val_batches(Scenes())
    for batch in (first, second, first):
        task.validation_step(batch, 0)
    assert task.metric.counts.sum() == sum(batch["truth"][0].size for batch in (first, second))


def test_two_uneven_processes_count_what_one_counts(tmp_path):
    class Task(Segmentation):
        def setup(self, stage):
            torch.set_num_threads(1)  # a fork has none of its parent's threads and would wait for them
            super().setup(stage)

    torch.manual_seed(0)
    task = Task(internimage_debug(), NUM_CLASSES, torch.optim.AdamW, segmentor=segformer)
    one = validate(task, Scenes(), tmp_path)
    two = validate(task, Scenes(), tmp_path, devices=2, strategy="ddp_fork")
    assert two == one


def test_classes_are_logged_and_printed_on_request(tmp_path, monkeypatch):
    printed = []
    monkeypatch.setattr(task_module, "rank_zero_info", printed.append)
    task = build(per_class=True)
    numbers = validate(task, Scenes(), tmp_path)
    ious = [numbers[f"val/class/{name}/iou"] for name in ("ground", "class_1", "class_2", "class_3")]
    # Logged as float32.
    assert np.nanmean(ious) == pytest.approx(numbers["val/miou"], rel=1e-6)
    assert numbers.keys() >= {"val/class/ground/acc", "val/class/class_3/acc"}
    (table,) = printed
    assert [line.split()[0] for line in table.splitlines()] == ["class", "ground", "class_1", "class_2", "class_3"]
    trainer(tmp_path, max_steps=1, limit_val_batches=1).fit(task, Scenes())
    assert len(printed) == 1


def test_mask2former_is_evaluated_on_instances_and_segments_too(tmp_path):
    task = build("mask2former", evaluate=("instance", "panoptic"), things=(1, 2, 3), per_class=True)
    passes = []
    task.model.backbone.register_forward_pre_hook(lambda module, inputs: passes.append(1))
    numbers = validate(task, Scenes(objects=True), tmp_path)
    assert {"val/mask_ap", "val/pq", "val/pq_things", "val/class/ground/pq"} <= numbers.keys()
    assert len(passes) == 5
    semantic = validate(build("mask2former"), Scenes(), tmp_path)
    assert {name: numbers[name] for name in semantic} == semantic
    with pytest.raises(ValueError, match="the data gives no 'objects' to compare with"):
        validate(task, Scenes(), tmp_path)
    with pytest.raises(ValueError, match="a UPerNet finds no objects"):
        build("upernet", evaluate=("panoptic",))
    with pytest.raises(ValueError, match=r"things are \(1,\), and only `evaluate` looks at them"):
        build("mask2former", things=(1,))


def test_objects_are_trained_where_the_batch_has_them(tmp_path):
    """One object for each class is what the map says, so that the losses are the same."""
    expected, _ = one_step(build("mask2former"), tmp_path)
    losses, _ = one_step(build("mask2former"), tmp_path, Scenes(objects=True))
    assert losses == expected


def test_a_checkpoint_of_the_task_starts_another_one(tmp_path):
    first = build()
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(first, Scenes())
    path = tmp_path / "first.ckpt"
    run.save_checkpoint(path)

    def start(task):
        task.trainer = trainer(tmp_path)
        task.setup("fit")
        return task.model.state_dict()

    state = start(build(init_checkpoint=InitCheckpoint(source=str(path))))
    for name, value in first.model.state_dict().items():
        assert torch.equal(state[name], value), name
    own = build(num_classes=6, init_checkpoint=InitCheckpoint(source=str(path), head="new"))
    fresh = own.model.head.classifier.weight.clone()
    state = start(own)
    assert torch.equal(state["head.classifier.weight"], fresh)
    assert torch.equal(state["head.fuse.conv.weight"], first.model.head.fuse.conv.weight)
    with pytest.raises(CheckpointError, match="head='new'"):
        start(build(num_classes=6, init_checkpoint=InitCheckpoint(source=str(path))))
    with pytest.raises(CheckpointError, match="expected head='load' or 'new', and no scale"):
        start(build(init_checkpoint=InitCheckpoint(source=str(path), head="map", label_map="rows.txt")))


def test_a_segmentor_from_elsewhere_is_trained_and_gets_the_weights_of_its_backbone(tmp_path):
    class Linear(nn.Module):
        def __init__(self, backbone, num_classes):
            super().__init__()
            self.backbone, self.head = backbone, nn.Conv2d(backbone.widths[0], num_classes, 1)

        def scores(self, image):
            return F.interpolate(self.head(self.backbone(image)[0]), image.shape[-2:], mode="bilinear")

        def forward(self, image, mask):
            return {"pixels": F.cross_entropy(self.scores(image), mask, ignore_index=255)}

    source = build()
    path = tmp_path / "backbone.pth"
    torch.save({"state_dict": source.backbone.state_dict()}, path)
    task = build(segmentor=Linear, init_checkpoint=InitCheckpoint(source=str(path)))
    for parameter in task.backbone.parameters():
        nn.init.constant_(parameter, 0.5)
    task.trainer = trainer(tmp_path)
    task.setup("fit")
    for name, value in source.backbone.state_dict().items():
        assert torch.equal(task.backbone.state_dict()[name], value), name
    losses, _ = one_step(task, tmp_path)
    assert losses["train/pixels"] == losses["train/loss"]
    assert 0 <= validate(task, Scenes(), tmp_path)["val/miou"] <= 1


def test_the_task_keeps_names_and_colours_of_its_classes(tmp_path):
    task, data = build(), Scenes()
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(task, data)
    path = tmp_path / "names.ckpt"
    run.save_checkpoint(path)
    restored = build()
    restored.on_load_checkpoint(torch.load(path, weights_only=False))
    assert restored.class_names == ["ground", "class_1", "class_2", "class_3"]
    assert restored.palette == data.palette
    assert len(restored.palette) == NUM_CLASSES


def test_predictions_are_written_as_maps_of_the_original_size(tmp_path):
    task, data = build().eval(), Scenes(evaluation={"short_side": 64, "long_side": 96})
    trainer(tmp_path, callbacks=[task.prediction_writer(tmp_path / "out")]).predict(task, data)
    images = json.loads((tmp_path / "out" / "images.json").read_text())
    batches = val_batches(data)
    assert [entry["id"] for entry in images] == [batch["image_id"][0] for batch in batches]
    for entry, batch in zip(images, batches, strict=True):
        found = np.asarray(Image.open(tmp_path / "out" / entry["map"]))
        with torch.no_grad():
            scores = F.interpolate(task.model.scores(batch["image"]), batch["truth"][0].shape, mode="bilinear")
        assert np.array_equal(found, scores[0].argmax(0).numpy())
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 5
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert [tuple(entry["color"]) for entry in classes] == data.palette
