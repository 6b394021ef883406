"""Which box of the ground truth a box is to become, and which boxes take part in the loss.

Shapes: G boxes of the ground truth, N boxes to be matched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

NEGATIVE = -1
IGNORED = -2


@dataclass(frozen=True)
class MaxIoUMatcher:
    """Match each box to the ground truth that it overlaps most.

    Args:
        positive: IoU from which on a box is matched.
        negative: IoU below which a box is background; between the two it is ignored.
        low_quality: If given, each ground truth also gets the boxes that overlap it most, if that IoU reaches this.
            Of two that claim the same box the later has it.
    """

    positive: float
    negative: float
    low_quality: float | None = None

    def __call__(self, truth: Tensor, boxes: Tensor) -> Tensor:
        """Return for each of `boxes` `(N, 4)` its index in `truth` `(G, 4)`, or NEGATIVE, or IGNORED: `(N,)` int64."""
        if not len(truth) or not len(boxes):
            return torch.full((len(boxes),), NEGATIVE, device=boxes.device)
        overlap = box_iou(truth.float(), boxes.float())  # (G, N)
        best, nearest = overlap.max(0)
        match: Tensor = nearest.masked_fill(best < self.positive, IGNORED).masked_fill(best < self.negative, NEGATIVE)
        if self.low_quality is not None:
            peak = overlap.amax(1, keepdim=True)
            claimed = (overlap == peak) & (peak >= self.low_quality)
            numbers = torch.arange(len(truth), device=boxes.device, dtype=torch.int32)[:, None]
            claimant = numbers.where(claimed, -1).amax(0)
            match = claimant.long().where(claimant >= 0, match)
        return match


def choose(candidates: Tensor, num: int) -> Tensor:
    """Return at most `num` of the indices `candidates`, at random where there are more."""
    if len(candidates) <= num:
        return candidates
    return candidates[torch.randperm(len(candidates), device=candidates.device)[:num]]


@dataclass(frozen=True)
class RandomSampler:
    """Pick matched boxes and background for the loss.

    Args:
        num: Boxes per image.
        positive_fraction: Largest share of matched ones; background fills the rest.
    """

    num: int
    positive_fraction: float

    def __call__(self, match: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices of matched boxes and of background in `match`, the result of a matcher."""
        positive = choose(torch.where(match >= 0)[0], int(self.num * self.positive_fraction))
        negative = choose(torch.where(match == NEGATIVE)[0], self.num - len(positive))
        return positive, negative
