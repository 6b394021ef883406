"""COCO's evaluation by one of three libraries, which give the same numbers.

Shapes: N rows, one for each detection or object of all images; T = 10 IoU thresholds, R = 101 recalls, K classes,
A = 4 ranges of area, M limits of detections.
"""

import contextlib
import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import hotcoco
import numpy as np
from hotcoco import mask as run_lengths

from datamodules.batch import Array
from tasks.detection.metrics.base import ImageResult

Engine = Literal["hotcoco", "pycocotools", "faster_coco_eval"]
Kind = Literal["bbox", "segm"]
# hotcoco takes polygons too; here all are run lengths.
Masks = list[dict[str, Any] | list[list[float]]]


@dataclass(frozen=True)
class Curves:
    """Precision and recall, -1 where a class has no object of that area.

    IoU thresholds are .50, .55, ... .95; the ranges of area are all, small, medium and large.
    """

    precision: Array  # (T, R, K, A, M)
    recall: Array  # (T, K, A, M)


@dataclass(frozen=True)
class Rows:
    """Detections or objects of all images; images and categories count from 1."""

    image: Array  # (N,) int64
    category: Array  # (N,) int64, label + 1
    boxes: Array  # (N, 4) float64, left, top, width, height
    areas: Array  # (N,) float64
    masks: Masks | None  # N
    scores: Array | None = None  # (N,) float64, of detections
    crowd: Array | None = None  # (N,) int64, of objects

    def annotations(self) -> list[dict[str, Any]]:
        """Return one dict for each row, as in COCO's files."""
        columns: dict[str, Sequence[Any]] = {
            # pycocotools takes an object of id 0 for missed.
            "id": range(1, len(self.image) + 1),
            "image_id": self.image.tolist(),
            "category_id": self.category.tolist(),
            "bbox": self.boxes.tolist(),
            "area": self.areas.tolist(),
            "iscrowd": (np.zeros_like(self.image) if self.crowd is None else self.crowd).tolist(),
        }
        if self.masks is not None:
            columns["segmentation"] = self.masks
        if self.scores is not None:
            columns["score"] = self.scores.tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def check_engine(engine: Engine) -> None:
    """Raise ValueError if the engine is unknown or not installed."""
    if engine not in get_args(Engine):
        raise ValueError(f"CocoAP: engine is {engine!r}, expected one of {', '.join(get_args(Engine))}.")
    try:
        importlib.import_module(engine)
    except ImportError as error:
        raise ValueError(
            f"CocoAP: engine {engine!r} does not import ({error}). Install it with pip install "
            f"{engine.replace('_', '-')}, or take hotcoco, which gives the same numbers."
        ) from error


def evaluate(
    images: Sequence[ImageResult], num_classes: int, kind: Kind, *, engine: Engine, limits: Sequence[int]
) -> Curves:
    """Match detections with objects by the IoU of boxes or of masks, with crowds as COCO treats them.

    Args:
        images: Sorted by id; each with masks for `segm`.
        num_classes: K.
        kind: Decides what overlaps and whose area counts: of a detection, its box or its mask.
        engine: Library.
        limits: Best detections of an image and class that count, ascending.
    """
    truth, found = truth_rows(images, kind), found_rows(images, kind)
    sizes = [image_entry(number, image) for number, image in enumerate(images, 1)]
    if engine == "hotcoco":
        data = hotcoco_data(sizes, num_classes, truth)
        evaluator: Any = hotcoco.COCOeval(data, hotcoco_results(data, found), kind)
        return run(evaluator, limits)
    # They print their progress.
    with contextlib.redirect_stdout(io.StringIO()):
        if engine == "pycocotools":
            make_data = importlib.import_module("pycocotools.coco").COCO
            make_evaluator = importlib.import_module("pycocotools.cocoeval").COCOeval
        else:
            library = importlib.import_module("faster_coco_eval")
            make_data, make_evaluator = library.COCO, library.COCOeval_faster
        pair = []
        for rows in (truth, found):
            data = make_data()
            data.dataset = {"images": sizes, "categories": categories(num_classes), "annotations": rows.annotations()}
            data.createIndex()
            pair.append(data)
        return run(make_evaluator(*pair, iouType=kind), limits)


def run(evaluator: Any, limits: Sequence[int]) -> Curves:
    """Run an evaluator with pycocotools' interface."""
    evaluator.params.maxDets = list(limits)
    evaluator.evaluate()
    evaluator.accumulate()
    return Curves(np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"]))


def hotcoco_data(images: list[dict[str, Any]], num_classes: int, truth: Rows) -> hotcoco.COCO:
    """Return ground truth; `images` are made by `image_entry`."""
    return hotcoco.COCO.from_arrays(
        images,
        categories(num_classes),
        truth.image,
        truth.category,
        truth.boxes,
        area=truth.areas,
        iscrowd=truth.crowd,
        segmentation=truth.masks,
    )


def hotcoco_results(data: hotcoco.COCO, found: Rows) -> hotcoco.COCO:
    """Return detections in the images of `data`."""
    assert found.scores is not None
    table = np.column_stack([found.image, found.boxes, found.scores, found.category])
    results = data.load_res(table, segmentation=found.masks)
    if found.masks is not None:
        # It holds the boxes' areas.
        results.update_anns(ids=np.arange(1, len(table) + 1), area=found.areas)
    return results


def image_entry(number: int, image: ImageResult) -> dict[str, Any]:
    """Return COCO's description of an image; `number` counts from 1."""
    return {"id": number, "height": image.size[0], "width": image.size[1]}


def categories(num_classes: int) -> list[dict[str, Any]]:
    """Return COCO's description of the classes."""
    return [{"id": label + 1, "name": str(label)} for label in range(num_classes)]


def truth_rows(images: Sequence[ImageResult], kind: Kind) -> Rows:
    """Return the objects of all images, with masks for `segm`."""
    truth = [image.truth for image in images]
    masks: Masks | None = None
    if kind == "segm":
        masks = [dict(mask) for objects in truth for mask in objects.get("masks", [])]
    return Rows(
        image=_numbers([objects["labels"] for objects in truth]),
        category=_joined([objects["labels"] for objects in truth]).astype(np.int64) + 1,
        boxes=_joined([objects["boxes"] for objects in truth]).astype(np.float64).reshape(-1, 4),
        areas=_joined([objects["areas"] for objects in truth]).astype(np.float64),
        crowd=_joined([objects["crowd"] for objects in truth]).astype(np.int64),
        masks=masks,
    )


def found_rows(images: Sequence[ImageResult], kind: Kind) -> Rows:
    """Return the detections in all images, with masks and their areas for `segm`."""
    # Subtracted in float64, as the boxes in a results file are.
    boxes = _joined([image.boxes for image in images]).astype(np.float64).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    masks: Masks | None = None
    areas: Array = boxes[:, 2] * boxes[:, 3]
    if kind == "segm":
        encoded = [{"size": list(image.size), "counts": counts} for image in images for counts in image.masks or []]
        masks, areas = [*encoded], np.asarray(run_lengths.area(encoded), np.float64)
    return Rows(
        image=_numbers([image.labels for image in images]),
        category=_joined([image.labels for image in images]).astype(np.int64) + 1,
        boxes=boxes,
        areas=areas,
        masks=masks,
        scores=_joined([image.scores for image in images]).astype(np.float64),
    )


def _numbers(parts: Sequence[Array]) -> Array:
    """Return the image's number for each row."""
    return np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])


def _joined(parts: Sequence[Array]) -> Array:
    return np.concatenate(parts) if parts else np.zeros(0)
