"""Pascal VOC's average precision of boxes, at an IoU of 0.5.

Shapes: D detections of a class in all images, best first.
"""

import numpy as np
from hotcoco import mask as run_lengths

from datamodules.batch import Array
from tasks.detection.metrics.base import DetectionMetric, ImageResult, Summary
from tasks.detection.metrics.coco import count_objects
from tasks.detection.metrics.engines import Rows, found_rows, truth_rows

_IOU = 0.5


class VocAP(DetectionMetric):
    """VOC's numbers: `box_ap`, the area under the curve (VOC 2010 on), and `box_ap_11_points` (VOC 2007).

    The development kit's rule: a detection belongs to the object of its class that it overlaps most, if the IoU is at
    least 0.5. If that object is difficult (`crowd` of the ground truth) it counts neither way; if a better detection
    has the object already, it is a false positive. Nothing of that is so in COCO's rule, where a detection
    takes the best object that is left. Both numbers are means over the classes that have an object.

    Boxes are continuous: a box over columns 10 to 19 is 10 wide.

    Args:
        per_class: See `DetectionMetric`.
    """

    def summarize(self, images: list[ImageResult], num_classes: int) -> Summary:
        truth, found = truth_rows(images, "bbox"), found_rows(images, "bbox")
        objects = count_objects(images, num_classes)
        claims = claim(found, truth)
        assert found.scores is not None
        assert truth.crowd is not None
        area, points = np.full((2, num_classes), np.nan)
        for label in np.flatnonzero(objects):
            mine = np.flatnonzero(found.category == label + 1)
            mine = mine[np.argsort(-found.scores[mine], kind="stable")]
            correct, ignored = judge(claims[mine], truth.crowd.astype(bool))
            precision, recall = curve(correct[~ignored], objects[label])
            area[label] = area_under_curve(precision, recall)
            points[label] = mean_of_11_points(precision, recall)
        by_class = {"box_ap": area, "box_ap_11_points": points}
        present = objects > 0
        numbers = {key: float(v[present].mean()) if present.any() else float("nan") for key, v in by_class.items()}
        return Summary(numbers, by_class, objects)


def claim(found: Rows, truth: Rows) -> Array:
    """Return the row of the object that each detection overlaps most, -1 where no IoU reaches 0.5."""
    claims = np.full(len(found.image), -1)
    # Rows are sorted by image.
    for number in np.intersect1d(found.image, truth.image):
        mine = slice(*np.searchsorted(found.image, [number, number + 1]))
        first, last = np.searchsorted(truth.image, [number, number + 1])
        iou = run_lengths.bbox_iou(found.boxes[mine], truth.boxes[first:last], np.zeros(last - first, bool))
        iou = np.where(found.category[mine, None] == truth.category[first:last], iou, -1)
        claims[mine] = np.where(iou.max(1) >= _IOU, first + iou.argmax(1), -1)
    return claims


def judge(claims: Array, difficult: Array) -> tuple[Array, Array]:
    """Return `(D,)` bool: which detections are correct, which count neither way.

    Args:
        claims: `(D,)` objects, best detection first, -1 for none.
        difficult: Bool for each object.
    """
    matched = claims >= 0
    ignored = np.zeros_like(matched)
    ignored[matched] = difficult[claims[matched]]
    first = np.zeros_like(matched)
    first[np.unique(claims, return_index=True)[1]] = True
    return first & matched & ~ignored, ignored


def curve(correct: Array, num_objects: int) -> tuple[Array, Array]:
    """Return precision and recall after each detection, `(D,)`; precision is the best at that recall or beyond."""
    hits = np.cumsum(correct)
    precision = hits / np.arange(1, len(hits) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1], hits / num_objects


def area_under_curve(precision: Array, recall: Array) -> float:
    """Return the integral of precision over recall from 0 to 1."""
    return float((np.diff(recall, prepend=0) * precision).sum())


def mean_of_11_points(precision: Array, recall: Array) -> float:
    """Return the mean precision at recalls 0, 0.1, ... 1; zero where that recall is not reached."""
    # Not linspace, whose 0.3 is above 3 / 10.
    places = np.searchsorted(recall, np.arange(11) / 10)
    return float(np.append(precision, 0)[places].mean())
