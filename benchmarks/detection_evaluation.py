"""Time COCO's evaluation: python -m benchmarks.detection_evaluation --output FILE

`CocoAP` against torchmetrics' `MeanAveragePrecision` with pycocotools, both from tensors to numbers: all updates, then
one compute, once each, in one process. Boxes: 5,000 images, 7 objects each on average, 100 detections, 80 classes.
Masks: 300 such images of 480 x 640 pixels, since dense masks of more do not fit in memory. torchmetrics gets COCO's
thresholds in float64; its own are rounded to float32 and change the result in the fifth digit. `CocoAP` matches on all
cores (RAYON_NUM_THREADS), pycocotools on one.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hotcoco import mask as run_lengths
from torchmetrics.detection import MeanAveragePrecision

from benchmarks.records import Record, Recorder
from tasks.detection.metrics import CocoAP

HEIGHT, WIDTH = 480, 640
NUM_OBJECTS = 7
TOLERANCE = 1e-6
# Ours: torchmetrics'.
NAMES = {
    **{"ap": "map", "ap50": "map_50", "ap75": "map_75"},
    **{f"ap_{area}": f"map_{area}" for area in ("small", "medium", "large")},
    **{f"ar{limit}": f"mar_{limit}" for limit in (1, 10, 100)},
    **{f"ar_{area}": f"mar_{area}" for area in ("small", "medium", "large")},
}


@dataclass(frozen=True)
class Case:
    """Numbers of images, of detections in each, and of classes."""

    images: int
    detections: int
    classes: int
    masks: bool = False

    @property
    def prefix(self) -> str:
        return "mask" if self.masks else "box"


def images(case: Case) -> Iterator[tuple[dict, dict, dict]]:
    """Yield ground truth as ours and as torchmetrics' target, and the detections that both take."""
    random = np.random.default_rng(0)
    for _ in range(case.images):
        count = random.poisson(NUM_OBJECTS)
        boxes, labels = random_boxes(random, count), random.integers(0, case.classes, count)
        # Half of the detections lie on objects, if there are any, and most of those have the right class.
        near = random.integers(0, count, case.detections // 2) if count else np.zeros(0, int)
        found = np.concatenate([boxes[near], random_boxes(random, case.detections - len(near))])
        found += random.normal(0, 4, found.shape)
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        found_labels = random.integers(0, case.classes, len(found))
        right = np.flatnonzero(random.random(len(near)) < 0.8)
        found_labels[right] = labels[near[right]]
        crowd = random.random(count) < 0.03
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        target |= {"iscrowd": torch.from_numpy(crowd).long()}
        detections = {
            "boxes": torch.from_numpy(found).float(),
            "scores": torch.from_numpy(random.random(len(found))).float(),
            "labels": torch.from_numpy(found_labels),
        }
        truth = {"labels": labels, "crowd": crowd}
        if case.masks:
            target["masks"], detections["masks"] = filled(boxes), filled(found)
            truth["masks"] = run_lengths.encode(target["masks"].permute(1, 2, 0).numpy()) if count else []
            areas = target["masks"].sum((1, 2)).double().numpy()
        target["area"] = torch.from_numpy(areas)
        truth |= {"boxes": np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1), "areas": areas}
        yield truth, target, detections


def random_boxes(random: np.random.Generator, count: int) -> np.ndarray:
    """Return `(count, 4)` xyxy boxes inside the image, small ones more often than large ones."""
    size = np.exp(random.uniform(math.log(8), math.log(400), (count, 2)))
    corner = random.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - size)
    # float32 values: torchmetrics stores boxes as such.
    return np.concatenate([corner, corner + size], 1).astype(np.float32).astype(np.float64)


def filled(boxes: np.ndarray) -> torch.Tensor:
    """Return masks `(N, HEIGHT, WIDTH)` bool that fill boxes `(N, 4)`, which may leave the image."""
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.clip(0).astype(int), strict=True):
        mask[top : bottom + 1, left : right + 1] = True
    return masks


def compare(case: Case) -> Record:
    """Run both and return their times, the ratio and the largest difference of the numbers.

    Raises:
        AssertionError: The numbers differ.
    """
    ours = CocoAP()
    ours.prepare(class_names=[str(label) for label in range(case.classes)])
    theirs = MeanAveragePrecision(
        iou_type="segm" if case.masks else "bbox",
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        backend="pycocotools",
    )
    seconds = {name: {"update": 0.0, "compute": 0.0} for name in ("ours", "torchmetrics")}
    for number, (truth, target, detections) in enumerate(images(case)):
        seconds["ours"]["update"] += timed(ours.update, [detections], [number], [truth], [(HEIGHT, WIDTH)])[0]
        seconds["torchmetrics"]["update"] += timed(theirs.update, [detections], [target])[0]
    results = {}
    for name, metric in (("ours", ours), ("torchmetrics", theirs)):
        seconds[name]["compute"], results[name] = timed(metric.compute)
    differences = [
        difference(results["ours"][f"{case.prefix}_{name}"], results["torchmetrics"][other].item())
        for name, other in NAMES.items()
    ]
    assert max(differences) <= TOLERANCE, f"{case}: numbers differ by {differences}"
    total = {name: sum(parts.values()) for name, parts in seconds.items()}
    return {
        "benchmark": "detection_evaluation",
        "shape": case.prefix,
        "images": case.images,
        "detections": case.detections,
        "classes": case.classes,
        "seconds": {name: {part: round(value, 4) for part, value in s.items()} for name, s in seconds.items()},
        "ratio": {"torchmetrics": round(total["torchmetrics"] / total["ours"], 2)},
        "largest_difference": max(differences),
        f"{case.prefix}_ap": results["ours"][f"{case.prefix}_ap"],
    }


def timed(run: Callable[..., object], *arguments: object) -> tuple[float, object]:
    start = time.perf_counter()
    result = run(*arguments)
    return time.perf_counter() - start, result


def difference(ours: float, theirs: float) -> float:
    """Return the distance; torchmetrics writes -1 for our nan."""
    return abs((-1 if math.isnan(ours) else ours) - theirs)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--images", type=int, default=5000, help="for boxes (default: 5000)")
    options.add_argument("--mask-images", type=int, default=300, help="for masks; 0 for none (default: 300)")
    options.add_argument("--detections", type=int, default=100, help="of each image (default: 100)")
    options.add_argument("--classes", type=int, default=80, help="(default: 80)")
    options.add_argument("--output", type=Path, help="results file")
    options.add_argument("--quick", action="store_true", help="few images: does it run, not how fast")
    options.set_defaults(device="cpu")
    options = options.parse_args()
    if options.quick:
        options.images, options.mask_images, options.detections, options.classes = 20, 5, 10, 4
    recorder = Recorder(options)
    recorder.add(**compare(Case(options.images, options.detections, options.classes)))
    if options.mask_images:
        recorder.add(**compare(Case(options.mask_images, options.detections, options.classes, masks=True)))
    recorder.write(options.output)


if __name__ == "__main__":
    main()
