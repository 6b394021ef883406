"""Objects365: COCO's format, boxes only, images in folders `patch0` and on."""

from pathlib import Path
from typing import Any

from datamodules.detection.coco import CocoDetection


class Objects365Detection(CocoDetection):
    """Objects365 v2; labels in the order of its category ids, which its files list in different orders.

    File names such as `images/v1/patch8/x.jpg` are found as `patch8/x.jpg`. Training images that are missing, as some
    are for every download, are left out and counted.

    Args:
        train_annotations: `zhiyuan_objv2_train.json`.
        train_images: Holds `patch0/` and on.
        val_annotations: `zhiyuan_objv2_val.json`.
        val_images: Holds `patch0/` and on.
        num_classes: Number of classes; checked when the data is opened.
        masks: The data has none.
        **options: Further arguments of `CocoDetection`.
    """

    path_parts = 2

    def __init__(
        self,
        train_annotations: Path,
        train_images: Path,
        val_annotations: Path,
        val_images: Path,
        num_classes: int = 365,
        masks: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            train_annotations, train_images, val_annotations, val_images, num_classes, masks=masks, **options
        )
