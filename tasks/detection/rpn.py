"""Region proposal network (arXiv:1506.01497) on a feature pyramid, with the arithmetic of the authors' configs.

Shapes: B batch, A anchors per pixel, h_i w_i size of the i-th level, M anchors of all levels, N proposals of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from datamodules.batch import DetectionTarget
from tasks.detection.anchors import Anchors
from tasks.detection.boxes import DeltaCoder, best_after_nms
from tasks.detection.losses import BoxLoss, delta_l1
from tasks.detection.matching import NEGATIVE, MaxIoUMatcher, RandomSampler
from tasks.layers import mean_counts


@dataclass(frozen=True, kw_only=True)
class ProposalLimits:
    """How many boxes go on.

    Args:
        per_level: Best-scored anchors of each level before non-maximum suppression.
        per_image: Proposals after it.
    """

    per_level: int
    per_image: int


class RPN(nn.Module):
    """Score anchors, move them, and keep the best as proposals.

    Args:
        strides: Input pixels per pixel of each level.
        channels: Channels of every level.
        train_limits: Proposals in training.
        eval_limits: Proposals in evaluation.
        box_loss: On matched anchors.
        inside_only: Train on anchors inside the image only.
        num_samples: Anchors per image in the loss.
        nms: IoU of non-maximum suppression, level by level.
    """

    def __init__(
        self,
        strides: Sequence[int],
        channels: int = 256,
        *,
        train_limits: ProposalLimits = ProposalLimits(per_level=2000, per_image=1000),
        eval_limits: ProposalLimits = ProposalLimits(per_level=1000, per_image=1000),
        box_loss: BoxLoss = delta_l1,
        inside_only: bool = False,
        num_samples: int = 256,
        nms: float = 0.7,
    ) -> None:
        super().__init__()
        self.anchors = Anchors(strides)
        num_anchors = len(self.anchors.ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)
        self.train_limits = train_limits
        self.eval_limits = eval_limits
        self.box_loss = box_loss
        self.inside_only = inside_only
        self.nms = nms
        self.coder = DeltaCoder()
        self.matcher = MaxIoUMatcher(0.7, 0.3, low_quality=0.3)
        self.sampler = RandomSampler(num_samples, 0.5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with weights of standard deviation 0.01 and no bias."""
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def maps(self, pyramid: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return logits `(B, A, h_i, w_i)` and deltas `(B, 4 A, h_i, w_i)` of every level."""
        hidden = [F.relu(self.conv(level)) for level in pyramid]
        return [self.objectness(x) for x in hidden], [self.deltas(x) for x in hidden]

    def forward(
        self,
        pyramid: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        target: Sequence[DetectionTarget] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return each image's proposals `(N, 4)`, best first and without a gradient, and with a target the losses.

        Args:
            pyramid: `(B, channels, h_i, w_i)`, finest first.
            sizes: Valid size of each image.
            target: Boxes of each image.
        """
        objectness, deltas = self.maps(pyramid)
        shapes = [(level.shape[2], level.shape[3]) for level in pyramid]
        anchors = self.anchors(shapes, pyramid[0].device)
        scores = [x.float().permute(0, 2, 3, 1).flatten(1) for x in objectness]  # (B, h_i w_i A)
        codes = [torch.unflatten(x.float().permute(0, 2, 3, 1).flatten(1), 1, (-1, 4)) for x in deltas]
        proposals = self.propose(scores, codes, anchors, sizes)
        if target is None:
            return proposals, {}
        used = [torch.cat(self.anchors.used(shapes, size, pyramid[0].device)) for size in sizes]
        losses = self.losses(torch.cat(scores, 1), torch.cat(codes, 1), torch.cat(anchors), used, sizes, target)
        return proposals, losses

    @torch.no_grad()
    def propose(
        self,
        scores: Sequence[Tensor],
        codes: Sequence[Tensor],
        anchors: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
    ) -> list[Tensor]:
        """Return the best boxes of each image, `(N, 4)`; scores and codes are by level, `(B, M_i)`, `(B, M_i, 4)`."""
        limits = self.train_limits if self.training else self.eval_limits
        boxes, probabilities, levels = [], [], []
        for number, (score, code, anchor) in enumerate(zip(scores, codes, anchors, strict=True)):
            # Many scores round to 1: a stable order makes the choice among them the same everywhere.
            ranked, order = score.sigmoid().sort(dim=1, descending=True, stable=True)
            order = order[:, : limits.per_level]
            picked = code.gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
            boxes.append(self.coder.decode(anchor[order], picked))
            probabilities.append(ranked[:, : limits.per_level])
            levels.append(torch.full_like(order[0], number))
        level = torch.cat(levels)
        proposals = []
        for box, score, size in zip(torch.cat(boxes, 1), torch.cat(probabilities, 1), sizes, strict=True):
            clipped = clip_boxes_to_image(box, size)
            real = torch.where((clipped[:, 2:] > clipped[:, :2]).all(1))[0]
            clipped = clipped[real]
            keep = best_after_nms(clipped, score[real], level[real], threshold=self.nms, limit=limits.per_image)
            proposals.append(clipped[keep])
        return proposals

    def losses(
        self,
        logits: Tensor,
        codes: Tensor,
        anchors: Tensor,
        used: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        target: Sequence[DetectionTarget],
    ) -> dict[str, Tensor]:
        """Return `rpn_class` and `rpn_box`, both over the number of sampled anchors of the batch (`mean_counts`).

        The authors' framework counts one matched anchor where an image has none; here the count is the true one.

        Args:
            logits: `(B, M)`.
            codes: Deltas, `(B, M, 4)`.
            anchors: `(M, 4)`.
            used: Which anchors may take part, `(M,)` bool for each image.
            sizes: Valid size of each image.
            target: Boxes of each image.
        """
        class_losses, box_losses, count = [], [], 0
        for logit, code, usable, size, truth in zip(logits, codes, used, sizes, target, strict=True):
            if self.inside_only:
                low, high = (anchors[:, :2] >= 0).all(1), anchors[:, 2:] < anchors.new_tensor(size[::-1])
                usable = usable & low & high.all(1)
            index = torch.where(usable)[0]
            anchor, boxes = anchors[index], truth["boxes"]
            match = self.matcher(boxes, anchor)
            positive, negative = self.sampler(match)
            sampled = torch.cat([positive, negative])
            is_object = (match[sampled] != NEGATIVE).float()
            class_losses.append(F.binary_cross_entropy_with_logits(logit[index[sampled]], is_object, reduction="sum"))
            box_losses.append(
                self.box_loss(self.coder, anchor[positive], code[index[positive]], boxes[match[positive]])
            )
            count += len(sampled)
        (number,) = mean_counts([count], anchors.device)
        sums = {"rpn_class": torch.stack(class_losses).sum(), "rpn_box": torch.stack(box_losses).sum()}
        return {name: total / number for name, total in sums.items()}
