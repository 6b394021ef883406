"""From samples of any size to a batch: images padded at the right and at the bottom, everything else as lists.

Sizes are (height, width) in pixels. Padding moves no pixel, so boxes keep their numbers.
"""

import torch.nn.functional as F

from datamodules.batch import DetectionBatch, DetectionEvalBatch, DetectionTarget
from datamodules.detection.dataset import EvalSample
from datamodules.detection.pipeline import TrainSample
from datamodules.views import collate_views, pad


def collate_train(samples: list[TrainSample]) -> DetectionBatch:
    """Pad images and masks to the largest sides in the batch, rounded up to a multiple of 32."""
    image, valid = pad([sample["image"] for sample in samples])
    targets = []
    for sample, (height, width) in zip(samples, valid, strict=True):
        target = DetectionTarget(boxes=sample["boxes"], labels=sample["labels"])
        if "masks" in sample:
            target["masks"] = F.pad(sample["masks"], (0, image.shape[3] - width, 0, image.shape[2] - height))
        targets.append(target)
    return DetectionBatch(image=image, valid=valid, target=targets)


def collate_eval(samples: list[EvalSample]) -> DetectionEvalBatch:
    """Pad as `collate_views` does, and keep the truth as it is."""
    return DetectionEvalBatch(**collate_views(samples), truth=[sample["truth"] for sample in samples])
