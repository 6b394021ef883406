"""From samples to a batch. Training samples are of one size already; others are padded at the right and the bottom."""

import torch

from datamodules.batch import SegmentationBatch, SegmentationEvalBatch
from datamodules.segmentation.dataset import EvalSample
from datamodules.segmentation.pipeline import TrainSample
from datamodules.views import collate_views


def collate_train(samples: list[TrainSample]) -> SegmentationBatch:
    """Stack images and masks."""
    return SegmentationBatch(
        image=torch.stack([sample["image"] for sample in samples]),
        mask=torch.stack([sample["mask"] for sample in samples]).long(),
    )


def collate_eval(samples: list[EvalSample]) -> SegmentationEvalBatch:
    """Pad as `collate_views` does, and keep the truth as it is."""
    return SegmentationEvalBatch(**collate_views(samples), truth=[sample["truth"] for sample in samples])
