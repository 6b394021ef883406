"""mIoU and its companions, from one confusion matrix over the whole data set.

Shapes: K classes, h w size of an image.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from tasks.segmentation.losses import IGNORE_INDEX


class SegmentationScores(TypedDict):
    """What `SegmentationMetric` computes, each in [0, 1]."""

    miou: Tensor  # mean of `class_iou`
    macc: Tensor  # mean of `class_accuracy`
    aacc: Tensor  # share of all pixels that got the right class
    class_iou: Tensor  # (K,), NaN for a class that is neither in the data nor predicted
    class_accuracy: Tensor  # (K,), share of the class's pixels that got it, NaN for a class that is not in the data


class SegmentationMetric(Metric):
    """Intersection over union and accuracy of each class over all images and processes, as mmseg counts them.

    Classes without a pixel are left out of the means. Pixels of 255 do not count. Counts are whole numbers, so that the
    result depends neither on the order nor on the number of processes.

    Args:
        num_classes: K.
        **options: Of `torchmetrics.Metric`.

    Attributes:
        num_used: Classes from this one on are no classes of the data, but outputs that a model has beside: predicting
            them is wrong, and they are left out of the means. None: all are classes of the data.

    Raises:
        ValueError: `num_classes` is not positive, or so large that 255 is a class.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, **options: Any) -> None:
        super().__init__(**options)
        if not 0 < num_classes <= IGNORE_INDEX:
            raise ValueError(
                f"SegmentationMetric: num_classes is {num_classes}, expected 1 to {IGNORE_INDEX}: pixels of "
                f"{IGNORE_INDEX} are ignored."
            )
        self.num_classes = num_classes
        self.num_used: int | None = None
        self.images: set[int | str] = set()  # ids of those counted
        # Pixels of class row * K + column, row the truth; then those to ignore; then those of an unknown class.
        self.add_state("counts", torch.zeros(num_classes**2 + 2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        prediction: Sequence[Tensor] | Tensor,
        target: Sequence[Tensor] | Tensor,
        image_id: Sequence[int | str] | None = None,
    ) -> None:
        """Count the pixels of some images.

        Args:
            prediction: Class numbers in [0, K), `(h, w)` of any integer type for each image.
            target: Class numbers in [0, K) or 255, of the same sizes, on any device.
            image_id: Unique over the data set: an image that comes again is left out. Without it each one counts.

        Raises:
            ValueError: A prediction has another size than its target.
        """
        for number, (found, truth) in enumerate(zip(prediction, target, strict=True)):
            if found.shape != truth.shape:
                raise ValueError(
                    f"SegmentationMetric: prediction {number} has shape {tuple(found.shape)}, expected that of its "
                    f"target {tuple(truth.shape)}. Predict at the size of the annotation."
                )
            if image_id is not None:
                if image_id[number] in self.images:
                    continue
                self.images.add(image_id[number])
            count = self._count(found.flatten().long(), truth.to(found.device).flatten().long())
            # Not in place: what `validate` left in inference mode, a later `fit` may not change.
            self.counts = self.counts + count.to(self.counts.device)

    def compute(self) -> SegmentationScores:
        """Return the scores of all images so far; every process gets the same.

        Raises:
            ValueError: A target held a class number that is neither in [0, K) nor 255.
        """
        _warn_of_repeats(self.images)
        confusion = self.counts[: self.num_classes**2].view(self.num_classes, self.num_classes)
        if unknown := int(self.counts[-1]):
            raise ValueError(
                f"SegmentationMetric: {unknown} pixels of the targets have a class number that is neither below "
                f"num_classes={self.num_classes} nor {IGNORE_INDEX}. Check num_classes and the annotations."
            )
        right, truth, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        # 0 / 0 is NaN, which the means leave out. Shares of int64 counts in float64: 2**24 pixels are a few images.
        iou = right.double() / (truth + found - right).double()
        accuracy = right.double() / truth.double()
        if self.num_used is not None:
            iou[self.num_used :] = accuracy[self.num_used :] = torch.nan
        return SegmentationScores(
            miou=iou.nanmean(),
            macc=accuracy.nanmean(),
            aacc=right.sum().double() / truth.sum().double(),
            class_iou=iou,
            class_accuracy=accuracy,
        )

    def reset(self) -> None:
        super().reset()
        self.images = set()

    def _count(self, found: Tensor, truth: Tensor) -> Tensor:
        num_pairs = self.num_classes**2
        place = truth * self.num_classes + found
        place = torch.where((truth >= 0) & (truth < self.num_classes), place, num_pairs + 1)
        place = torch.where(truth == IGNORE_INDEX, num_pairs, place)
        return torch.bincount(place, minlength=len(self.counts))


def class_table(scores: SegmentationScores, class_names: Sequence[str] | None = None) -> str:
    """Format IoU and accuracy of each class in percent, a line each; `-` for a class without a pixel."""
    iou, accuracy = (scores[key].tolist() for key in ("class_iou", "class_accuracy"))
    names = class_names if class_names is not None else [str(number) for number in range(len(iou))]
    width = max(len(name) for name in (*names, "class"))
    lines = [f"{'class':<{width}}  {'IoU':>6}  {'acc':>6}"]
    lines += [
        f"{name:<{width}}  {_percent(one):>6}  {_percent(other):>6}"
        for name, one, other in zip(names, iou, accuracy, strict=True)
    ]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.2f}"


def _warn_of_repeats(images: set[int | str]) -> None:
    """Warn where a sampler gave an image to several processes, which none of them can see alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    shares: list[set[int | str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, images)
    if repeats := sum(len(share) for share in shares) - len(set().union(*shares)):
        rank_zero_warn(
            f"SegmentationMetric: {repeats} images were evaluated by more than one process and count more than once: "
            "the sampler fills up the shares of the processes. Take a datamodule of this project, or set "
            "trainer.use_distributed_sampler=false and a sampler that gives each image once."
        )
