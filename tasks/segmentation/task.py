"""Semantic segmentation, and instance and panoptic segmentation by Mask2Former."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from datamodules.batch import MaskBatch, PanopticEvalBatch, ViewBatch
from internimage import Backbone
from internimage.checkpoints import Report
from tasks.attention import is_sampling_offset
from tasks.base import InitCheckpoint, Task
from tasks.segmentation.checkpoints import load_segmentor
from tasks.segmentation.inference import Scorer, SlidingWindow, TestTime, segment
from tasks.segmentation.mask2former import Mask2Former
from tasks.segmentation.mask2former_inference import semantic_scores
from tasks.segmentation.metrics import SegmentationMetric, class_table
from tasks.segmentation.panoptic_metrics import ObjectMetrics, Objects
from tasks.segmentation.segformer import SegFormer
from tasks.segmentation.upernet import UPerNet
from tasks.segmentation.writer import SegmentationPrediction, SegmentationWriter

# From a backbone and the number of classes to a segmentor: any class of `tasks.segmentation`, or one's own.
SegmentorFactory = Callable[[Backbone, int], nn.Module]

# Layers of Mask2Former that learn like the stem.
_LIKE_STEM = (
    "model.decoder.class_predictor.",
    "model.decoder.decoder.mask_predictor.",
    "model.decoder.level_embed.",
    "model.decoder.queries_embedder.",
    "model.decoder.queries_features.",
)


class Segmentation(Task):
    """Segmentor trained on maps of classes, or Mask2Former on the masks of objects.

    A segmentor is a module with a `backbone` that maps `(image, mask)` to a dict of weighted losses. Its method
    `scores` maps images to scores of all classes at every pixel (see `tasks.segmentation.UPerNet`).

    Validation compares with the annotation at its own size, in one confusion matrix over all processes, and counts an
    image that comes again once. The datamodules of this project give each image to one process alone; another's
    sampler may fill up the shares of the processes, of which a warning tells.

    Layer-wise learning rates follow the authors' segmentors: the head is a layer of its own above the last block. Of
    Mask2Former the classifier, the mask and level embeddings and the queries learn like the stem, so that with a
    small `layer_decay` classes of one's own are learned slowly.

    Args:
        backbone: Gives the features.
        num_classes: Number of classes. The command line takes it from the data; leave it out of YAML.
        optimizer: See `Task`.
        segmentor: Makes the segmentor from the backbone and the number of classes.
        window: Evaluate and predict by sliding windows, not whole images.
        test_time: Average over scales and mirror images made from the batch, where the data gives no views.
        evaluate: What Mask2Former is evaluated on beside its semantic map: `instance` (average precision as
            `val/mask_ap`), `panoptic` (quality as `val/pq`), always on whole images, for which the batches need more
            keys: see `datamodules.batch.PanopticEvalBatch`.
        things: Classes that are objects, for `evaluate`; the others are stuff. None: all.
        per_class: Log the numbers of each class too, and print them as a table after `validate` and `test`.
        sampling_lr_multiplier: Factor on the learning rate of the sampling offsets of deformable attention.
        **recipe: Optimizer, schedule, freezing and initial weights: see `Task`.

    Raises:
        ValueError: An argument is out of its range, or `evaluate` asks a segmentor without queries for objects.
    """

    headline = "val/miou"
    dense = True
    data_attributes = ("class_names", "palette", "num_used_classes")
    palette: list[tuple[int, int, int]] | None
    num_used_classes: int | None

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        optimizer: OptimizerCallable,
        segmentor: SegmentorFactory = UPerNet,
        window: SlidingWindow | None = None,
        test_time: TestTime | None = None,
        evaluate: tuple[Objects, ...] = (),
        things: tuple[int, ...] | None = None,
        per_class: bool = False,
        sampling_lr_multiplier: float = 1.0,
        **recipe: Any,
    ) -> None:
        super().__init__(segmentor(backbone, num_classes), optimizer=optimizer, **recipe)
        if evaluate and not isinstance(self.model, Mask2Former):
            raise ValueError(
                f"Segmentation: evaluate is {evaluate}, and a {type(self.model).__name__} finds no objects. Take "
                "Mask2Former, or leave it out."
            )
        if things is not None and not evaluate:
            raise ValueError(f"Segmentation: things are {things}, and only `evaluate` looks at them. Leave them out.")
        self.num_classes = num_classes
        self.window = window
        self.test_time = test_time
        self.per_class = per_class
        self.sampling_lr_multiplier = sampling_lr_multiplier
        self.metric = SegmentationMetric(num_classes)
        self.objects = ObjectMetrics(evaluate, num_classes, things, per_class) if evaluate else None

    @property
    def scorer(self) -> Scorer:
        """The model's scores of all classes at every pixel."""
        scorer: Any = self.model.scores
        return scorer  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.metric.num_used = self.num_used_classes
        if self.objects is not None:
            self.objects.prepare(self.class_names)

    def training_step(self, batch: MaskBatch, batch_idx: int) -> Tensor:
        target = batch["target"] if isinstance(self.model, Mask2Former) and "target" in batch else batch["mask"]
        losses: dict[str, Tensor] = self.model(batch["image"], target)
        loss = torch.stack(list(losses.values())).sum()
        self.log_step(loss, len(batch["image"]))
        self.log_dict({f"train/{name}": part for name, part in losses.items()}, batch_size=len(batch["image"]))
        return loss

    def validation_step(self, batch: PanopticEvalBatch, batch_idx: int) -> None:
        truth = [torch.tensor(one) for one in batch["truth"]]
        self.metric.update(self._evaluate(batch), truth, batch["image_id"])

    def test_step(self, batch: PanopticEvalBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: ViewBatch, batch_idx: int) -> SegmentationPrediction:
        maps = segment(self.scorer, batch, window=self.window, test_time=self.test_time)
        return SegmentationPrediction(
            path=batch["path"],
            image_id=batch["image_id"],
            original_size=batch["original_size"],
            maps=[one.to(torch.uint8) for one in maps],
        )

    def prediction_writer(self, folder: Path) -> SegmentationWriter:
        return SegmentationWriter(folder)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test")

    def load_weights(self, init: InitCheckpoint) -> Report:
        # A segmentor from elsewhere gets the weights of its backbone.
        known = isinstance(self.model, UPerNet | SegFormer | Mask2Former)
        return self.load_dense(init, load_segmentor if known else None)

    def lr_scales(self) -> dict[str, float]:
        scales = super().lr_scales()
        stem = self.layer_decay ** len(self.backbone.layer_groups())
        for name, _ in self.named_parameters():
            if isinstance(self.model, Mask2Former) and name.startswith(_LIKE_STEM):
                scales[name] = stem
            elif is_sampling_offset(name):
                scales[name] = self.sampling_lr_multiplier
        return scales

    def is_undecayed(self, name: str) -> bool:
        return is_sampling_offset(name)

    def _evaluate(self, batch: PanopticEvalBatch) -> list[Tensor]:
        """Return the class maps of a batch; count its objects on the way."""
        if self.objects is not None:
            prediction = self.model(batch["image"])
            self.objects.update(prediction, batch)
            if self.window is None and self.test_time is None and "views" not in batch:
                # Once through the network is enough.
                return segment(lambda image: semantic_scores(prediction, image.shape[-2:]), batch)
        return segment(self.scorer, batch, window=self.window, test_time=self.test_time)

    def _log_metrics(self, stage: str) -> None:
        # Every rank has the same numbers.
        scores = self.metric.compute()
        numbers = {name: float(scores[name]) for name in ("miou", "macc", "aacc")}
        if self.per_class:
            names = self.class_names or [str(label) for label in range(self.num_classes)]
            for label, name in enumerate(names):
                numbers[f"class/{name}/iou"] = float(scores["class_iou"][label])
                numbers[f"class/{name}/acc"] = float(scores["class_accuracy"][label])
            if self.trainer.state.fn != "fit":
                rank_zero_info(class_table(scores, self.class_names))
        if self.objects is not None:
            numbers |= self.objects.compute()
            self.objects.reset()
        self.log_dict({f"{stage}/{name}": value for name, value in numbers.items()})
        self.metric.reset()
