"""Boxes and masks from shards: COCO, Objects365, Open Images, or your own, where they are too many for one disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datamodules.detection import rle
from datamodules.detection.categories import number_categories
from datamodules.detection.flat import trainable
from datamodules.detection.records import Categories, Objects
from datamodules.detection.shard_index import check_lengths, from_json
from datamodules.detection.shards import CATEGORIES, read_categories
from datamodules.detection.transforms import EVAL_800, TRAIN_1X, DetectionEvalTransform, DetectionTrainTransform
from datamodules.loading import check_same_labels
from datamodules.views import ViewPipeline, collate_views
from datamodules.webdataset.data import Use
from datamodules.webdataset.formats import Format, image_part
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.samples import SampleFormat, read_upright
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.views import ViewShards

if TYPE_CHECKING:
    from datamodules.detection.dataset import EvalSample
    from datamodules.detection.pipeline import TrainPipeline, TrainSample


class ImageObjectShards(ViewShards):
    """Yield `DetectionBatch`es for training, `DetectionEvalBatch`es and, for prediction, `ViewBatch`es.

    A sample is an image and what is on it as `.json`, as `internimage shards make coco-detection` and
    `datamodules.detection.shards.write_shards` write them. `datamodules.DetectionShards` reads the same shards from a
    folder, whose annotations it knows all at once: it can also balance classes and put images of one shape into a
    batch. This one reads them from anywhere, and mixes sources.

    Image ids are different over all shards of `val`: results are listed by them.

    Args:
        num_classes: Number of classes; checked when the data is opened.
        train: Sources of the training images.
        val: Source of the images for evaluation.
        batch_size: Images per device and step. Global batch = this x devices x nodes x accumulate_grad_batches.
        masks: Whether training batches have masks, and evaluation those that the data has.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation and prediction.
        keep_empty: Whether training images without objects, crowds aside, are used. Others take the place of those that
            are not, and they count as bad: raise `max_bad_share` by their share, or leave them out of the shards.
        categories: Folder that holds `categories.json`, or the names of the classes, whose ids are then 1, 2, ...
            None: `categories.json` lies beside the shards of each source, or in their index.
        **options: Further arguments of `ShardData`. The transforms have their own `mean` and `std`.

    Attributes:
        class_names: Name of each class, known after `setup`.
        category_ids: What results call each class, known after `setup`.
        class_frequency: LVIS's r, c or f of each class, known after `setup` where the data has it.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        train: Shards | list[Shards] | None = None,
        val: Shards | None = None,
        batch_size: int = 2,
        masks: bool = True,
        train_transform: DetectionTrainTransform = TRAIN_1X,
        eval_transform: DetectionEvalTransform = EVAL_800,
        keep_empty: bool = True,
        categories: Path | list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, train, val, batch_size, batch_size, eval_transform, **options)
        self.masks, self.keep_empty, self.categories = masks, keep_empty, categories
        self.train_transform = train_transform
        self.category_ids: list[int] | None = None
        self.class_frequency: list[str] | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        found = self._categories()
        check_same_labels(type(self).__name__, [categories.names for categories in found])
        self.class_names, self.category_ids = list(found[0].names), list(found[0].ids)
        self.class_frequency = None if found[0].frequency is None else list(found[0].frequency)

    def form(self, use: Use) -> Format:
        # Here, not above: it imports albumentations, which `--help` can do without.
        from datamodules.detection.collate import collate_eval, collate_train

        if use == "train":
            pipeline = self.train_transform.build(masks=self.masks)
            return SampleFormat(TrainObjects(pipeline, self.num_classes, self.masks, self.keep_empty), collate_train)
        make = EvalObjects(self.eval_transform.build(), self.num_classes, self.masks)
        return SampleFormat(make, collate_eval if use == "val" else collate_views)

    def _categories(self) -> list[Categories]:
        if isinstance(self.categories, list):
            found = {"categories": number_categories(f"{type(self).__name__}: categories", self.categories)}
        else:
            folders = self._beside(CATEGORIES) if self.categories is None else [Path(self.categories)]
            found = {str(folder / CATEGORIES): read_categories(folder) for folder in folders}
        for where, categories in found.items():
            self._check_num_classes(len(categories), where)
        return list(found.values())


@dataclass(frozen=True)
class TrainObjects:
    """From a raw sample to a training sample.

    Args:
        pipeline: Of random changes.
        num_classes: Labels are less.
        masks: Whether samples have masks.
        keep_empty: Whether an image without objects is a sample.
    """

    pipeline: "TrainPipeline"
    num_classes: int
    masks: bool
    keep_empty: bool

    def __call__(self, sample: RawSample, draw: Draw, name: str) -> "TrainSample":
        """Return the sample, without the objects that cannot be learned from (`flat.trainable`).

        Raises:
            BadSample: It cannot be used.
            ValueError: It has no masks, and they are wanted.
        """
        _, size, objects = read_objects(sample, self.num_classes, masks=self.masks)
        if self.masks and objects.masks is None:
            raise ValueError(
                f"ImageObjectShards: {name} was written without masks. Set masks=false, and train on boxes."
            )
        objects = objects.select(trainable(objects.boxes, objects.areas, np.array([size])))
        if not self.keep_empty and objects.crowd.all():
            raise BadSample("label", "no object to learn from (keep_empty)")
        return self.pipeline(read_upright(image_part(sample), size), objects, draw.sequence())


@dataclass(frozen=True)
class EvalObjects:
    """From a raw sample to one of evaluation.

    Args:
        pipeline: From image to views.
        num_classes: Labels are less.
        masks: Whether to take the masks that a sample has.
    """

    pipeline: ViewPipeline
    num_classes: int
    masks: bool

    def __call__(self, sample: RawSample, draw: Draw, name: str) -> "EvalSample":
        """Return the sample.

        Raises:
            BadSample: It cannot be used.
        """
        from datamodules.detection.dataset import EvalSample

        image_id, size, objects = read_objects(sample, self.num_classes, masks=self.masks)
        views = self.pipeline(read_upright(image_part(sample), size))
        return EvalSample(views=views, original_size=size, image_id=image_id, path=name, truth=objects.truth())


def read_objects(sample: RawSample, num_classes: int, *, masks: bool) -> tuple[int | str, tuple[int, int], Objects]:
    """Return image id, height and width, and objects of a sample, with masks if it has some and they are wanted.

    Raises:
        BadSample: It has no JSON, or one that says something else.
    """
    if (data := sample.parts.get("json")) is None:
        raise BadSample("parts", f"no part `json`, but {', '.join(sample.parts)}")
    try:
        content = json.loads(bytes(data))
        check_lengths(content)
        height, width = content["size"]
        image_id: int | str = content["image_id"]
        objects = from_json(content, masks=masks and content["masks"] is not None)
        for mask in objects.masks or ():
            # Refuses what does not fit the image; decoding, which comes later, costs much more.
            rle.area(mask)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadSample("label", f"json is no annotation ({type(error).__name__}: {error})") from error
    boxes, labels = objects.boxes, objects.labels
    if len(boxes) != len(labels) or not np.isfinite(boxes).all():
        raise BadSample("label", "boxes that are not four finite numbers each")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise BadSample("label", f"labels {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}")
    return image_id, (int(height), int(width)), objects
