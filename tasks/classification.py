"""Image classification."""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice

from datamodules.batch import ClassificationBatch, PredictBatch
from internimage import Backbone, Classifier, ConvHead, HeadFactory
from tasks.base import Task
from tasks.predictions import ClassPrediction, PredictionWriter


class Classification(Task):
    """Classifier trained with cross entropy, on whole or mixed images.

    Each training batch is mixed as a whole, by mixup or by cutmix, when one of their alphas is above 0. An image's
    partner is its neighbour in the batch (the authors' code pairs first with last).

    Args:
        backbone: Gives the features.
        num_classes: Length of the logits. The command line takes it from the data; leave it out of YAML.
        optimizer: See `Task`.
        head: Makes the head from `(backbone.widths, num_classes)`.
        label_smoothing: Probability mass that is spread evenly over all classes, 0 to 1; with mixed labels too.
        mixup_alpha: Both parameters of the Beta distribution of mixup's weight; 0 turns mixup off.
        cutmix_alpha: The same for cutmix's area.
        cutmix_probability: Share of batches that cutmix gets where both are on.
        **recipe: Optimizer, schedule, freezing and initial weights: see `Task`.

    Raises:
        ValueError: An argument is out of its range.
    """

    headline = "val/top1"
    num_predictions = 5

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        optimizer: OptimizerCallable,
        head: HeadFactory = ConvHead,
        label_smoothing: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        cutmix_probability: float = 0.5,
        **recipe: Any,
    ) -> None:
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"Classification: label_smoothing is {label_smoothing}, expected 0 to 1.")
        super().__init__(Classifier(backbone, num_classes, head), optimizer=optimizer, **recipe)
        self.label_smoothing = label_smoothing
        self.mix = _mixer(num_classes, mixup_alpha, cutmix_alpha, cutmix_probability)
        # Without torchmetrics' checks of every batch, which wait for the device.
        self.loss = MeanMetric(nan_strategy="disable")
        self.top1 = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.top5 = MulticlassAccuracy(num_classes, average="micro", top_k=min(5, num_classes), validate_args=False)

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, 3, H, W)` images to `(B, num_classes)` logits."""
        logits: Tensor = self.model(image)
        return logits

    def training_step(self, batch: ClassificationBatch, batch_idx: int) -> Tensor:
        image, target = batch["image"], batch["label"]
        if self.mix is not None:
            image, target = self.mix(image, target)  # the target is now (B, num_classes), float
        loss = self._cross_entropy(self(image), target)
        self.log_step(loss, len(image))
        return loss

    def validation_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: ClassificationBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: PredictBatch, batch_idx: int) -> ClassPrediction:
        probability = self(batch["image"]).float().softmax(1)
        best = probability.topk(min(self.num_predictions, probability.shape[1]))
        return {"path": batch["path"], "probability": best.values, "label": best.indices}

    def prediction_writer(self, folder: Path) -> PredictionWriter:
        return PredictionWriter(folder)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the smoothed loss, in float32, for class numbers or for mixed labels `(B, num_classes)`."""
        if target.is_floating_point():
            target = target.float()
        return F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)

    def _evaluate(self, batch: ClassificationBatch, stage: str) -> None:
        logits, label = self(batch["image"]).float(), batch["label"]
        if "valid" in batch:
            logits, label = logits[batch["valid"]], label[batch["valid"]]
        # A rank's last batch may only fill up, and torchmetrics cannot count none.
        if len(label):
            # One loss for each sample: torchmetrics 1.9 ignores weights where it does not look for NaN.
            self.loss.update(F.cross_entropy(logits, label, reduction="none"))
            self.top1.update(logits, label)
            self.top5.update(logits, label)
        # Lightning computes these from the sums of all ranks when the epoch ends.
        self.log(f"{stage}/loss", self.loss, batch_size=len(label))
        self.log(f"{stage}/top1", self.top1, prog_bar=True, batch_size=len(label))
        self.log(f"{stage}/top5", self.top5, prog_bar=True, batch_size=len(label))


def _mixer(num_classes: int, mixup_alpha: float, cutmix_alpha: float, cutmix_probability: float) -> nn.Module | None:
    """Build the transform of `(image, label)` batches, or None where nothing is to be mixed."""
    for name, alpha in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
        if alpha < 0:
            raise ValueError(f"Classification: {name} is {alpha}, expected a positive number, or 0 to turn it off.")
    if not 0 <= cutmix_probability <= 1:
        raise ValueError(f"Classification: cutmix_probability is {cutmix_probability}, expected 0 to 1.")
    mixup = MixUp(alpha=mixup_alpha, num_classes=num_classes) if mixup_alpha else None
    cutmix = CutMix(alpha=cutmix_alpha, num_classes=num_classes) if cutmix_alpha else None
    if mixup is None or cutmix is None:
        only: nn.Module | None = mixup or cutmix
        return only
    both: nn.Module = RandomChoice([mixup, cutmix], p=[1 - cutmix_probability, cutmix_probability])
    return both
