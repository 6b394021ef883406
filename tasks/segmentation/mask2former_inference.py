"""From Mask2Former's queries to scores of classes, to instances, or to one segment for each pixel.

Shapes: B batch, Q queries, K classes, N instances, H W size of the result.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.detection.postprocess import Detections
from tasks.segmentation.layers import resize
from tasks.segmentation.mask2former_layers import MaskPrediction

# Probability from which on a pixel belongs to a mask.
MASK_THRESHOLD = 0.5


def semantic_scores(prediction: MaskPrediction, size: Sequence[int]) -> Tensor:
    """Return the score of each class at each pixel, `(B, K, H, W)`, float32.

    The sum over queries of the class's probability times the mask's, in [0, Q]. It is taken at the size of the masks
    and then resized to `size`, in this order, as the authors do.
    """
    classes = prediction.classes.softmax(-1)[..., :-1]
    with torch.autocast(classes.device.type, enabled=False):
        scores = torch.einsum("bqc,bqhw->bchw", classes, prediction.masks.sigmoid())
    return resize(scores, size)


def instances(
    prediction: MaskPrediction, size: Sequence[int], *, limit: int = 100, things: Collection[int] | None = None
) -> list[Detections]:
    """Return the `limit` best pairs of query and class of each image, best first, with masks `(N, H, W)` bool.

    The score is the class's probability times the mean probability of the pixels inside the mask. Boxes lie around
    the masks; an empty mask scores 0 and has a box of zeros.

    Args:
        prediction: Of the last layer.
        size: (height, width) of the masks to return.
        limit: Pairs per image; those of other classes than `things` count, as in the original.
        things: Classes of which there are instances; without it, all.
    """
    num_classes = prediction.classes.shape[-1] - 1
    found = []
    for classes, masks in zip(prediction.classes.softmax(-1), prediction.masks, strict=True):
        scores, index = classes[:, :-1].flatten().topk(min(limit, len(classes) * num_classes))
        labels, queries = index % num_classes, index // num_classes
        if things is not None:
            kept = torch.isin(labels, torch.tensor(sorted(things), device=labels.device))
            scores, labels, queries = scores[kept], labels[kept], queries[kept]
        logits = resize(masks[None, queries], size)[0]
        inside = logits > 0
        quality = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
        scores, order = (scores * quality).sort(descending=True, stable=True)
        inside = inside[order]
        found.append(Detections(boxes=_boxes(inside), scores=scores, labels=labels[order], masks=inside))
    return found


def _boxes(masks: Tensor) -> Tensor:
    """Outer edges of masks `(N, H, W)` bool in pixels: `(N, 4)` float32 xyxy."""
    low, high = [], []
    for across in (1, 2):
        line = masks.any(across).int()  # (N, W), then (N, H)
        low.append(line.argmax(1))
        high.append((line.shape[1] - line.flip(1).argmax(1)) * line.amax(1))
    return torch.stack(low + high, 1).float()


@dataclass(frozen=True)
class Panoptic:
    """One segment for each pixel.

    Attributes:
        segments: `(H, W)` int64, 0 where there is none, otherwise 1 + a position in the two lists.
        labels: Class of each segment.
        scores: Probability of the class of each segment; of merged ones the first's.
    """

    segments: Tensor
    labels: list[int]
    scores: list[float]


def panoptic(
    prediction: MaskPrediction,
    size: Sequence[int],
    things: Collection[int],
    *,
    object_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> list[Panoptic]:
    """Give each pixel of each image to the mask that claims it most, as the original does.

    Args:
        prediction: Of the last layer.
        size: (height, width) of the result.
        things: Classes whose masks are objects of their own; masks of another class become one segment.
        object_threshold: Probability of its class above which a query takes part.
        overlap_threshold: Share of its mask that a query must win, else it gets no segment.
    """
    return [
        _panoptic(classes, masks, size, things, object_threshold, overlap_threshold)
        for classes, masks in zip(prediction.classes, prediction.masks, strict=True)
    ]


def _panoptic(
    classes: Tensor,
    masks: Tensor,
    size: Sequence[int],
    things: Collection[int],
    object_threshold: float,
    overlap_threshold: float,
) -> Panoptic:
    scores, labels = classes.softmax(-1).max(-1)
    kept = (labels != classes.shape[-1] - 1) & (scores > object_threshold)
    scores, labels = scores[kept], labels[kept]
    segments = torch.zeros(*size, dtype=torch.int64, device=classes.device)
    result = Panoptic(segments, [], [])
    if not len(scores):
        return result
    probability = resize(masks[None, kept], size)[0].sigmoid()
    inside = probability >= MASK_THRESHOLD
    owner = (scores[:, None, None] * probability).argmax(0)
    won = owner == torch.arange(len(scores), device=owner.device)[:, None, None]
    final = won & inside
    areas = torch.stack([area.sum((1, 2)) for area in (won, inside, final)])
    stuff: dict[int, int] = {}
    rows = zip(final, labels.tolist(), scores.tolist(), *areas.tolist(), strict=True)
    for mask, label, score, num_won, num_inside, num_final in rows:
        if not num_final or num_won / num_inside < overlap_threshold:
            continue
        number = stuff.get(label)
        if number is None:
            result.labels.append(label)
            result.scores.append(score)
            number = len(result.labels)
            if label not in things:
                stuff[label] = number
        segments[mask] = number
    return result
