"""From the results of a detector to boxes and masks on the original image.

Shapes: N detections, H W size of an image in pixels, h w size of a predicted mask.
"""

from collections.abc import Sequence
from typing import NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.detection.boxes import rescale_boxes

# Probability from which on a pixel belongs to the object.
MASK_THRESHOLD = 0.5


class Detections(TypedDict):
    """What a detector finds in one image, best first."""

    boxes: Tensor  # (N, 4) float32, xyxy in pixels
    scores: Tensor  # (N,) float32 in [0, 1]
    labels: Tensor  # (N,) int64 in [0, num_classes)
    masks: NotRequired[Tensor]  # (N, h, w) float32 probabilities inside the box, or (N, H, W) bool on the image


def to_original(detections: Detections, size: Sequence[int], original_size: Sequence[int]) -> Detections:
    """Map detections in the resized image to the original one and draw their masks.

    Args:
        detections: Of the detector; `masks` inside the boxes.
        size: (height, width) that the image was resized to, without padding.
        original_size: (height, width) of the file.

    Returns:
        The same detections with `boxes` in pixels of the original and `masks` `(N, *original_size)` bool.
    """
    boxes = rescale_boxes(detections["boxes"], size, original_size)
    found = Detections(boxes=boxes, scores=detections["scores"], labels=detections["labels"])
    if "masks" in detections:
        found["masks"] = paste_masks(detections["masks"], boxes, original_size)
    return found


def paste_masks(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Draw mask probabilities `(N, h, w)` into their boxes `(N, 4)` on images of `size`: `(N, *size)` bool.

    The mask is sampled bilinearly at the centre of every pixel, with zeros around it; boxes are not rounded.
    """
    height, width = size
    images = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    # Only the pixels around the box are computed. One transfer to the CPU for all boxes.
    low = (boxes[:, :2].floor() - 1).clamp(min=0).long().tolist()
    high = (boxes[:, 2:].ceil() + 1).long().tolist()
    for mask, box, image, (left, top), (right, bottom) in zip(masks, boxes, images, low, high, strict=True):
        x = _grid(left, min(right, width), box[0], box[2])
        y = _grid(top, min(bottom, height), box[1], box[3])
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
        drawn = F.grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0]
        image[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn >= MASK_THRESHOLD
    return images


def _grid(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    """Coordinates of pixel centres where the box reaches from -1 to 1; a box without extent gets its centre."""
    pixels = torch.arange(start, max(start, stop), device=low.device, dtype=torch.float32) + 0.5
    return ((pixels - low) / (high - low) * 2 - 1).nan_to_num(posinf=0, neginf=0)
