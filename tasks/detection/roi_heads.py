"""The second stage: pool each proposal, classify it, move its box, draw its mask; repeated by a cascade.

Shapes: R boxes of the whole batch, K classes, C channels of the pyramid, s side of the pooled map.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, roi_align

from datamodules.batch import DetectionTarget
from tasks.detection.boxes import DeltaCoder, best_after_nms
from tasks.detection.losses import BoxLoss, class_cross_entropy, delta_l1, mask_cross_entropy
from tasks.detection.matching import MaxIoUMatcher, RandomSampler
from tasks.detection.postprocess import MASK_THRESHOLD, Detections
from tasks.layers import SyncBatchNorm, mean_counts

# A box of this side (in pixels) or twice it is pooled from the finest level, and so on by powers of 2.
FINEST_SCALE = 56
BOX_POOL = 7
MASK_POOL = 14


@dataclass(frozen=True)
class BoxStage:
    """How a stage of boxes is trained.

    Args:
        matcher: Which proposals are objects.
        coder: Spread of the deltas.
        weight: Of the stage's losses in the total.
    """

    matcher: MaxIoUMatcher
    coder: DeltaCoder = field(default_factory=lambda: DeltaCoder((0.1, 0.1, 0.2, 0.2)))
    weight: float = 1.0


class BoxHead(nn.Module):
    """Pooled features to class logits and one box per class.

    Args:
        num_classes: K.
        channels: C.
        num_convs: 3x3 convolutions with synchronised batch norm.
        num_fcs: Linear layers.
        hidden_dim: Width of the linear layers.
    """

    def __init__(
        self, num_classes: int, channels: int = 256, *, num_convs: int = 0, num_fcs: int = 2, hidden_dim: int = 1024
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(num_convs))
        self.norms = nn.ModuleList(SyncBatchNorm(channels) for _ in range(num_convs))
        widths = [channels * BOX_POOL**2] + [hidden_dim] * num_fcs
        self.fcs = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.classes = nn.Linear(widths[-1], num_classes + 1)
        self.deltas = nn.Linear(widths[-1], 4 * num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the authors' framework does: Xavier, and small weights in the two outputs."""
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        for layer in (*self.fcs, self.classes, self.deltas):
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map `(R, C, 7, 7)` to logits `(R, K + 1)`, background last, and deltas `(R, K, 4)`, float32."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        x = x.flatten(1)
        for fc in self.fcs:
            x = F.relu(fc(x))
        return self.classes(x).float(), self.deltas(x).float().unflatten(1, (-1, 4))


class MaskHead(nn.Module):
    """Pooled features to one mask per class, of twice their side.

    Args:
        num_classes: K.
        channels: C.
        num_convs: 3x3 convolutions.
    """

    def __init__(self, num_classes: int, channels: int = 256, *, num_convs: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(num_convs))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, stride=2)
        self.classes = nn.Conv2d(channels, num_classes, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with normal weights that keep the variance, and no bias."""
        for layer in (*self.convs, self.upsample, self.classes):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(R, C, 14, 14)` to logits `(R, K, 28, 28)`, float32."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.classes(F.relu(self.upsample(x))).float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Sampled:
    """Boxes of one image that take part in the loss of a stage, R of them.

    Args:
        boxes: `(R, 4)`.
        label: `(R,)`, K where they are background.
        match: `(R,)` index of the ground truth; 0 where they are background.
        given: `(R,)` bool: it is a box of the ground truth itself.
    """

    boxes: Tensor
    label: Tensor
    match: Tensor
    given: Tensor


class RoIHeads(nn.Module):
    """One or more stages of boxes, with or without masks.

    Args:
        num_classes: K.
        strides: Input pixels per pixel of the levels that are pooled, finest first.
        stages: In order; one is Mask R-CNN, more are a cascade.
        box_loss: On matched proposals.
        masks: Predict masks, in every stage.
        channels: C.
        num_convs: Convolutions of a box head.
        num_fcs: Linear layers of a box head.
        hidden_dim: Width of the linear layers.
        num_samples: Boxes per image in the loss, a quarter of them matched at most.
        score: Smallest score of a detection.
        nms: IoU of non-maximum suppression, class by class.
        limit: Detections per image.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int],
        stages: Sequence[BoxStage],
        *,
        box_loss: BoxLoss = delta_l1,
        masks: bool = True,
        channels: int = 256,
        num_convs: int = 0,
        num_fcs: int = 2,
        hidden_dim: int = 1024,
        num_samples: int = 512,
        score: float = 0.05,
        nms: float = 0.5,
        limit: int = 100,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.stages = tuple(stages)
        self.box_loss = box_loss
        self.score = score
        self.nms = nms
        self.limit = limit
        self.sampler = RandomSampler(num_samples, 0.25)
        self.box_heads = nn.ModuleList(
            BoxHead(num_classes, channels, num_convs=num_convs, num_fcs=num_fcs, hidden_dim=hidden_dim) for _ in stages
        )
        self.mask_heads = nn.ModuleList(MaskHead(num_classes, channels) for _ in stages if masks)

    def pool(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], side: int) -> Tensor:
        """Crop each image's boxes `(N, 4)` from the level that fits their size: `(R, C, side, side)`."""
        every = torch.cat(list(boxes)).float()
        image = torch.cat([box.new_full((len(box), 1), number) for number, box in enumerate(boxes)]).float()
        rois = torch.cat([image, every], 1)
        scale = (every[:, 2:] - every[:, :2]).prod(1).sqrt()
        level = (scale / FINEST_SCALE + 1e-6).log2().floor().clamp(0, len(levels) - 1)
        pooled = levels[0].new_zeros(len(rois), levels[0].shape[1], side, side, dtype=torch.float32)
        for number, (feature, stride) in enumerate(zip(levels, self.strides, strict=True)):
            index = torch.where(level == number)[0]
            # In float32: half precision has no kernel on CPUs, and coordinates need more digits.
            crops = roi_align(feature.float(), rois[index], side, 1 / stride, 0, aligned=True)
            pooled = pooled.index_put((index,), crops)
        return pooled.to(levels[0].dtype)

    def refine(
        self, stage: int, boxes: Sequence[Tensor], label: Tensor, deltas: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """Return each image's boxes moved by the deltas `(R, K, 4)` of their class `label` `(R,)`, without gradient."""
        chosen = deltas.detach()[torch.arange(len(label), device=label.device), label]
        moved = self.stages[stage].coder.decode(torch.cat(list(boxes)), chosen)
        by_image = torch.split(moved, [len(box) for box in boxes])
        return [clip_boxes_to_image(box, size) for box, size in zip(by_image, sizes, strict=True)]

    def predict(
        self, levels: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """Return each image's detections; class logits and mask probabilities are averaged over the stages."""
        boxes, total = list(proposals), torch.zeros((), device=levels[0].device)
        for stage, head in enumerate(self.box_heads):
            logits, deltas = head(self.pool(levels, boxes, BOX_POOL))
            total = total + logits
            if stage + 1 < len(self.stages):
                boxes = self.refine(stage, boxes, logits[:, :-1].argmax(1), deltas, sizes)
        counts = [len(box) for box in boxes]
        scores = torch.split((total / len(self.stages)).softmax(1)[:, :-1], counts)
        moved = torch.split(self.stages[-1].coder.decode(torch.cat(boxes).unsqueeze(1), deltas), counts)
        found = [self.select(*image) for image in zip(moved, scores, sizes, strict=True)]
        if self.mask_heads:
            masks = self.masks(levels, [x["boxes"] for x in found], [x["labels"] for x in found])
            for detections, mask in zip(found, masks, strict=True):
                detections["masks"] = mask
        return found

    def select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """Keep the best of an image's boxes `(N, K, 4)` by their scores `(N, K)`."""
        index, labels = torch.where(scores > self.score)
        picked, best = clip_boxes_to_image(boxes[index, labels], size), scores[index, labels]
        keep = best_after_nms(picked, best, labels, threshold=self.nms, limit=self.limit)
        return Detections(boxes=picked[keep], scores=best[keep], labels=labels[keep])

    def masks(self, levels: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        """Return the mask probabilities of each image's boxes, of their class: `(N, 28, 28)`."""
        crops, label = self.pool(levels, boxes, MASK_POOL), torch.cat(list(labels))
        each = torch.arange(len(label), device=label.device)
        probabilities = torch.stack([head(crops)[each, label].sigmoid() for head in self.mask_heads])
        return list(torch.split(probabilities.mean(0), [len(box) for box in boxes]))

    def losses(
        self,
        levels: Sequence[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        target: Sequence[DetectionTarget],
    ) -> dict[str, Tensor]:
        """Return the weighted losses: `class`, `box`, `mask`, in a cascade with `stage<i>_` in front."""
        losses: dict[str, Tensor] = {}
        boxes = list(proposals)
        for number, (stage, head) in enumerate(zip(self.stages, self.box_heads, strict=True)):
            sampled = [self.sample(stage.matcher, *image) for image in zip(boxes, target, strict=True)]
            boxes = [image.boxes for image in sampled]
            label = torch.cat([image.label for image in sampled])
            logits, deltas = head(self.pool(levels, boxes, BOX_POOL))
            # The authors divide by the counts of the process; see `mean_counts`.
            count, matched = mean_counts([len(label), int((label < self.num_classes).sum())], label.device)
            found = {
                "class": class_cross_entropy(logits, label) / count,
                "box": self._box_loss(stage, sampled, deltas, target) / count,
            }
            if self.mask_heads:
                found["mask"] = self._mask_loss(self.mask_heads[number], levels, sampled, target) / matched
            prefix = f"stage{number}_" if len(self.stages) > 1 else ""
            losses |= {prefix + name: stage.weight * loss for name, loss in found.items()}
            if number + 1 < len(self.stages):
                guess = logits.detach()[:, :-1].argmax(1)
                label = label.where(label < self.num_classes, guess)
                moved = self.refine(number, boxes, label, deltas, sizes)
                boxes = [box[~image.given] for box, image in zip(moved, sampled, strict=True)]
        return losses

    @torch.no_grad()
    def sample(self, matcher: MaxIoUMatcher, proposals: Tensor, target: DetectionTarget) -> Sampled:
        """Match an image's proposals `(N, 4)`, with its ground truth among them, and sample."""
        truth = target["boxes"].float()
        own = torch.arange(len(truth), device=truth.device)
        # A box of the ground truth is matched to itself even where another one covers it.
        match = torch.cat([own, matcher(truth, proposals)])
        index = torch.cat(self.sampler(match))
        picked = match[index]
        label = torch.full_like(index, self.num_classes)
        label[picked >= 0] = target["labels"][picked[picked >= 0]]
        boxes = torch.cat([truth, proposals])[index]
        return Sampled(boxes=boxes, label=label, match=picked.clamp(min=0), given=index < len(truth))

    def _box_loss(
        self, stage: BoxStage, sampled: Sequence[Sampled], deltas: Tensor, target: Sequence[DetectionTarget]
    ) -> Tensor:
        label = torch.cat([image.label for image in sampled])
        index = torch.where(label < self.num_classes)[0]
        matched = [image.label < self.num_classes for image in sampled]
        reference = [image.boxes[match] for image, match in zip(sampled, matched, strict=True)]
        truth = [
            one["boxes"].float()[image.match[match]] for image, match, one in zip(sampled, matched, target, strict=True)
        ]
        return self.box_loss(stage.coder, torch.cat(reference), deltas[index, label[index]], torch.cat(truth))

    def _mask_loss(
        self, head: nn.Module, levels: Sequence[Tensor], sampled: Sequence[Sampled], target: Sequence[DetectionTarget]
    ) -> Tensor:
        matched = [image.label < self.num_classes for image in sampled]
        boxes = [image.boxes[match] for image, match in zip(sampled, matched, strict=True)]
        label = torch.cat([image.label[match] for image, match in zip(sampled, matched, strict=True)])
        logits = head(self.pool(levels, boxes, MASK_POOL))[torch.arange(len(label), device=label.device), label]
        truth = [
            crop_masks(one["masks"], image.match[match], box, logits.shape[-1])
            for image, match, box, one in zip(sampled, matched, boxes, target, strict=True)
        ]
        return mask_cross_entropy(logits, torch.cat(truth))


def crop_masks(masks: Tensor, index: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Cut from `masks[index]` `(G, H, W)` what lies in `boxes` `(N, 4)`, resampled to `(N, side, side)` bool."""
    rois = torch.cat([index.unsqueeze(1).float(), clip_boxes_to_image(boxes.float(), masks.shape[-2:])], 1)
    # Only masks in use become float32: an image may hold hundreds.
    used, rois[:, 0] = torch.unique(index, return_inverse=True)
    crops: Tensor = roi_align(masks[used].unsqueeze(1).float(), rois, side, 1.0, 0, aligned=True)
    return crops.squeeze(1) >= MASK_THRESHOLD
