"""Matching and losses of DINO, in float32 whatever the precision of the network.

Shapes: B batch, Q queries, N objects of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from datamodules.batch import DetectionTarget
from tasks.detection.dino_transformer import Prediction
from tasks.layers import mean_counts

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
# Of the class, the box's L1 distance and its GIoU: in the cost of a pair and in the loss.
CLASS_COST, BOX_COST, GIOU_COST = 2.0, 5.0, 2.0
CLASS_WEIGHT, BOX_WEIGHT, GIOU_WEIGHT = 1.0, 5.0, 2.0
# Replaces a cost that is not a number, so that a diverging model fails in its loss and not in the matching.
WORST_COST = 100.0


@dataclass(frozen=True)
class Truth:
    """Objects of one image.

    Attributes:
        boxes: `(N, 4)` float32, (cx, cy, w, h) over the size of the unpadded image.
        labels: `(N,)` int64.
        scale: `(4,)`, the image's (width, height, width, height) in pixels.
    """

    boxes: Tensor
    labels: Tensor
    scale: Tensor

    @classmethod
    def from_target(cls, target: DetectionTarget, size: Sequence[int]) -> "Truth":
        """Take the boxes of a target in pixels over the (height, width) of its image."""
        boxes = target["boxes"].float()
        scale = boxes.new_tensor([size[1], size[0]] * 2)
        return cls(box_convert(boxes / scale, "xyxy", "cxcywh"), target["labels"], scale)

    def pixels(self, boxes: Tensor) -> Tensor:
        """Map boxes `(M, 4)` over the image's size to (x1, y1, x2, y2) in pixels."""
        return box_convert(boxes, "cxcywh", "xyxy") * self.scale  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Pairs:
    """Which query is to become which object, for one image: two index vectors of equal length."""

    query: Tensor
    object: Tensor


@torch.no_grad()
def match(predictions: Sequence[Prediction], truth: Sequence[Truth]) -> list[list[Pairs]]:
    """Pair queries with objects at the least total cost (Hungarian algorithm): pairs[prediction][image].

    All costs go to the CPU in one transfer.
    """
    costs = [
        pair_costs(Prediction(logits, boxes), one)
        for prediction in predictions
        for logits, boxes, one in zip(prediction.logits, prediction.boxes, truth, strict=True)
    ]
    flat = torch.split(torch.cat([cost.flatten() for cost in costs]).cpu(), [cost.numel() for cost in costs])
    device = costs[0].device
    pairs = []
    for cost, values in zip(costs, flat, strict=True):
        query, number = linear_sum_assignment(values.view_as(cost).numpy())
        pairs.append(Pairs(torch.from_numpy(query).to(device), torch.from_numpy(number).to(device)))
    return [pairs[start : start + len(truth)] for start in range(0, len(pairs), len(truth))]


def pair_costs(prediction: Prediction, truth: Truth) -> Tensor:
    """Return the cost `(Q, N)` of pairing each query of one image with each of its objects."""
    # Explicitly in float32, since autocast would run `cdist` in it but the sums before it in less.
    logits, boxes = prediction.logits.float()[:, truth.labels], prediction.boxes.float()
    probability = logits.sigmoid()
    found = -(probability + 1e-12).log() * FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA
    missed = -(1 - probability + 1e-12).log() * (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA
    overlap = generalized_box_iou(truth.pixels(boxes), truth.pixels(truth.boxes))
    distance = (boxes[:, None] - truth.boxes).abs().sum(-1)
    cost: Tensor = CLASS_COST * (found - missed) + BOX_COST * distance - GIOU_COST * overlap
    return cost.nan_to_num(WORST_COST, WORST_COST, -WORST_COST)


def denoising_pairs(truth: Sequence[Truth], num_groups: int) -> list[Pairs]:
    """Pair the denoising queries with the objects that they were made of; the second half of a group with none."""
    width = 2 * max(len(one.labels) for one in truth)
    pairs = []
    for one in truth:
        number = torch.arange(len(one.labels), device=one.labels.device)
        start = width * torch.arange(num_groups, device=number.device)
        pairs.append(Pairs((start[:, None] + number).flatten(), number.repeat(num_groups)))
    return pairs


def set_loss(
    prediction: Prediction, truth: Sequence[Truth], pairs: Sequence[Pairs], count: Tensor
) -> dict[str, Tensor]:
    """Return the weighted losses `class`, `box` and `giou`, each a sum over the batch divided by `count`."""
    logits, boxes = prediction.logits.float(), prediction.boxes.float()
    expected = torch.zeros_like(logits)
    found, wanted, found_pixels, wanted_pixels = [], [], [], []
    for image, (one, pair) in enumerate(zip(truth, pairs, strict=True)):
        expected[image, pair.query, one.labels[pair.object]] = 1
        found.append(boxes[image, pair.query])
        wanted.append(one.boxes[pair.object])
        # In pixels: the loss adds a small number to areas, which would count beside areas over the image's.
        found_pixels.append(one.pixels(found[-1]))
        wanted_pixels.append(one.pixels(wanted[-1]))
    focal = sigmoid_focal_loss(logits, expected, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
    distance = F.l1_loss(torch.cat(found), torch.cat(wanted), reduction="sum")
    overlap = generalized_box_iou_loss(torch.cat(found_pixels), torch.cat(wanted_pixels), reduction="sum")
    return {
        "class": CLASS_WEIGHT * focal / count,
        "box": BOX_WEIGHT * distance / count,
        "giou": GIOU_WEIGHT * overlap / count,
    }


def dino_losses(
    proposals: Prediction, layers: Sequence[Prediction], num_groups: int, truth: Sequence[Truth]
) -> dict[str, Tensor]:
    """Return every loss of a batch, weighted; their sum is the total.

    Args:
        proposals: Of the encoder.
        layers: Of the decoder, the denoising queries before the others.
        num_groups: Of denoising queries.
        truth: Of each image.

    Returns:
        `proposal_*`, `layer<i>_*` and `denoising<i>_*` with `class`, `box` and `giou` each.
    """
    num_denoising = 2 * num_groups * max(len(one.labels) for one in truth)
    denoising = [Prediction(layer.logits[:, :num_denoising], layer.boxes[:, :num_denoising]) for layer in layers]
    matching = [Prediction(layer.logits[:, num_denoising:], layer.boxes[:, num_denoising:]) for layer in layers]
    num_queries = proposals.boxes.shape[1]
    num_objects = [len(one.labels) for one in truth]
    num_matched = sum(min(number, num_queries) for number in num_objects)
    matched, denoised = mean_counts([num_matched, num_groups * sum(num_objects)], proposals.boxes.device)
    names = ["proposal", *(f"layer{number}" for number in range(len(layers)))]
    predictions = [proposals, *matching]
    pairs = match(predictions, truth)
    losses = [
        (name, set_loss(prediction, truth, pair, matched))
        for name, prediction, pair in zip(names, predictions, pairs, strict=True)
    ]
    made_of = denoising_pairs(truth, num_groups)
    for number, prediction in enumerate(denoising):
        losses.append((f"denoising{number}", set_loss(prediction, truth, made_of, denoised)))
    return dict(chain.from_iterable([(f"{name}_{what}", loss) for what, loss in one.items()] for name, one in losses))
