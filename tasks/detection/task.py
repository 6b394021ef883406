"""Object detection and instance segmentation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from datamodules.batch import DetectionBatch, DetectionEvalBatch, ViewBatch
from internimage import Backbone
from internimage.checkpoints import Report
from tasks.attention import is_sampling_offset
from tasks.base import InitCheckpoint, Task
from tasks.detection.checkpoints import load_detector
from tasks.detection.dino import DINO
from tasks.detection.mask_rcnn import RCNN, MaskRCNN
from tasks.detection.metrics import CocoAP, DetectionMetric
from tasks.detection.tta import MERGE, DetectionPrediction, MergeViews, detect
from tasks.detection.writer import DetectionWriter

# From a backbone and the number of classes to a detector: any class of `tasks.detection`, or one's own.
DetectorFactory = Callable[[Backbone, int], nn.Module]

# What a transformer calls its level codes.
_LEVEL_EMBEDS = "level_embeds"


class Detection(Task):
    """Detector trained on boxes, and on masks where it has a mask head.

    A detector is a module with a `backbone` that maps `(image, sizes, target)` to a dict of weighted losses, or without
    a target to `Detections` (see `tasks.detection.MaskRCNN`).

    Layer-wise learning rates follow the authors' detectors: the head is a layer of its own above the last block, and
    the level codes of a transformer learn like the stem.

    Args:
        backbone: Gives the features.
        num_classes: Number of classes. The command line takes it from the data; leave it out of YAML.
        optimizer: See `Task`.
        detector: Makes the detector from the backbone and the number of classes.
        metric: What validation computes; by default COCO's average precision of boxes, and of masks if there are any.
        merge: How the detections of several views of an image become one list, where the data has views.
        sampling_lr_multiplier: Factor on the learning rate of the sampling offsets of deformable attention.
        **recipe: Optimizer, schedule, freezing and initial weights: see `Task`.

    Raises:
        ValueError: An argument is out of its range.
    """

    headline = "val/box_ap"
    dense = True
    data_attributes = ("class_names", "category_ids", "class_frequency")
    category_ids: list[int] | None
    class_frequency: list[str] | None

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        optimizer: OptimizerCallable,
        detector: DetectorFactory = MaskRCNN,
        metric: DetectionMetric | None = None,
        merge: MergeViews = MERGE,
        sampling_lr_multiplier: float = 1.0,
        **recipe: Any,
    ) -> None:
        super().__init__(detector(backbone, num_classes), optimizer=optimizer, **recipe)
        self.sampling_lr_multiplier = sampling_lr_multiplier
        self.merge = merge
        self.metric = CocoAP() if metric is None else metric

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.metric.prepare(
            class_names=self.class_names, category_ids=self.category_ids, class_frequency=self.class_frequency
        )

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        losses: dict[str, Tensor] = self.model(batch["image"], batch["valid"], batch["target"])
        loss = torch.stack(list(losses.values())).sum()
        self.log_step(loss, len(batch["image"]))
        self.log_dict({f"train/{name}": part for name, part in losses.items()}, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: DetectionEvalBatch, batch_idx: int) -> None:
        self.metric.update(
            detect(self.model, batch, self.merge), batch["image_id"], batch["truth"], batch["original_size"]
        )

    def test_step(self, batch: DetectionEvalBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> DetectionPrediction:
        return DetectionPrediction(
            path=batch["path"],
            image_id=batch["image_id"],
            original_size=batch["original_size"],
            detections=detect(self.model, batch, self.merge),
        )

    def prediction_writer(self, folder: Path) -> DetectionWriter:
        return DetectionWriter(folder)

    def on_validation_epoch_end(self) -> None:
        self._log_metric("val")

    def on_test_epoch_end(self) -> None:
        self._log_metric("test")

    def load_weights(self, init: InitCheckpoint) -> Report:
        # A detector from elsewhere gets the weights of its backbone.
        return self.load_dense(init, load_detector if isinstance(self.model, RCNN | DINO) else None)

    def lr_scales(self) -> dict[str, float]:
        scales = super().lr_scales()
        stem = self.layer_decay ** len(self.backbone.layer_groups())
        for name, _ in self.named_parameters():
            if name.endswith(_LEVEL_EMBEDS):
                scales[name] = stem
            elif is_sampling_offset(name):
                scales[name] = self.sampling_lr_multiplier
        return scales

    def is_undecayed(self, name: str) -> bool:
        return is_sampling_offset(name)

    def _log_metric(self, stage: str) -> None:
        # Every rank has the same numbers.
        self.log_dict({f"{stage}/{name}": value for name, value in self.metric.compute().items()})
        if self.metric.per_class and self.trainer.state.fn != "fit":
            rank_zero_info(f"\n{self.metric.table()}")
        self.metric.reset()
