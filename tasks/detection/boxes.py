"""Arithmetic of boxes, float32 whatever the precision of the network.

Shapes: N boxes, each (x1, y1, x2, y2) in pixels of the padded image. A size is (height, width) in pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

# Largest factor between a box and its prediction: an anchor of 16 px grows to an image of 1000 px.
MAX_LOG_RATIO = math.log(1000 / 16)


@dataclass(frozen=True)
class DeltaCoder:
    """Boxes relative to reference boxes: shift of the centre over the size, logarithm of the size's ratio.

    Args:
        stds: Divisors of (dx, dy, dw, dh), so that the targets have about unit variance.
    """

    stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)

    def encode(self, reference: Tensor, boxes: Tensor) -> Tensor:
        """Return the deltas `(N, 4)` that lead from `reference` to `boxes`, both `(N, 4)` of positive size."""
        reference, boxes = reference.float(), boxes.float()
        size, centre = _size_centre(reference)
        size_to, centre_to = _size_centre(boxes)
        deltas = torch.cat([(centre_to - centre) / size, (size_to / size).log()], -1)
        return deltas / deltas.new_tensor(self.stds)

    def decode(self, reference: Tensor, deltas: Tensor) -> Tensor:
        """Return the boxes that `deltas` `(..., 4)` point to from `reference`, of a shape that broadcasts to it.

        Sizes change by at most the factor 62.5 in either direction.
        """
        size, centre = _size_centre(reference.float())
        deltas = deltas.float() * torch.tensor(self.stds, device=deltas.device)
        centre = centre + deltas[..., :2] * size
        half = size * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
        return torch.cat([centre - half, centre + half], -1)


def best_after_nms(boxes: Tensor, scores: Tensor, groups: Tensor, *, threshold: float, limit: int) -> Tensor:
    """Return the indices of the best boxes, best first, at most `limit`.

    A box goes where a better one of the same group, `(N,)` integers, has an IoU with it above `threshold`.
    """
    return batched_nms(boxes.float(), scores.float(), groups, threshold)[:limit]  # type: ignore[no-any-return]


def rescale_boxes(boxes: Tensor, size: Sequence[int], original_size: Sequence[int]) -> Tensor:
    """Map boxes `(N, 4)` in an image that was resized to `size` to the image of `original_size`."""
    factors = [new / old for new, old in zip(original_size, size, strict=True)]
    return boxes * boxes.new_tensor([factors[1], factors[0]] * 2)


def _size_centre(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return high - low, (low + high) / 2
