"""The detection task by the trainer's door: steps in every mode, metrics, checkpoints, predictions."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import DetectionEvalTransform, DetectionTrainTransform, SyntheticDetection
from internimage import internimage_debug
from internimage.checkpoints import CheckpointError
from tasks import Detection, InitCheckpoint
from tasks.detection import DINO, CascadeMaskRCNN, MaskRCNN
from tasks.detection.metrics import CocoAP

SMALL = {"short_sides": (48,), "long_side": 64}


def dino(backbone, num_classes):
    return DINO(backbone, num_classes, num_queries=20, denoising_queries=8, dim=64, hidden_dim=64, num_layers=2)


def mask_rcnn(backbone, num_classes):
    return MaskRCNN(backbone, num_classes, channels=32, hidden_dim=64, rpn_samples=64, roi_samples=32)


DETECTORS = {"mask_rcnn": mask_rcnn, "dino": dino}


def build(kind="mask_rcnn", checkpointing=False, **options):
    torch.manual_seed(0)
    stages = (1, 2, 3) if kind == "dino" else (0, 1, 2, 3)
    backbone = internimage_debug(out_indices=stages, activation_checkpointing=checkpointing)
    defaults = {"num_classes": 3, "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)}
    return Detection(backbone, detector=DETECTORS[kind], **(defaults | options))


def data(**options):
    sizes = {"image_size": 64, "num_samples": 8, "num_val_samples": 6, "batch_size": 2}
    return SyntheticDetection(
        train_transform=DetectionTrainTransform(**SMALL),
        eval_transform=DetectionEvalTransform(short_side=48, long_side=64, extra_flip=options.pop("extra_flip", False)),
        **(sizes | options),
    )


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


def one_step(task, tmp_path, **options):
    """The loss of the first step and the weights after it."""
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0, **options)
    run.fit(task, data())
    return run.callback_metrics["train/loss"].item(), task.state_dict()


@pytest.mark.parametrize("kind", DETECTORS)
def test_bfloat16_steps_lose_what_float32_steps_lose(kind, tmp_path):
    expected, _ = one_step(build(kind), tmp_path)
    for precision in ("bf16-mixed", "bf16-true"):
        loss, state = one_step(build(kind), tmp_path, precision=precision)
        # Eight bits of mantissa; other proposals may be sampled, and other queries picked.
        assert loss == pytest.approx(expected, rel=0.25), precision
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("kind", DETECTORS)
def test_activation_checkpointing_changes_nothing(kind, tmp_path):
    loss, state = one_step(build(kind), tmp_path)
    again, other = one_step(build(kind, checkpointing=True), tmp_path)
    assert again == loss
    for name, value in state.items():
        assert torch.equal(other[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", DETECTORS)
def test_a_compiled_backbone_has_the_loss_of_a_plain_one(kind, tmp_path):
    loss, _ = one_step(build(kind), tmp_path)
    compiled, state = one_step(build(kind, compile=True), tmp_path)
    # The compiler reorders sums; a proposal or a query near a tie may change places.
    assert compiled == pytest.approx(loss, rel=1e-3)
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.slow
def test_a_compiled_backbone_takes_images_of_several_sizes(tmp_path):
    plain, compiled = build(), build(compile=True)
    compiled.trainer = trainer(tmp_path)
    compiled.setup("fit")
    for height, width in ((64, 96), (96, 64), (96, 96)):
        image = torch.randn(2, 3, height, width)
        for one, other in zip(compiled.backbone(image), plain.backbone(image), strict=True):
            # The compiler reorders sums; five blocks deep.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_validation_logs_average_precision_of_boxes_and_masks(tmp_path):
    run = trainer(tmp_path)
    numbers = run.validate(build(metric=CocoAP(per_class=True)), data(), verbose=False)[0]
    assert {"val/box_ap", "val/box_ap50", "val/mask_ap", "val/class/class_2/box_ap"} <= numbers.keys()
    assert all(value != value or 0 <= value <= 1 for value in numbers.values())
    assert "test/box_ap" in run.test(build(), data(), verbose=False)[0]


def test_views_of_test_time_augmentation_are_merged(tmp_path):
    task = build()
    run = trainer(tmp_path)
    datamodule = data(extra_flip=True)
    run.validate(task, datamodule, verbose=False)
    batch = next(iter(datamodule.val_dataloader()))
    assert [view["flipped"] for view in batch["views"]] == [True]


def test_a_checkpoint_of_the_task_starts_another_one(tmp_path):
    first = build()
    run = trainer(tmp_path)
    run.fit(first, data())
    path = tmp_path / "first.ckpt"
    run.save_checkpoint(path)
    second = build(init_checkpoint=InitCheckpoint(source=str(path)))
    second.trainer = trainer(tmp_path)
    second.setup("fit")
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    own = build(num_classes=5, init_checkpoint=InitCheckpoint(source=str(path), head="new"))
    classes, boxes = own.model.roi.box_heads[0].classes.weight.clone(), own.model.rpn.conv.weight.clone()
    own.trainer = trainer(tmp_path)
    own.setup("fit")
    assert torch.equal(own.model.roi.box_heads[0].classes.weight, classes)
    assert not torch.equal(own.model.rpn.conv.weight, boxes)
    wrong = build(num_classes=5, init_checkpoint=InitCheckpoint(source=str(path)))
    wrong.trainer = trainer(tmp_path)
    with pytest.raises(CheckpointError, match="head='new'"):
        wrong.setup("fit")
    mapped = build(init_checkpoint=InitCheckpoint(source=str(path), head="map", label_map="rows.txt"))
    mapped.trainer = trainer(tmp_path)
    with pytest.raises(CheckpointError, match="expected head='load' or 'new', and no scale"):
        mapped.setup("fit")


def test_the_task_keeps_names_and_ids_of_its_classes(tmp_path):
    task = build()
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(task, data())
    path = tmp_path / "names.ckpt"
    run.save_checkpoint(path)
    restored = build()
    restored.on_load_checkpoint(torch.load(path, weights_only=False))
    assert restored.class_names == ["class_0", "class_1", "class_2"]
    assert restored.category_ids == [1, 2, 3]


def test_predictions_are_written_as_coco_results(tmp_path):
    task = build()
    datamodule = data()
    writer = task.prediction_writer(tmp_path / "out")
    run = trainer(tmp_path, callbacks=[writer])
    run.predict(task, datamodule, return_predictions=False)
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(list((tmp_path / "out" / "images").iterdir())) == 6
    assert all({"image_id", "category_id", "bbox", "score", "segmentation"} <= result.keys() for result in results)


def test_synchronised_batch_norm_is_plain_on_one_cpu_process_and_says_so(tmp_path):
    detector = partial(CascadeMaskRCNN, channels=32, hidden_dim=64)
    task = Detection(internimage_debug(), 3, lambda groups: torch.optim.AdamW(groups, lr=1e-3), detector=detector)
    with pytest.warns(UserWarning, match="SyncBatchNorm: 1 process on cpu"):
        one_step(task, tmp_path)
