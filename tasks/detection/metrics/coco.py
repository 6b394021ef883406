"""COCO's average precision of boxes and masks."""

from collections.abc import Sequence

import numpy as np

from datamodules.batch import Array
from tasks.detection.metrics.base import DetectionMetric, ImageResult, Summary, with_masks
from tasks.detection.metrics.engines import Curves, Engine, Kind, check_engine, evaluate

KINDS: dict[str, Kind] = {"box": "bbox", "mask": "segm"}
_AREAS = ("small", "medium", "large")


class CocoAP(DetectionMetric):
    """COCO's numbers, equal to those of pycocotools.

    `compute` gives `box_ap` (mean over IoU .50 to .95), `box_ap50`, `box_ap75`, `box_ap_small`, `box_ap_medium`,
    `box_ap_large` (area below 32^2, to 96^2, and above, in pixels), the average recalls `box_ar1`, `box_ar10`,
    `box_ar100` and `box_ar_small` and so on; the same with `mask_` where detections and ground truth have masks. The
    area is the annotation's for objects, and for detections that of the box, or of the mask for mask AP. Detections
    inside a crowd count neither way. COCO's -1 for a class or area without objects becomes nan.

    Args:
        max_detections: Best detections of an image and class that count, ascending: the last for all precisions, each
            for one of the recalls.
        engine: Library that matches. `hotcoco` takes seconds where `pycocotools` takes minutes; the numbers are equal.
        per_class: See `DetectionMetric`.

    Raises:
        ValueError: The engine is not installed, or `max_detections` does not ascend.
    """

    def __init__(
        self, max_detections: Sequence[int] = (1, 10, 100), engine: Engine = "hotcoco", per_class: bool = False
    ) -> None:
        super().__init__(per_class)
        limits = tuple(max_detections)
        if not limits or limits[0] < 1 or limits != tuple(sorted(set(limits))):
            raise ValueError(f"CocoAP: max_detections is {limits}, expected ascending positive numbers: (1, 10, 100).")
        check_engine(engine)
        self.max_detections = limits
        self.engine: Engine = engine

    def summarize(self, images: list[ImageResult], num_classes: int) -> Summary:
        limits = self.max_detections
        summary = Summary({}, {}, count_objects(images, num_classes))
        for name, kind in KINDS.items():
            if kind == "bbox" or with_masks(images):
                curves = evaluate(images, num_classes, kind, engine=self.engine, limits=limits)
                add_precision(summary, name, curves)
                for index, limit in enumerate(limits):
                    summary.numbers[f"{name}_ar{limit}"] = mean(curves.recall[:, :, 0, index])
                add_recall_by_area(summary, name, curves)
        return summary


def add_precision(summary: Summary, name: str, curves: Curves) -> None:
    """Add the average precisions at the largest number of detections."""
    precision = curves.precision[..., -1]  # (T, R, K, A)
    summary.numbers[f"{name}_ap"] = mean(precision[..., 0])
    summary.numbers[f"{name}_ap50"] = mean(precision[0, ..., 0])
    summary.numbers[f"{name}_ap75"] = mean(precision[5, ..., 0])
    for index, area in enumerate(_AREAS, 1):
        summary.numbers[f"{name}_ap_{area}"] = mean(precision[..., index])
    by_class = np.moveaxis(precision[..., 0], -1, 0)  # (K, T, R)
    summary.by_class[f"{name}_ap"] = np.array([mean(values) for values in by_class])
    summary.by_class[f"{name}_ap50"] = np.array([mean(values[0]) for values in by_class])


def add_recall_by_area(summary: Summary, name: str, curves: Curves) -> None:
    """Add the average recalls at the largest number of detections."""
    for index, area in enumerate(_AREAS, 1):
        summary.numbers[f"{name}_ar_{area}"] = mean(curves.recall[..., index, -1])


def count_objects(images: Sequence[ImageResult], num_classes: int) -> Array:
    """Return how many objects other than crowds each class has, `(num_classes,)`."""
    counts = np.zeros(num_classes, np.int64)
    for image in images:
        counts += np.bincount(image.truth["labels"][~image.truth["crowd"]], minlength=num_classes)
    return counts


def mean(values: Array) -> float:
    """Return the mean of what was evaluated, nan if nothing was."""
    kept = values[values > -1]
    return float(kept.mean()) if kept.size else float("nan")
