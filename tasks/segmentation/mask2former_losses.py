"""Matching and losses of Mask2Former, in float32 whatever the precision of the network.

Shapes: B batch, Q queries, K classes, N masks of an image, H W size of the image.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from datamodules.batch import MaskTarget
from tasks.detection.dino_losses import Pairs
from tasks.layers import mean_counts
from tasks.segmentation.losses import IGNORE_INDEX
from tasks.segmentation.mask2former_layers import MaskPrediction

# In the cost of a pair and in the loss.
CLASS_WEIGHT, MASK_WEIGHT, DICE_WEIGHT = 2.0, 5.0, 5.0
# Of a query without an object in the class loss.
NO_OBJECT_WEIGHT = 0.1
# The loss draws so many times the points of a mask, keeps for this share the most uncertain and redraws the others.
OVERSAMPLE, UNCERTAIN_SHARE = 3.0, 0.75


def masks_of_classes(label: Tensor) -> list[MaskTarget]:
    """Turn maps of classes `(B, H, W)` into one mask for each class present, ascending; 255 belongs to none."""
    targets = []
    for one in label:
        classes = one.unique()
        classes = classes[classes != IGNORE_INDEX]
        targets.append(MaskTarget(labels=classes.long(), masks=one == classes[:, None, None]))
    return targets


class MaskLosses:
    """Pairs queries with masks and compares them, layer by layer, with transformers' matcher and mask losses.

    No module, since it has no weights.

    Args:
        num_classes: K.
        num_points: Random points at which two masks are compared.
    """

    def __init__(self, num_classes: int, num_points: int = 12544) -> None:
        self.num_classes = num_classes
        config = Mask2FormerConfig(
            train_num_points=num_points,
            oversample_ratio=OVERSAMPLE,
            importance_sample_ratio=UNCERTAIN_SHARE,
            class_weight=CLASS_WEIGHT,
            mask_weight=MASK_WEIGHT,
            dice_weight=DICE_WEIGHT,
        )
        # Its `forward` is not used: that divides by the masks of this process alone, and its class loss needs a buffer.
        self._transformers = Mask2FormerLoss(config, weight_dict={})

    def __call__(self, layers: Sequence[MaskPrediction], targets: Sequence[MaskTarget]) -> dict[str, Tensor]:
        """Return every loss of a batch, weighted; their sum is the total.

        Args:
            layers: The predictions, first to last.
            targets: Of each image.

        Returns:
            `layer<i>_*` with `class`, `mask` and `dice` each. Sums over masks are divided by the mean number of masks
            over all processes; the class loss is a mean over the queries of this process, as the authors have it.

        Raises:
            ValueError: A label is not in [0, K), or an image has not as many labels as masks.
        """
        for one in targets:
            self._check(one)
        classes = layers[0].classes
        num_masks = mean_counts([sum(len(one["labels"]) for one in targets)], classes.device)[0]
        targets = [MaskTarget(labels=one["labels"], masks=one["masks"].float()) for one in targets]
        losses = {}
        with torch.autocast(classes.device.type, enabled=False), _float32_by_default():
            for number, layer in enumerate(layers):
                prediction = MaskPrediction(layer.classes.float(), layer.masks.float())
                pairs = self.match(prediction, targets)
                mask, dice = self._mask_losses(prediction.masks, targets, pairs, num_masks)
                losses[f"layer{number}_class"] = CLASS_WEIGHT * self._class_loss(prediction.classes, targets, pairs)
                losses[f"layer{number}_mask"] = MASK_WEIGHT * mask
                losses[f"layer{number}_dice"] = DICE_WEIGHT * dice
        return losses

    def match(self, prediction: MaskPrediction, targets: Sequence[MaskTarget]) -> list[Pairs]:
        """Pair queries with masks at the least total cost, compared at random points; index vectors on the CPU."""
        labels = [one["labels"] for one in targets]
        masks = [one["masks"].float() for one in targets]
        with _float32_by_default():
            found = self._transformers.matcher(prediction.masks.detach(), prediction.classes.detach(), masks, labels)
        return [Pairs(query, number) for query, number in found]

    def _class_loss(self, logits: Tensor, targets: Sequence[MaskTarget], pairs: Sequence[Pairs]) -> Tensor:
        expected = torch.full(logits.shape[:2], self.num_classes, device=logits.device)
        for row, one, pair in zip(expected, targets, pairs, strict=True):
            row[pair.query] = one["labels"][pair.object]
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = NO_OBJECT_WEIGHT
        return F.cross_entropy(logits.transpose(1, 2), expected, weight)

    def _mask_losses(
        self, logits: Tensor, targets: Sequence[MaskTarget], pairs: Sequence[Pairs], num_masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        masks, indices = [one["masks"] for one in targets], [(pair.query, pair.object) for pair in pairs]
        # Annotated there as what it is not.
        losses = self._transformers.loss_masks(logits, masks, indices, num_masks)  # type: ignore[arg-type]
        return losses["loss_mask"], losses["loss_dice"]

    def _check(self, target: MaskTarget) -> None:
        labels, masks = target["labels"], target["masks"]
        if masks.ndim != 3 or labels.shape != masks.shape[:1]:
            raise ValueError(
                f"Mask2Former: labels have shape {tuple(labels.shape)} and masks {tuple(masks.shape)}, expected (N,) "
                "and (N, H, W) for the N masks of an image."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"Mask2Former: labels are {sorted(set(labels.tolist()))}, expected 0 to {self.num_classes - 1}, "
                f"and {IGNORE_INDEX} in a map where no class is known. num_classes={self.num_classes} may be too small."
            )


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Let transformers draw float32 points, which it samples the masks at, in a run that is bfloat16 throughout."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
