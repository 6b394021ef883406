"""Random detections and ground truth on images of one size, for the metrics."""

import numpy as np
import torch
from pycocotools import mask as coco_mask

SIZE = (160, 200)
NUM_CLASSES = 5  # nothing is of the last


def ellipses(boxes):
    """Masks `(N, *SIZE)` bool of ellipses inside xyxy boxes: smaller than the boxes."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    masks = np.zeros((len(boxes), *SIZE), bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[:] = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2 < 1
    return masks


def random_boxes(random, count):
    size = random.uniform(8, 150, (count, 2))
    corner = random.uniform(0, 1, (count, 2)) * (np.array(SIZE[::-1]) - size)
    return np.concatenate([corner, corner + size], 1)


def random_image(random):
    """One image's `(truth, detections)`: objects, a fifth of them crowds, found roughly, and false detections."""
    count = random.integers(1, 9)
    boxes, labels = random_boxes(random, count), random.integers(0, NUM_CLASSES - 1, count)
    chosen = random.integers(0, count, 3 * count)
    found = np.concatenate([boxes[chosen] + random.normal(0, 3, (3 * count, 4)), random_boxes(random, 4)])
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    found_labels = np.concatenate([labels[chosen], random.integers(0, NUM_CLASSES - 1, 4)])
    masks = ellipses(boxes)
    truth = {
        "boxes": np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1),
        "labels": labels,
        "areas": masks.sum((1, 2)).astype(float),
        "crowd": random.random(count) < 0.2,
        "masks": [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks],
    }
    # Two digits: many scores tie.
    scores = random.random(len(found)).round(2)
    return truth, detections(found, scores, found_labels, ellipses(found))


def detections(boxes, scores, labels, masks=None):
    boxes = torch.tensor(np.reshape(boxes, (-1, 4)), dtype=torch.float32)
    found = {"boxes": boxes, "scores": torch.tensor(np.array(scores), dtype=torch.float32)}
    found["labels"] = torch.tensor(np.array(labels), dtype=torch.int64)
    return found if masks is None else found | {"masks": torch.from_numpy(masks)}


def objects(boxes, labels, crowd=None, **lists):
    """Ground truth without masks from xyxy boxes."""
    boxes = np.reshape(boxes, (-1, 4)).astype(float)
    boxes[:, 2:] -= boxes[:, :2]
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.array(crowd)
    return {
        "boxes": boxes,
        "labels": np.array(labels, np.int64),
        "areas": boxes[:, 2] * boxes[:, 3],
        "crowd": crowd,
        **lists,
    }


def empty_truth():
    return objects([], []) | {"masks": []}


def no_detections():
    return detections([], [], [], np.zeros((0, *SIZE), bool))


def updated(metric, images, batch=5):
    names = list(images)
    for start in range(0, len(names), batch):
        chosen = names[start : start + batch]
        truth, found = zip(*(images[name] for name in chosen), strict=True)
        metric.update(list(found), chosen, list(truth), [SIZE] * len(chosen))
    return metric


def random_images():
    """Twelve images by id in no order; some lack objects, some detections, one both."""
    random = np.random.default_rng(0)
    found = {int(name): random_image(random) for name in random.permutation(500)[:12]}
    names = list(found)
    found[names[3]] = (empty_truth(), found[names[3]][1])
    found[names[5]] = (found[names[5]][0], no_detections())
    found[names[8]] = (empty_truth(), no_detections())
    return found
