"""What every segmentation datamodule shares: its arguments and its data sets."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.loading import ImageData, Split, Use, check_same_labels
from datamodules.orders import Order, Repeated
from datamodules.segmentation.records import Classes, Colour, SegmentationSource
from datamodules.segmentation.transforms import (
    EVAL_512,
    TRAIN_512,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
from datamodules.views import PredictFiles, PredictImages, collate_views


class SegmentationData(ImageData):
    """Yield `SegmentationBatch`es for training, `SegmentationEvalBatch`es and, for prediction, `ViewBatch`es.

    A subclass says where images and masks are (`open_split`). `test` evaluates the `val` split. `predict` takes
    `predict_paths`, or the `val` split when there are none.

    Args:
        num_classes: Number of classes; checked when the data is opened.
        batch_size: Images per device and step. Global batch = this x devices x nodes x accumulate_grad_batches.
        eval_batch_size: Images per device in evaluation and prediction. They differ in size, and with more than 1 the
            smaller ones are padded, which changes what a head with global pooling finds on them.
        num_workers: Loader processes per device; 0 loads in the main process.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation and prediction.
        crops_per_image: How often an epoch shows each training image, each time changed differently.
        seed: Of order, random changes and replacements; with epoch and index it decides every pixel of a batch.
        max_corrupt_share: Share of the training images that may be unreadable before that is an error. In evaluation
            any is.
        predict_paths: Image files, and folders that are searched with their subfolders.

    Attributes:
        class_names: Name of each class, known after `setup`.
        palette: RGB of each class, known after `setup`.
        num_used_classes: How many classes, from the first, the data has, known after `setup`; None: all.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        batch_size: int = 2,
        eval_batch_size: int = 1,
        num_workers: int = 4,
        train_transform: SegmentationTrainTransform = TRAIN_512,
        eval_transform: SegmentationEvalTransform = EVAL_512,
        crops_per_image: int = 1,
        seed: int = 0,
        max_corrupt_share: float = 0.01,
        predict_paths: list[Path] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, max_corrupt_share, predict_paths)
        self._check_least(
            num_classes=(num_classes, 1), eval_batch_size=(eval_batch_size, 1), crops_per_image=(crops_per_image, 1)
        )
        if num_classes > 255:
            raise ValueError(f"{type(self).__name__}: num_classes={num_classes}, expected at most 255.")
        self.num_classes = num_classes
        self.eval_batch_size = eval_batch_size
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.crops_per_image = crops_per_image
        self.class_names: list[str] | None = None
        self.palette: list[Colour] | None = None
        self.num_used_classes: int | None = None

    @abstractmethod
    def open_split(self, split: Split) -> SegmentationSource:
        """Open one split; called in `setup`."""

    def find_classes(self) -> Classes | None:
        """Return the classes where that takes no more than a look, for prediction of files without the data set."""
        return None

    def setup(self, stage: str) -> None:
        # Here, not above: it imports albumentations, which `--help` can do without.
        from datamodules.segmentation.dataset import SegmentationDataset, SegmentationEvalDataset

        for split in self._to_open(stage):
            source = self.open_split(split)
            if len(source.classes) != self.num_classes:
                raise ValueError(
                    f"{type(self).__name__}: the {split} data has {len(source.classes)} classes, "
                    f"num_classes={self.num_classes}."
                )
            if split == "val":
                self._sets[split] = SegmentationEvalDataset(source, self.eval_transform.build())
                continue
            dataset = SegmentationDataset(
                source, self.train_transform.build(), seed=self.seed, max_corrupt_share=self.max_corrupt_share
            )
            self._sets[split], self._replaced[split] = dataset, dataset.images
        opened: list[Classes] = [dataset.source.classes for dataset in self._sets.values()]
        check_same_labels(type(self).__name__, [classes.names for classes in opened])
        classes = opened[0] if opened else self.find_classes()
        if classes is not None:
            self.class_names, self.palette = list(classes.names), list(classes.palette)
            self.num_used_classes = classes.num_used

    def train_order(self) -> Order | None:
        if self.crops_per_image == 1:
            return None
        repeats = [self.crops_per_image] * len(self._sets["train"])
        return Repeated(np.array(repeats), f"{self.crops_per_image} crops of each image")

    def collate(self, use: Use) -> Callable[[list[Any]], Any]:
        from datamodules.segmentation.collate import collate_eval, collate_train

        functions: dict[Use, Callable[[list[Any]], Any]] = {
            "train": collate_train,
            "val": collate_eval,
            "predict": collate_views,
        }
        return functions[use]

    def predict_dataset(self) -> PredictImages:
        source = PredictFiles(self.find_predict_images()) if self.predict_paths else self._sets["val"].source
        return PredictImages(source, self.eval_transform.build())

    def _loading(self, use: Use) -> dict[str, Any]:
        options = super()._loading(use)
        return options if use == "train" else {**options, "batch_size": self.eval_batch_size}
