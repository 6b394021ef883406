"""Average precision as LVIS and Pascal VOC define it, by hand and against plain loops."""

import math

import numpy as np
import pytest
from detection_results import NUM_CLASSES, SIZE, detections, objects, random_images, updated

from tasks.detection.metrics import CocoAP, LvisAP, VocAP

BOX, FAR = [10, 10, 50, 50], [80, 60, 120, 100]
EXACT = {"abs": 1e-12, "nan_ok": True}  # sums of the same float64 numbers in another order


@pytest.fixture(scope="module")
def images():
    return random_images()


@pytest.mark.parametrize(
    ("lists", "ap"),
    [
        ({}, 1.0),  # the class was not looked for in image 2: what is found there does not count
        ({"negative": [0]}, 0.5),  # it was and is not there: a false positive, better than the true one
        ({"negative": [1]}, 1.0),
    ],
)
def test_lvis_counts_false_positives_only_where_a_class_was_looked_for(lists, ap):
    metric = LvisAP()
    found = [detections([BOX], [0.8], [0]), detections([FAR], [0.9], [0])]
    metric.update(found, [1, 2], [objects([BOX], [0]), objects([], [], **lists)], [SIZE] * 2)
    assert metric.compute()["box_ap"] == pytest.approx(ap, **EXACT)


@pytest.mark.parametrize(("lists", "ap"), [({}, 0.5), ({"not_exhaustive": [0]}, 1.0), ({"not_exhaustive": [1]}, 0.5)])
def test_lvis_ignores_detections_of_a_class_that_is_not_annotated_exhaustively(lists, ap):
    metric = LvisAP()
    metric.update([detections([BOX, FAR], [0.8, 0.9], [0, 0])], [1], [objects([BOX], [0], **lists)], [SIZE])
    assert metric.compute()["box_ap"] == pytest.approx(ap, **EXACT)


def test_lvis_averages_by_frequency_and_caps_detections_of_all_classes_together():
    truth = objects([BOX, FAR], [0, 1])
    found = detections([BOX, FAR], [0.9, 0.8], [0, 1])
    for limit, expected in ((300, {"r": 1, "c": 1}), (1, {"r": 1, "c": 0})):
        metric = LvisAP(max_detections=limit, per_class=True)
        metric.prepare(class_names=["x", "y", "z"], class_frequency=["r", "c", "f"])
        metric.update([found], [7], [truth], [SIZE])
        numbers = metric.compute()
        assert {key: numbers[f"box_ap_{key}"] for key in expected} == pytest.approx(expected, **EXACT)
        assert math.isnan(numbers["box_ap_f"])
        for key in ("box_ap", f"box_ar{limit}"):
            assert numbers[key] == pytest.approx(sum(expected.values()) / 2, **EXACT)
        assert numbers["class/y/box_ap"] == pytest.approx(expected["c"], **EXACT)
    assert metric.table().splitlines()[2] == "| x | 1 | 1.000 | 1.000 |"


def test_lvis_keeps_more_than_300_where_told():
    # 350 false ones of class 1 go before the only true one of class 0.
    found = detections([FAR] * 350 + [BOX], [0.9] * 350 + [0.1], [1] * 350 + [0])
    for limit, ap in ((300, 0.0), (400, 1.0)):
        metric = LvisAP(max_detections=limit)
        metric.update([found], [1], [objects([BOX], [0])], [SIZE])
        assert metric.compute()["box_ap"] == pytest.approx(ap, **EXACT)


def test_lvis_masks_equal_coco_where_all_classes_were_looked_for(images):
    exhaustive = {
        name: (truth | {"crowd": np.zeros_like(truth["crowd"]), "negative": list(range(NUM_CLASSES))}, found)
        for name, (truth, found) in images.items()
    }
    lvis, coco = updated(LvisAP(), exhaustive).compute(), updated(CocoAP(), exhaustive).compute()
    for key in ("box_ap", "mask_ap", "mask_ap50", "mask_ap_small", "mask_ar_large"):
        assert lvis[key] == pytest.approx(coco[key], **EXACT), key


def test_voc_by_hand():
    # Class 0, best first: right, a second time the same (wrong), difficult (neither), nothing there (wrong), right.
    truth = objects([[0, 0, 40, 40], [50, 0, 90, 40], [0, 50, 40, 90]], [0, 0, 0], [False, True, False])
    found = detections(
        [[0, 0, 40, 40], [1, 0, 41, 40], [50, 0, 90, 40], [100, 80, 120, 100], [0, 50, 40, 70]],
        [0.9, 0.8, 0.7, 0.6, 0.5],  # the last has an IoU of exactly 0.5
        [0] * 5,
    )
    metric = VocAP()
    metric.prepare(class_names=["thing", "absent"])
    metric.update([found], [1], [truth], [SIZE])
    numbers = metric.compute()
    # Precisions 1, 1/2, 1/3, 2/4 at recalls 1/2, 1/2, 1/2, 1.
    assert numbers["box_ap"] == pytest.approx(0.5 * 1 + 0.5 * 0.5, **EXACT)
    assert numbers["box_ap_11_points"] == pytest.approx((6 * 1 + 5 * 0.5) / 11, **EXACT)
    assert metric.table().splitlines()[2:] == ["| thing | 2 | 0.750 | 0.773 |", "| absent | 0 | - | - |"]


def test_voc_does_not_look_for_another_object_where_the_nearest_is_taken():
    # Both detections overlap the first object most and the second by more than half.
    truth = objects([[0, 0, 100, 50], [0, 10, 100, 60]], [0, 0])
    found = detections([[0, 0, 100, 50], [0, 1, 100, 51]], [0.9, 0.8], [0, 0])
    voc, coco = VocAP(), CocoAP()
    for metric in (voc, coco):
        metric.update([found], [1], [truth], [SIZE])
    assert voc.compute()["box_ap"] == pytest.approx(0.5, **EXACT)
    assert coco.compute()["box_ap50"] == pytest.approx(1, **EXACT)


def plain_voc(images, label):
    """The development kit's loop, one detection after the other; recalls of a tenth are compared as fractions."""
    lines = sorted(
        (
            (found["scores"][index].item(), name, index)
            for name, (_, found) in sorted(images.items())
            for index in range(len(found["labels"]))
            if found["labels"][index] == label
        ),
        key=lambda line: -line[0],
    )
    taken, correct = set(), []
    for _, name, index in lines:
        truth, found = images[name]
        left, top, right, bottom = found["boxes"][index].tolist()
        best, winner = 0.0, None
        for place, (x, y, width, height) in enumerate(truth["boxes"].tolist()):
            if truth["labels"][place] == label:
                across = max(0.0, min(right, x + width) - max(left, x))
                down = max(0.0, min(bottom, y + height) - max(top, y))
                iou = across * down / ((right - left) * (bottom - top) + width * height - across * down)
                if iou > best:
                    best, winner = iou, place
        if best < 0.5:
            correct.append(0)
        elif not truth["crowd"][winner]:
            correct.append(int((name, winner) not in taken))
            taken.add((name, winner))
    total = sum(int((truth["labels"][~truth["crowd"]] == label).sum()) for truth, _ in images.values())
    hits = [sum(correct[: end + 1]) for end in range(len(correct))]
    after = [max(hits[later] / (later + 1) for later in range(end, len(hits))) for end in range(len(hits))]
    points = [
        max((p for p, h in zip(after, hits, strict=True) if 10 * h >= tenth * total), default=0) for tenth in range(11)
    ]
    return sum(p for p, right in zip(after, correct, strict=True) if right) / total, sum(points) / 11


def test_voc_equals_the_plain_loop(images):
    metric = VocAP(per_class=True)
    metric.prepare(class_names=list("abcde"))
    numbers = updated(metric, images).compute()
    expected = [plain_voc(images, label) for label in range(NUM_CLASSES - 1)]
    for name, (area, points) in zip("abcd", expected, strict=True):
        assert 0 < area < 1
        assert numbers[f"class/{name}/box_ap"] == pytest.approx(area, **EXACT)
        assert numbers[f"class/{name}/box_ap_11_points"] == pytest.approx(points, **EXACT)
    assert numbers["box_ap"] == pytest.approx(np.mean(expected, 0)[0], **EXACT)
    assert numbers["box_ap_11_points"] == pytest.approx(np.mean(expected, 0)[1], **EXACT)
    assert math.isnan(numbers["class/e/box_ap"])


def test_voc_without_objects_is_nan():
    metric = VocAP()
    metric.update([detections([BOX], [0.5], [0])], [1], [objects([], [])], [SIZE])
    assert all(math.isnan(value) for value in metric.compute().values())
