"""Losses of the two-stage detectors, in float32 and summed: who calls knows what to divide by.

Shapes: N boxes.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from tasks.detection.boxes import DeltaCoder

# From (coder, reference boxes, predicted deltas, true boxes), each (N, 4), to a sum over the boxes.
BoxLoss = Callable[[DeltaCoder, Tensor, Tensor, Tensor], Tensor]

# Weight of the GIoU loss beside the class loss in the authors' Cascade Mask R-CNN.
GIOU_WEIGHT = 10.0


def delta_l1(coder: DeltaCoder, reference: Tensor, deltas: Tensor, truth: Tensor) -> Tensor:
    """Absolute difference of deltas."""
    return F.l1_loss(deltas.float(), coder.encode(reference, truth), reduction="sum")


def delta_smooth_l1(
    coder: DeltaCoder, reference: Tensor, deltas: Tensor, truth: Tensor, *, beta: float = 1.0
) -> Tensor:
    """Absolute difference of deltas, quadratic below `beta`."""
    return F.smooth_l1_loss(deltas.float(), coder.encode(reference, truth), beta=beta, reduction="sum")


def proposal_smooth_l1(coder: DeltaCoder, reference: Tensor, deltas: Tensor, truth: Tensor) -> Tensor:
    """Absolute difference of deltas, quadratic below 1/9: the proposals of Cascade R-CNN."""
    return delta_smooth_l1(coder, reference, deltas, truth, beta=1 / 9)


def decoded_giou(coder: DeltaCoder, reference: Tensor, deltas: Tensor, truth: Tensor) -> Tensor:
    """Ten times (1 - GIoU) of the decoded boxes."""
    loss: Tensor = generalized_box_iou_loss(coder.decode(reference, deltas), truth.float(), reduction="sum")
    return GIOU_WEIGHT * loss


def class_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of `(N, num_classes + 1)` logits, background last; 0 without boxes."""
    return F.cross_entropy(logits.float(), label, reduction="sum")


def mask_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross entropy of `(N, h, w)` logits against masks of 0 and 1, a mean over each mask; 0 without boxes."""
    total = F.binary_cross_entropy_with_logits(logits.float(), truth.float(), reduction="sum")
    return total / max(logits.shape[-2] * logits.shape[-1], 1)
