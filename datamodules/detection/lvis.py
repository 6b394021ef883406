"""LVIS v1: COCO's images and format with 1203 classes, of which each image says what was looked for."""

from pathlib import Path
from typing import Any

from datamodules.detection.coco import CocoDetection


class LvisDetection(CocoDetection):
    """LVIS, from its own JSON files; labels in the order of its category ids.

    Objects carry LVIS's lists of absent and of not exhaustively annotated classes, and `class_frequency` is known.

    Args:
        train_annotations: `lvis_v1_train.json`.
        val_annotations: `lvis_v1_val.json`.
        images: Holds `train2017/` and `val2017/` of COCO; both splits have images from both.
        num_classes: Number of classes; checked when the data is opened.
        **options: Further arguments of `CocoDetection`.
    """

    def __init__(
        self, train_annotations: Path, val_annotations: Path, images: Path, num_classes: int = 1203, **options: Any
    ) -> None:
        super().__init__(train_annotations, images, val_annotations, images, num_classes, **options)
