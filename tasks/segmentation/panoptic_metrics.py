"""How good Mask2Former's instances and segments are.

Shapes: N instances or segments of an image, K classes, H W size of the padded image, h w size of the original.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import hotcoco
import numpy as np
import torch
from hotcoco.panoptic import PanopticEval
from torch import Tensor, nn

from datamodules.batch import PanopticEvalBatch
from tasks.detection.metrics import CocoAP, DetectionMetric
from tasks.detection.metrics.base import ImageResult, Summary
from tasks.detection.metrics.coco import count_objects
from tasks.detection.metrics.engines import categories, found_rows, hotcoco_results, image_entry, truth_rows
from tasks.detection.postprocess import Detections
from tasks.segmentation.layers import resize
from tasks.segmentation.mask2former_inference import Panoptic, instances, panoptic
from tasks.segmentation.mask2former_layers import MaskPrediction

Objects = Literal["instance", "panoptic"]
# What a batch calls the ground truth of each.
_TRUTH: dict[Objects, Literal["objects", "segments"]] = {"instance": "objects", "panoptic": "segments"}
_GROUPS = {"": "All", "_things": "Things", "_stuff": "Stuff"}


class PanopticQuality(DetectionMetric):
    """Panoptic quality (arXiv:1801.00868), equal to panopticapi's.

    `compute` gives `pq`, `sq` (mean IoU of the segments found) and `rq` (F1 of finding them), means over the classes
    that are in the data or found, and the same with `_things` and `_stuff`. Pixels without a true segment count neither
    way, nor do segments inside a crowd of their class.

    Args:
        things: Classes that are objects; the others are stuff. None: all.
        per_class: See `DetectionMetric`.
    """

    def __init__(self, things: Collection[int] | None = None, per_class: bool = False) -> None:
        super().__init__(per_class)
        self.things = things

    def summarize(self, images: list[ImageResult], num_classes: int) -> Summary:
        summary = Summary({}, {}, count_objects(images, num_classes))
        results = self._results(images, num_classes) if images else {}
        for suffix, group in _GROUPS.items():
            for key in ("pq", "sq", "rq"):
                found = results.get(group, {"n": 0})
                summary.numbers[f"{key}{suffix}"] = found[key] if found["n"] else float("nan")
        by_class = results.get("per_class", {})
        quality = np.array([by_class.get(label + 1, {"pq": -1.0})["pq"] for label in range(num_classes)])
        summary.by_class["pq"] = np.where(quality < 0, np.nan, quality)
        return summary

    def _results(self, images: list[ImageResult], num_classes: int) -> dict[str, Any]:
        truth = truth_rows(images, "segm")
        is_thing = [self.things is None or label in self.things for label in range(num_classes)]
        data = hotcoco.COCO.from_arrays(
            [image_entry(number, image) for number, image in enumerate(images, 1)],
            [entry | {"isthing": int(one)} for entry, one in zip(categories(num_classes), is_thing, strict=True)],
            truth.image,
            truth.category,
            truth.boxes,
            area=truth.areas,
            iscrowd=truth.crowd,
            segmentation=truth.masks,
        )
        evaluation = PanopticEval(data, hotcoco_results(data, found_rows(images, "segm")))
        evaluation.evaluate()
        results: dict[str, Any] = evaluation.results()
        return results


class ObjectMetrics(nn.Module):
    """Average precision of Mask2Former's instances and quality of its segments.

    Args:
        evaluate: Which of the two.
        num_classes: K.
        things: Classes that are objects; the others are stuff. None: all.
        per_class: Add the numbers of each class.

    Raises:
        ValueError: An entry of `evaluate` or `things` is unknown.
    """

    def __init__(
        self,
        evaluate: Sequence[Objects],
        num_classes: int,
        things: Collection[int] | None = None,
        per_class: bool = False,
    ) -> None:
        super().__init__()
        if not set(evaluate) <= _TRUTH.keys():
            raise ValueError(f"Segmentation: evaluate is {tuple(evaluate)}, expected some of {tuple(_TRUTH)}.")
        if things is not None and not set(things) <= set(range(num_classes)):
            raise ValueError(
                f"Segmentation: things are {tuple(things)}, expected class numbers from 0 to {num_classes - 1}."
            )
        self.things = frozenset(range(num_classes) if things is None else things)
        self.metrics = nn.ModuleDict()
        if "instance" in evaluate:
            self.metrics["instance"] = CocoAP(per_class=per_class)
        if "panoptic" in evaluate:
            self.metrics["panoptic"] = PanopticQuality(self.things, per_class)

    def prepare(self, class_names: Sequence[str] | None) -> None:
        """Take the names of the classes."""
        for metric in self._of_kind().values():
            metric.prepare(class_names=class_names)

    @torch.no_grad()
    def update(self, prediction: MaskPrediction, batch: PanopticEvalBatch) -> None:
        """Add the images of a batch.

        Args:
            prediction: Of the last layer for `batch["image"]`.
            batch: With `objects` for instances and `segments` for panoptic quality.

        Raises:
            ValueError: The batch lacks one of these.
        """
        for kind in self._of_kind():
            if _TRUTH[kind] not in batch:
                raise ValueError(
                    f"Segmentation: evaluate has {kind!r}, and the data gives no {_TRUTH[kind]!r} to compare with. "
                    "See datamodules.batch.PanopticEvalBatch."
                )
        for place, size in enumerate(batch["original_size"]):
            # One image at a time: the masks of all queries at full size take gigabytes.
            one = _on_original(prediction, place, batch["image"].shape[-2:], batch["valid"][place], size)
            for kind, metric in self._of_kind().items():
                if kind == "instance":
                    (found,) = instances(one, size, things=self.things)
                else:
                    found = segment_masks(panoptic(one, size, self.things)[0])
                metric.update([found], [batch["image_id"][place]], [batch[_TRUTH[kind]][place]], [size])

    def compute(self) -> dict[str, float]:
        """Return the numbers of the images of all ranks, `mask_ap` and `pq` among them."""
        numbers: dict[str, float] = {}
        for metric in self._of_kind().values():
            numbers |= metric.compute()
        return numbers

    def reset(self) -> None:
        """Forget all images."""
        for metric in self._of_kind().values():
            metric.reset()

    def _of_kind(self) -> dict[Objects, DetectionMetric]:
        return dict(self.metrics.items())  # type: ignore[arg-type]


def segment_masks(found: Panoptic) -> Detections:
    """Return the segments of an image as masks `(N, h, w)` bool; their boxes are zeros."""
    device = found.segments.device
    numbers = torch.arange(1, len(found.labels) + 1, device=device)
    return Detections(
        boxes=torch.zeros(len(numbers), 4, device=device),
        scores=torch.tensor(found.scores, device=device),
        labels=torch.tensor(found.labels, dtype=torch.int64, device=device),
        masks=found.segments == numbers[:, None, None],
    )


def _on_original(
    prediction: MaskPrediction, place: int, padded: Sequence[int], valid: Sequence[int], original: Sequence[int]
) -> MaskPrediction:
    """Return what was predicted for one image of a batch, its masks `(1, Q, h, w)` on the original."""
    masks: Tensor = resize(prediction.masks[place : place + 1], padded)[..., : valid[0], : valid[1]]
    return MaskPrediction(prediction.classes[place : place + 1], resize(masks, original))
