"""LVIS's average precision, for data in which not every class is annotated in every image."""

from collections.abc import Sequence

import hotcoco
import numpy as np

from tasks.detection.metrics import engines
from tasks.detection.metrics.base import DetectionMetric, ImageResult, Summary, with_masks
from tasks.detection.metrics.coco import KINDS, add_precision, add_recall_by_area, count_objects, mean

_FREQUENCIES = ("r", "c", "f")


class LvisAP(DetectionMetric):
    """LVIS's numbers (arXiv:1908.03195): federated evaluation.

    A class is evaluated in an image if it has an object there or is `negative`; detections of other classes do not
    count. Where a class is `not_exhaustive`, detections without an object count neither way. The keys are those of
    `CocoAP`, with one recall, `box_ar300`, and besides `box_ap_r`, `box_ap_c` and `box_ap_f`: the means over rare,
    common and frequent classes, nan where the data does not say how frequent a class is.

    Args:
        max_detections: Best detections of an image, of all classes together, that count.
        per_class: See `DetectionMetric`.

    Raises:
        ValueError: `max_detections` is not positive.
    """

    def __init__(self, max_detections: int = 300, per_class: bool = False) -> None:
        super().__init__(per_class)
        if max_detections < 1:
            raise ValueError(f"LvisAP: max_detections is {max_detections}, expected a positive number: LVIS takes 300.")
        self.max_detections = max_detections

    def summarize(self, images: list[ImageResult], num_classes: int) -> Summary:
        summary = Summary({}, {}, count_objects(images, num_classes))
        entries = [
            engines.image_entry(number, image)
            | {
                "neg_category_ids": _category_ids(image.truth.get("negative", [])),
                "not_exhaustive_category_ids": _category_ids(image.truth.get("not_exhaustive", [])),
            }
            for number, image in enumerate(images, 1)
        ]
        for name, kind in KINDS.items():
            if kind == "segm" and not with_masks(images):
                continue
            data = engines.hotcoco_data(entries, num_classes, engines.truth_rows(images, kind))
            results = engines.hotcoco_results(data, engines.found_rows(images, kind))
            results = results.cap_detections_per_image(self.max_detections)
            curves = engines.run(hotcoco.LVISeval(data, results, kind), [self.max_detections])
            add_precision(summary, name, curves)
            frequency = np.array(self.class_frequency if self.class_frequency else [""] * num_classes)
            for group in _FREQUENCIES:
                summary.numbers[f"{name}_ap_{group}"] = mean(curves.precision[:, :, frequency == group, 0, -1])
            summary.numbers[f"{name}_ar{self.max_detections}"] = mean(curves.recall[:, :, 0, -1])
            add_recall_by_area(summary, name, curves)
        return summary


def _category_ids(labels: Sequence[int]) -> list[int]:
    return [int(label) + 1 for label in labels]
