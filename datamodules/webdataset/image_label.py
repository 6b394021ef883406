"""Labelled images from shards: ImageNet-22K, ImageNet-1K, or your own."""

from pathlib import Path
from typing import Any

from datamodules.webdataset.data import ShardData, Use
from datamodules.webdataset.formats import Format, ImageLabelFormat
from datamodules.webdataset.predict import PredictFormat
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.transforms import FastEval, FastTrain, ImageTransform
from datamodules.webdataset.writers import ImageWriter

_TRAIN = FastTrain()
_EVAL = FastEval()


class ImageLabelShards(ShardData):
    """Yield `ClassificationBatch`es: what `tasks.Classification` trains on and is evaluated on.

    Args:
        num_classes: Number of classes; a sample with a label outside of it is bad.
        train: Sources of the training images.
        val: Sources of the images for evaluation, each with a loader of its own.
        image_size: Side of the square images, pixels.
        train_transform: Random changes of training images. `FastTrain` crops and flips; `PilTransform` of a
            `datamodules.TrainTransform` is the authors' recipe with RandAugment.
        eval_transform: What happens to images in evaluation and prediction.
        label_key: Extension of the part that holds the label: text, or with a dot a field of JSON, as `json.label`.
        label_map: Label by what stands there, or a JSON file of that. None: labels stand there as numbers.
        **options: Further arguments of `ShardData`.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        train: Shards | list[Shards] | None = None,
        val: Shards | list[Shards] | None = None,
        image_size: int = 224,
        train_transform: ImageTransform = _TRAIN,
        eval_transform: ImageTransform = _EVAL,
        label_key: str = "cls",
        label_map: dict[str, int] | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(train, val, **options)
        for name, value in (("num_classes", num_classes), ("image_size", image_size)):
            if value < 1:
                raise ValueError(f"ImageLabelShards: {name}={value}, expected at least 1.")
        self.num_classes, self.image_size = num_classes, image_size
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.label_key, self.label_map = label_key, label_map

    def form(self, use: Use) -> Format:
        if use == "predict":
            return PredictFormat(writer=self.predict_writer())
        transform = self.train_transform if use == "train" else self.eval_transform
        return ImageLabelFormat(
            writer=transform.build(self.image_size),
            num_classes=self.num_classes,
            label_key=self.label_key,
            label_map=self.label_map,
        )

    def predict_writer(self) -> ImageWriter:
        return self.eval_transform.build(self.image_size)
