"""Panoptic quality by hand and by torchmetrics; Mask2Former's predictions on original images."""

import numpy as np
import pytest
import torch
from hotcoco import mask
from torchmetrics.detection import PanopticQuality as TorchPanopticQuality

from tasks.segmentation.mask2former_inference import Panoptic
from tasks.segmentation.mask2former_layers import MaskPrediction
from tasks.segmentation.panoptic_metrics import ObjectMetrics, PanopticQuality, segment_masks

SIZE = (10, 10)
# A logit whose probability is 1 in float32.
SURE = 40.0


def region(rows, columns, size=SIZE):
    inside = np.zeros(size, bool)
    inside[slice(*rows), slice(*columns)] = True
    return inside


def truth(masks, labels, crowd=None):
    masks = np.array(masks, bool).reshape(len(labels), *SIZE)
    return {
        "boxes": np.zeros((len(labels), 4)),
        "labels": np.array(labels, np.int64),
        "areas": masks.sum((1, 2)).astype(np.float64),
        "crowd": np.array(crowd or [False] * len(labels), bool),
        "masks": [mask.encode(np.asfortranarray(one, np.uint8)) for one in masks],
    }


def found(masks, labels):
    return {
        "boxes": torch.zeros(len(labels), 4),
        "scores": torch.ones(len(labels)),
        "labels": torch.tensor(labels, dtype=torch.long),
        "masks": torch.from_numpy(np.array(masks, bool).reshape(len(labels), *SIZE)),
    }


def evaluate(metric, detections, objects):
    metric.update(detections, list(range(len(objects))), objects, [SIZE] * len(objects))
    return metric.compute()


def test_quality_is_the_mean_iou_of_matches_over_the_mean_count_of_segments():
    # Class 0 is a thing, 1 and 2 are stuff. One thing of 25 pixels is found as 20 of them: IoU 0.8. Another is missed,
    # and one is found where there is none. The stuff is found exactly.
    things = [region((0, 5), (0, 5)), region((0, 2), (6, 9))]
    stuff = region((5, 9), (0, 10))
    objects = truth([*things, stuff], [0, 0, 1])
    seen = found([region((0, 5), (0, 4)), region((3, 5), (6, 9)), stuff], [0, 0, 1])
    objects["masks"].append(mask.encode(np.asfortranarray(region((3, 5), (6, 10)), np.uint8)))
    objects |= {"labels": np.array([0, 0, 1, 2]), "crowd": np.zeros(4, bool), "areas": np.array([25.0, 6, 40, 8])}
    objects["boxes"] = np.zeros((4, 4))
    metric = PanopticQuality(things=[0], per_class=True)
    metric.prepare(class_names=["thing", "stuff", "missed", "absent"])
    numbers = evaluate(metric, [seen], [objects])
    # Class 0: 0.8 / (1 match + half of a false and a missed one); class 2 is missed; class 3 does not occur.
    assert numbers["class/thing/pq"] == pytest.approx(0.8 / 2)
    assert numbers["class/stuff/pq"] == 1
    assert numbers["class/missed/pq"] == 0
    assert numbers["class/absent/pq"] != numbers["class/absent/pq"]
    assert numbers["pq"] == pytest.approx((0.4 + 1 + 0) / 3)
    assert numbers["pq_things"] == pytest.approx(0.4)
    assert numbers["pq_stuff"] == pytest.approx(0.5)
    assert numbers["sq_things"] == pytest.approx(0.8)
    assert numbers["rq_things"] == pytest.approx(0.5)


def test_what_lies_in_a_crowd_or_where_nothing_is_annotated_counts_neither_way():
    objects = truth([region((0, 5), (0, 5)), region((0, 5), (5, 10)), region((5, 8), (0, 10))], [0, 0, 1], [0, 1, 0])
    seen = found([region((0, 5), (0, 5)), region((0, 5), (5, 10)), region((5, 9), (0, 10)), region((9, 10), (0, 9))],
                 [0, 0, 1, 0])  # fmt: skip
    numbers = evaluate(PanopticQuality(things=[0]), [seen], [objects])
    assert numbers["pq"] == numbers["rq"] == 1


def test_random_segments_have_the_quality_that_torchmetrics_gives_them():
    random = np.random.default_rng(0)
    theirs = TorchPanopticQuality(things={0, 1}, stuffs={2, 3}, return_sq_and_rq=True)
    ours, detections, objects = PanopticQuality(things=[0, 1]), [], []
    for _ in range(6):
        owner = random.integers(0, 4, (5, 5)).repeat(2, 0).repeat(2, 1)
        other = owner.copy()
        other[random.random(SIZE) < 0.2] = 2
        pair = []
        for owners in (owner, other):
            present = np.unique(owners)
            pair.append(([owners == number for number in present], present.tolist()))
        objects.append(truth(*pair[0]))
        detections.append(found(*pair[1]))
        theirs.update(*(torch.from_numpy(np.stack([part, part * 0], -1))[None] for part in (other, owner)))
    numbers = evaluate(ours, detections, objects)
    # Theirs counts in float32 in part.
    assert [numbers[key] for key in ("pq", "sq", "rq")] == pytest.approx(theirs.compute().tolist(), rel=1e-6)
    assert 0.2 < numbers["pq"] < 1


@pytest.mark.parametrize("num_images", [0, 1])
def test_without_any_segment_there_is_no_quality(num_images):
    metric = PanopticQuality()
    metric.prepare(class_names=["a", "b"])
    numbers = evaluate(metric, [found([], [])] * num_images, [truth([], [])] * num_images)
    assert numbers["pq"] != numbers["pq"]


def test_an_image_in_which_nothing_was_found_misses_its_segments():
    whole = truth([region((0, 10), (0, 10))], [0])
    assert evaluate(PanopticQuality(), [found([], [])], [whole])["pq"] == 0


def test_what_is_not_annotated_at_all_is_not_held_against_the_model():
    anything = found([region((0, 10), (0, 10))], [0])
    numbers = evaluate(PanopticQuality(), [anything], [truth([], [])])
    assert numbers["pq"] != numbers["pq"]


def test_segments_become_masks():
    segments = torch.tensor([[0, 1], [2, 2]])
    masks = segment_masks(Panoptic(segments, [5, 3], [0.5, 0.75]))
    assert masks["masks"].tolist() == [[[False, True], [False, False]], [[False, False], [True, True]]]
    assert masks["labels"].tolist() == [5, 3]
    assert segment_masks(Panoptic(segments * 0, [], []))["masks"].shape == (0, 2, 2)


def queries_of(masks, labels, num_classes, stride=4):
    """A prediction for an image of twice the size, padded to 32 by 32, that is right."""
    classes = torch.zeros(1, len(labels), num_classes + 1)
    logits = torch.full((1, len(labels), 32 // stride, 32 // stride), -SURE)
    for query, (inside, label) in enumerate(zip(masks, labels, strict=True)):
        classes[0, query, label] = SURE
        logits[0, query, :5, :5][torch.from_numpy(inside[::2, ::2])] = SURE
    return MaskPrediction(classes, logits)


def test_predictions_are_compared_on_the_original_image():
    """The image was enlarged from 10 to 20 pixels and padded to 32; masks have a stride of 4, two original pixels."""
    masks, labels = [region((0, 4), (0, 10)), region((4, 10), (0, 6)), region((4, 10), (6, 10))], [1, 0, 0]
    metrics = ObjectMetrics(("instance", "panoptic"), 2, things=(0,))
    metrics.prepare(["thing", "stuff"])
    batch = {
        "image": torch.zeros(1, 3, 32, 32),
        "valid": [(20, 20)],
        "original_size": [SIZE],
        "image_id": ["a"],
        "objects": [truth(masks[1:], labels[1:])],
        "segments": [truth(masks, labels)],
    }
    metrics.update(queries_of(masks, labels, 2), batch)
    numbers = metrics.compute()
    assert numbers["mask_ap"] == pytest.approx(1)
    assert numbers["pq"] == numbers["pq_things"] == numbers["pq_stuff"] == pytest.approx(1)
    metrics.reset()
    metrics.update(queries_of(masks[::-1], labels, 2), batch)
    assert metrics.compute()["pq"] < 0.7


def test_unknown_settings_and_missing_truth_are_refused():
    with pytest.raises(ValueError, match=r"evaluate is \('semantic',\), expected some of \('instance', 'panoptic'\)"):
        ObjectMetrics(("semantic",), 2)
    with pytest.raises(ValueError, match=r"things are \(0, 2\), expected class numbers from 0 to 1"):
        ObjectMetrics(("panoptic",), 2, (0, 2))
    with pytest.raises(ValueError, match="evaluate has 'panoptic', and the data gives no 'segments'"):
        ObjectMetrics(("panoptic",), 2).update(queries_of([], [], 2), {"objects": []})
