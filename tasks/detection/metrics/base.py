"""What the metrics share: results kept by image, gathered once, and the report by class.

Shapes: N detections or objects of an image, K classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch.distributed as dist
from hotcoco import mask as run_lengths
from torch import Tensor
from torchmetrics import Metric

from datamodules.batch import Array, DetectionTruth, RunLengths
from tasks.detection.postprocess import Detections

ImageId = int | str


class EncodedDetections(TypedDict):
    """`Detections` on the original image whose masks are run lengths already."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: NotRequired[list[RunLengths]]


@dataclass(frozen=True)
class ImageResult:
    """What was found in one image and what is there, on the host and small enough to send."""

    size: tuple[int, int]  # height, width
    boxes: Array  # (N, 4) float32 xyxy, pixels
    scores: Array  # (N,) float32
    labels: Array  # (N,) int64
    masks: list[bytes] | None  # counts of N run lengths
    truth: DetectionTruth

    @classmethod
    def of(
        cls, detections: Detections | EncodedDetections, truth: DetectionTruth, size: tuple[int, int]
    ) -> "ImageResult":
        """Bring an image's detections to the host; `size` is (height, width)."""
        # Copies: a view would keep all that the detector considered.
        boxes, scores, labels = (detections[key].cpu().numpy().copy() for key in ("boxes", "scores", "labels"))
        return cls(size, boxes, scores, labels, _encode(detections.get("masks"), size), truth)


@dataclass(frozen=True)
class Summary:
    """The numbers of one evaluation, from 0 to 1, nan where there is nothing to evaluate.

    Args:
        numbers: Of all classes together.
        by_class: `(K,)` float64 for each of some of the keys of `numbers`.
        objects: `(K,)` int64: how many objects count.
    """

    numbers: dict[str, float]
    by_class: dict[str, Array]
    objects: Array


class DetectionMetric(Metric, ABC):
    """Average precision over whole data sets, in one process or in many.

    Results are kept by image: when an image comes again, because a sampler filled up the shares of the ranks, the later
    result replaces the earlier one. `compute` gathers them on the first rank, which evaluates and tells the others.
    Values are from 0 to 1, and nan where there is nothing to evaluate: no object, or no image at all.

    Args:
        per_class: Add the average precision of each class as `class/<name>/<key>` to what `compute` returns.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, per_class: bool = False) -> None:
        # Python objects, which torchmetrics cannot gather: no states of its own, no synchronisation.
        super().__init__(sync_on_compute=False)
        self.per_class = per_class
        self.num_classes: int | None = None
        self.class_names: list[str] | None = None
        self.class_frequency: list[str] | None = None
        self.images: dict[ImageId, ImageResult] = {}
        self.summary: Summary | None = None

    def prepare(
        self,
        class_names: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
        class_frequency: Sequence[str] | None = None,
    ) -> None:
        """Take what the data knows of its classes, each in the order of the labels.

        Args:
            class_names: For the report. Without it the category ids are the names, and else the labels.
            category_ids: Of the annotation file.
            class_frequency: LVIS's `r`, `c` or `f`.

        Raises:
            ValueError: The lists differ in length.
        """
        lengths = {len(given) for given in (class_names, category_ids, class_frequency) if given is not None}
        if len(lengths) > 1:
            raise ValueError(
                f"{type(self).__name__}: class names, category ids and class frequency have lengths {sorted(lengths)}, "
                "expected one entry for each class."
            )
        self.num_classes = min(lengths, default=None)
        ids = None if category_ids is None else [str(category) for category in category_ids]
        self.class_names = ids if class_names is None else list(class_names)
        self.class_frequency = None if class_frequency is None else list(class_frequency)

    def update(
        self,
        detections: Sequence[Detections | EncodedDetections],
        image_id: Sequence[ImageId],
        truth: Sequence[DetectionTruth],
        original_size: Sequence[tuple[int, int]],
    ) -> None:
        """Add images.

        Args:
            detections: In pixels of the original image; masks `(N, H, W)` bool of that size, or run lengths.
            image_id: Unique over the data set.
            truth: Ground truth of each image.
            original_size: (height, width) of each image.

        Raises:
            ValueError: Masks are not of the original image's size.
        """
        for found, name, objects, (height, width) in zip(detections, image_id, truth, original_size, strict=True):
            self.images[name] = ImageResult.of(found, objects, (height, width))

    def compute(self) -> dict[str, float]:
        """Evaluate the images of all ranks; every rank gets the same numbers.

        Raises:
            ValueError: A label is above the classes of `prepare`.
        """
        self.summary = self._summary_of_all_ranks()
        numbers = dict(self.summary.numbers)
        if self.per_class:
            for key, values in self.summary.by_class.items():
                names = self._names(len(values))
                numbers |= {f"class/{name}/{key}": float(value) for name, value in zip(names, values, strict=True)}
        return numbers

    def table(self) -> str:
        """Return the last result of `compute` as a Markdown table with a row for each class.

        Raises:
            ValueError: Nothing was computed since the last `reset`.
        """
        if self.summary is None:
            raise ValueError(f"{type(self).__name__}: there is no result to show. Call `compute` on every rank first.")
        columns = self.summary.by_class
        lines = [["class", "objects", *(key.replace("_", " ").replace("ap", "AP") for key in columns)]]
        lines.append(["---", *["---:"] * (len(columns) + 1)])
        for label, name in enumerate(self._names(len(self.summary.objects))):
            values = [values[label] for values in columns.values()]
            cells = ["-" if np.isnan(value) else f"{value:.3f}" for value in values]
            lines.append([name.replace("|", "\\|"), str(self.summary.objects[label]), *cells])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def reset(self) -> None:
        super().reset()
        self.images = {}
        self.summary = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__}: average precision is that of a data set, not of a batch. Call `update` for each "
            "batch and `compute` at the end."
        )

    @abstractmethod
    def summarize(self, images: list[ImageResult], num_classes: int) -> Summary:
        """Evaluate `images`, sorted by their id."""

    def _summary_of_all_ranks(self) -> Summary:
        if not (dist.is_available() and dist.is_initialized()):
            return self._summarize([self.images])
        # Only the first rank needs what may be gigabytes.
        shares: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self.images, shares)
        answer: list[Summary | Exception | None] = [None]
        if shares is not None:
            try:
                answer = [self._summarize(shares)]
            except Exception as error:
                # The others would wait for an answer until they time out.
                answer = [error]
        dist.broadcast_object_list(answer)
        (summary,) = answer
        if isinstance(summary, Exception):
            raise summary
        assert summary is not None
        return summary

    def _summarize(self, shares: Iterable[dict[ImageId, ImageResult]]) -> Summary:
        images = {name: image for share in shares for name, image in share.items()}
        # Scores tie, and then the order of images decides: that of the ids, as in COCO's own evaluation.
        ordered = [images[name] for name in sorted(images, key=lambda name: (isinstance(name, str), name))]
        labels = [values for image in ordered for values in (image.labels, image.truth["labels"])]
        seen = max((int(values.max()) + 1 for values in labels if len(values)), default=0)
        if self.num_classes is not None and seen > self.num_classes:
            raise ValueError(
                f"{type(self).__name__}: label {seen - 1} was found, expected labels below {self.num_classes}, the "
                "number of classes in the data. Build the model with the data's num_classes."
            )
        return self.summarize(ordered, seen if self.num_classes is None else self.num_classes)

    def _names(self, num_classes: int) -> list[str]:
        return self.class_names or [str(label) for label in range(num_classes)]


def with_masks(images: Iterable[ImageResult]) -> bool:
    """Whether detections and ground truth have masks; an image without any may do without."""
    images = list(images)
    sides = (
        [(image.masks is not None, len(image.labels)) for image in images],
        [("masks" in image.truth, len(image.truth["labels"])) for image in images],
    )
    return all(
        any(has_masks for has_masks, _ in side) and all(has_masks or not count for has_masks, count in side)
        for side in sides
    )


def _encode(masks: Tensor | list[RunLengths] | None, size: tuple[int, int]) -> list[bytes] | None:
    """Return the counts of each mask's run lengths."""
    if masks is None:
        return None
    if isinstance(masks, Tensor):
        sizes = {tuple(masks.shape[1:])}
        encoded: Any = run_lengths.encode(masks.permute(1, 2, 0).bool().cpu().numpy()) if len(masks) else []
    else:
        sizes = {tuple(mask["size"]) for mask in masks}
        encoded = masks
    if len(encoded) and sizes != {size}:
        raise ValueError(
            f"DetectionMetric: masks are {sorted(sizes)} pixels, expected {size}, the original image's (height, "
            "width). Draw them with `tasks.detection.postprocess.to_original`."
        )
    return [mask["counts"] for mask in encoded]
