"""Test-time augmentation: a detector sees an image at several scales, also flipped, and the results become one.

Shapes: V views, N detections in all of them, h w size of a predicted mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor
from torchvision.ops import box_iou

from datamodules.batch import ImageView, ViewBatch
from tasks.detection.boxes import best_after_nms, rescale_boxes
from tasks.detection.postprocess import Detections, to_original


class DetectionPrediction(TypedDict):
    """What was found in the images of a batch, B of each."""

    path: list[str]
    image_id: list[int | str]
    original_size: list[tuple[int, int]]  # height, width
    detections: list[Detections]  # on the original images; masks, where there are any, (N, H, W) bool


@dataclass(frozen=True, kw_only=True)
class MergeViews:
    """How the detections of several views become one set, class by class.

    `nms` leaves of overlapping boxes the best one as it is, with its score and its mask. It suits two-stage detectors,
    which themselves end in it: with their own `iou` it changes nothing within a view.

    `wbf` is weighted box fusion (arXiv:1910.13302): overlapping boxes, and their masks, are averaged with the scores as
    weights; the score is the mean, times the share of the views that found the object. It suits DINO, which is trained
    to find each object once, so that a group is one box of each view.

    Both also merge boxes of the same view. DINO has no suppression, so that an image whose objects of one class overlap
    by more than `iou` loses some of them; a larger `iou` keeps them and leaves more duplicates.

    Args:
        method: One of the two.
        iou: Boxes of one class with a larger IoU are the same object, above 0 and at most 1.
        limit: Detections per image; null for all that are left. (COCO's average precision takes the best 100.)

    Raises:
        ValueError: An argument is out of its range.
    """

    method: Literal["nms", "wbf"] = "nms"
    iou: float = 0.5
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.method not in ("nms", "wbf"):
            raise ValueError(f"MergeViews: method is {self.method!r}, expected 'nms' or 'wbf'.")
        if not 0 < self.iou <= 1:
            raise ValueError(f"MergeViews: iou is {self.iou}, expected a number above 0 and at most 1.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"MergeViews: limit is {self.limit}, expected at least 1 detection per image.")


MERGE = MergeViews()


def detect(
    detector: Callable[[Tensor, Sequence[tuple[int, int]]], list[Detections]],
    batch: ViewBatch,
    merge: MergeViews = MERGE,
) -> list[Detections]:
    """Run a detector on a batch, and on its views where it has some.

    Args:
        detector: Maps images and their sizes without padding to the detections of each image.
        batch: A flipped view was flipped before it was padded to the right.
        merge: What becomes of the results of several views; unused without them.

    Returns:
        Each image's detections as of `to_original`: boxes in pixels of its file, masks drawn.
    """
    views = [ImageView(image=batch["image"], valid=batch["valid"], flipped=False), *batch.get("views", [])]
    found = [detector(view["image"], view["valid"]) for view in views]
    results = []
    for place, size in enumerate(batch["original_size"]):
        seen = [_straighten(of[place], view, place, size) for of, view in zip(found, views, strict=True)]
        # Masks stay inside their boxes until the boxes to keep are known: whole images of all would fill the memory.
        results.append(to_original(seen[0] if len(seen) == 1 else merge_views(seen, merge), size, size))
    return results


def merge_views(views: Sequence[Detections], merge: MergeViews = MERGE) -> Detections:
    """Make one set of what was found in V views of the same image.

    Args:
        views: In the same coordinates; all with masks, or none.
        merge: How.

    Returns:
        Detections, best first.
    """
    boxes, scores, labels = (torch.cat([view[key] for view in views]) for key in ("boxes", "scores", "labels"))
    limit = sum(len(view["scores"]) for view in views) if merge.limit is None else merge.limit
    every = Detections(boxes=boxes, scores=scores, labels=labels)
    if "masks" in views[0]:
        every["masks"] = torch.cat([view["masks"] for view in views])
    if merge.method == "wbf":
        every = _fuse(every, _groups(every, merge.iou), len(views))
        keep = every["scores"].argsort(descending=True, stable=True)[:limit]
    else:
        keep = best_after_nms(boxes, scores, labels, threshold=merge.iou, limit=limit)
    return select(every, keep)


def select(detections: Detections, keep: Tensor) -> Detections:
    """Return the detections that `keep` names, by indices or `(N,)` bool."""
    boxes, scores, labels = (detections[key][keep] for key in ("boxes", "scores", "labels"))
    kept = Detections(boxes=boxes, scores=scores, labels=labels)
    if "masks" in detections:
        kept["masks"] = detections["masks"][keep]
    return kept


def unflip(detections: Detections, width: float) -> Detections:
    """Map detections in an image that was flipped left to right back to it; `width` is the image's, without padding.

    Masks may be those inside the boxes or those of the whole image.
    """
    left, top, right, bottom = detections["boxes"].unbind(1)
    boxes = torch.stack([width - right, top, width - left, bottom], 1)
    back = Detections(boxes=boxes, scores=detections["scores"], labels=detections["labels"])
    if "masks" in detections:
        back["masks"] = detections["masks"].flip(-1)
    return back


def _straighten(found: Detections, view: ImageView, place: int, original_size: Sequence[int]) -> Detections:
    """Move the boxes of one image of a view to the original image; masks stay inside the boxes."""
    size = view["valid"][place]
    if view["flipped"]:
        found = unflip(found, size[1])
    moved = found.copy()
    moved["boxes"] = rescale_boxes(found["boxes"], size, original_size)
    return moved


def _groups(every: Detections, iou: float) -> Tensor:
    """Return the group `(N,)` of each box, counted from 0: the boxes to be fused have the same.

    Boxes are taken best first. Each joins the group of its class whose fused box, as far as it is known by then, has
    the largest IoU with it, if that is above `iou`, or else starts a group.
    """
    # One after the other, on small arrays: the host is faster.
    boxes, scores, labels = (tensor.cpu() for tensor in (every["boxes"].float(), every["scores"], every["labels"]))
    group = torch.zeros(len(boxes), dtype=torch.long)
    fused, weight, label = torch.zeros_like(boxes), torch.zeros(len(boxes)), torch.full((len(boxes),), -1)
    weights, classes = _weights(scores).tolist(), labels.tolist()
    num_groups = 0
    for place in scores.argsort(descending=True, stable=True).tolist():
        # A box without extent has no IoU.
        near = box_iou(boxes[place : place + 1], fused[:num_groups])[0].nan_to_num()
        near *= label[:num_groups] == classes[place]
        best = int(near.argmax()) if num_groups else 0
        if num_groups == 0 or near[best] <= iou:
            best = num_groups
            label[best] = classes[place]
            num_groups += 1
        group[place] = best
        weight[best] += weights[place]
        fused[best] += (boxes[place] - fused[best]) * (weights[place] / weight[best])
    return group.to(every["boxes"].device)


def _fuse(every: Detections, group: Tensor, num_views: int) -> Detections:
    """Average each group; one that fewer than all views found gets a smaller score."""
    num_groups = int(group.max()) + 1 if len(group) else 0
    weights = _weights(every["scores"])
    share = weights / weights.new_zeros(num_groups).index_add(0, group, weights)[group]

    def mean(values: Tensor) -> Tensor:
        parts = values * share.view(-1, *[1] * (values.dim() - 1))
        return parts.new_zeros(num_groups, *values.shape[1:]).index_add(0, group, parts)

    count = group.bincount(minlength=num_groups)
    total = every["scores"].new_zeros(num_groups).index_add(0, group, every["scores"])
    labels = every["labels"].new_zeros(num_groups).index_put((group,), every["labels"])
    fused = Detections(
        boxes=mean(every["boxes"].float()),
        scores=total / count * count.clamp(max=num_views) / num_views,
        labels=labels,
    )
    if "masks" in every:
        fused["masks"] = mean(every["masks"].float())
    return fused


def _weights(scores: Tensor) -> Tensor:
    """Return scores that can be divided by."""
    return scores.float().clamp(min=torch.finfo(torch.float32).eps)
