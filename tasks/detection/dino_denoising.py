"""Contrastive denoising: queries made of noised objects, half of them to be restored, half to be rejected.

They speed up DINO's training and are absent in inference. Shapes: B batch, D denoising queries, Q other queries, C
channels, N objects of the batch times 2 * groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from tasks.detection.dino_layers import inverse_sigmoid
from tasks.detection.dino_losses import Truth


@dataclass(frozen=True)
class DenoisingQueries:
    """Queries that go before the others into the decoder.

    Attributes:
        content: `(B, D, C)`, zero where an image has fewer objects than another.
        boxes: `(B, D, 4)`, before the sigmoid.
        hidden: `(D + Q, D + Q)` bool, True where a query (row) must not see another (column): nobody sees the
            queries of another group.
        num_groups: D is 2 * `num_groups` * the most objects of an image.
    """

    content: Tensor
    boxes: Tensor
    hidden: Tensor
    num_groups: int


def uniform(like: Tensor) -> Tensor:
    """Draw float32 numbers in [0, 1)."""
    return torch.rand_like(like, dtype=torch.float32)


def integers(like: Tensor, high: int) -> Tensor:
    """Draw whole numbers in [0, `high`), int64."""
    return torch.randint_like(like, high, dtype=torch.int64)


class Denoising(nn.Module):
    """Makes the denoising queries.

    Args:
        num_classes: Classes of the detector.
        dim: Channels.
        num_queries: Objects to restore per image, about: each group holds every object once, and there are
            `num_queries` over the most objects of an image groups, at least one.
        label_noise: Twice the share of labels that are drawn anew.
        box_noise: How far a corner moves at most, in half widths and heights, for the objects to be restored; those to
            be rejected move by one to two times that.
    """

    def __init__(
        self, num_classes: int, dim: int, *, num_queries: int = 100, label_noise: float = 0.5, box_noise: float = 1.0
    ) -> None:
        super().__init__()
        if num_queries < 1 or not 0 <= label_noise <= 1 or box_noise < 0:
            raise ValueError(
                f"Denoising: num_queries={num_queries}, label_noise={label_noise}, box_noise={box_noise}, expected at "
                "least 1, 0 to 1, and at least 0."
            )
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.embedding = nn.Embedding(num_classes, dim)

    def forward(self, truth: Sequence[Truth], num_others: int) -> DenoisingQueries:
        """Noise the objects of the images; `num_others` is Q."""
        counts = [len(one.labels) for one in truth]
        most = max(counts)
        groups = max(self.num_queries // most, 1) if most else 1
        device = self.embedding.weight.device
        # Group by group, first the objects to restore, then those to reject, each time image after image.
        labels = self._noised_labels(torch.cat([one.labels for one in truth]).repeat(2 * groups))
        boxes = self._noised_boxes(torch.cat([one.boxes for one in truth]), groups)
        embedded = self.embedding(labels)
        width = 2 * groups * most
        content = embedded.new_zeros(len(truth), width, embedded.shape[-1])
        logits = boxes.new_zeros(len(truth), width, 4)
        image = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)]).repeat(2 * groups)
        slot = torch.cat([torch.arange(count) for count in counts])
        slot = (most * torch.arange(2 * groups)[:, None] + slot).flatten()
        image, slot = image.to(device), slot.to(device)
        content[image, slot] = embedded
        logits[image, slot] = inverse_sigmoid(boxes)
        return DenoisingQueries(content, logits, _hidden(groups, 2 * most, num_others, device), groups)

    def _noised_labels(self, labels: Tensor) -> Tensor:
        """Draw `label_noise / 2` of the labels `(N,)` anew."""
        if not self.label_noise:
            return labels
        redrawn = uniform(labels) < self.label_noise / 2
        return integers(labels, self.num_classes).where(redrawn, labels)

    def _noised_boxes(self, boxes: Tensor, groups: int) -> Tensor:
        """Repeat boxes 2 * `groups` times, `(N, 4)`, and move their corners, inside the image."""
        repeated = boxes.repeat(2 * groups, 1)
        if not self.box_noise:
            return repeated
        corners: Tensor = box_convert(repeated, "cxcywh", "xyxy")
        sign = 2.0 * integers(repeated, 2) - 1
        step = uniform(repeated).view(groups, 2, len(boxes), 4)
        step = step + step.new_tensor([0.0, 1.0])[:, None, None]
        half = repeated[:, 2:].repeat(1, 2) / 2
        corners = corners + sign * step.flatten(0, 2) * half * self.box_noise
        return box_convert(corners.clamp(0, 1), "xyxy", "cxcywh")  # type: ignore[no-any-return]


def _hidden(groups: int, width: int, num_others: int, device: torch.device) -> Tensor:
    """Hide each group of `width` queries from all others; the `num_others` last queries are hidden from none."""
    group = torch.arange(groups, device=device).repeat_interleave(width)
    group = torch.cat([group, group.new_full((num_others,), groups)])
    return (group[:, None] != group) & (group < groups)
