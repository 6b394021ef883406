"""What every detection datamodule shares: its arguments, its data sets, and the order of training images."""

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.batch import Array
from datamodules.detection.records import Categories, DetectionSource
from datamodules.detection.transforms import EVAL_800, TRAIN_1X, DetectionEvalTransform, DetectionTrainTransform
from datamodules.loading import ImageData, Split, Use, check_same_labels
from datamodules.orders import Balance, Grouped, Order, Shuffled
from datamodules.views import PredictFiles, PredictImages, collate_views


class DetectionData(ImageData):
    """Yield `DetectionBatch`es for training, `DetectionEvalBatch`es and, for prediction, `ViewBatch`es.

    A subclass says where images and objects are (`open_split`). `test` evaluates the `val` split. `predict` takes
    `predict_paths`, or the `val` split when there are none.

    Args:
        num_classes: Number of classes; checked when the data is opened.
        batch_size: Images per device and step. Global batch = this x devices x nodes x accumulate_grad_batches.
        num_workers: Loader processes per device; 0 loads in the main process.
        masks: Whether training batches have masks; without, data without masks will do.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation and prediction.
        group_by_aspect: Whether the images of a training batch are all wide or all high, where possible; less padding.
        balance: How images of rare classes are shown more often: `datamodules.RepeatFactor` (LVIS),
            `datamodules.ClassAware` (Open Images), or null.
        keep_empty: Whether training images without objects, crowds aside, are used.
        min_image_size: Training images with a shorter side are left out, pixels.
        seed: Of order, random changes and replacements; with epoch and index it decides every pixel of a batch.
        max_corrupt_share: Share of the training images that may be unreadable before that is an error. In evaluation
            any is.
        predict_paths: Image files, and folders that are searched with their subfolders.

    Attributes:
        class_names: Name of each class, known after `setup`.
        category_ids: What the annotation file calls each class, known after `setup`.
        class_frequency: LVIS's r, c or f of each class, known after `setup` where the data has it.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        batch_size: int = 2,
        num_workers: int = 4,
        masks: bool = True,
        train_transform: DetectionTrainTransform = TRAIN_1X,
        eval_transform: DetectionEvalTransform = EVAL_800,
        group_by_aspect: bool = True,
        balance: Balance | None = None,
        keep_empty: bool = False,
        min_image_size: int = 32,
        seed: int = 0,
        max_corrupt_share: float = 0.01,
        predict_paths: list[Path] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, max_corrupt_share, predict_paths)
        self._check_least(num_classes=(num_classes, 1), min_image_size=(min_image_size, 1))
        self.num_classes = num_classes
        self.masks = masks
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.group_by_aspect = group_by_aspect
        self.balance = balance
        self.keep_empty = keep_empty
        self.min_image_size = min_image_size
        self.class_names: list[str] | None = None
        self.category_ids: list[int] | None = None
        self.class_frequency: list[str] | None = None

    @abstractmethod
    def open_split(self, split: Split) -> DetectionSource:
        """Open one split; called in `setup`."""

    def find_categories(self) -> Categories | None:
        """Return the classes where that takes no more than a look, for prediction of files without the data set."""
        return None

    def setup(self, stage: str) -> None:
        # Here, not above: it imports albumentations, which `--help` can do without.
        from datamodules.detection.dataset import ChosenImages, DetectionDataset, DetectionEvalDataset

        for split in self._to_open(stage):
            source = self.open_split(split)
            self._check(source, split)
            if split == "val":
                self._sets[split] = DetectionEvalDataset(ChosenImages(source), self.eval_transform.build())
                continue
            dataset = DetectionDataset(
                ChosenImages(source, self._trainable(source)),
                self.train_transform.build(masks=self.masks),
                seed=self.seed,
                max_corrupt_share=self.max_corrupt_share,
            )
            self._sets[split], self._replaced[split] = dataset, dataset.images
        opened: list[Categories] = [dataset.source.categories for dataset in self._sets.values()]
        check_same_labels(type(self).__name__, [classes.names for classes in opened])
        categories = opened[0] if opened else self.find_categories()
        if categories is not None:
            self.class_names, self.category_ids = list(categories.names), list(categories.ids)
            self.class_frequency = None if categories.frequency is None else list(categories.frequency)

    def train_order(self) -> Order:
        source = self._sets["train"].source
        order: Order = Shuffled(len(source))
        if self.balance is not None:
            sets = source.label_sets()
            order = self.balance.order(sets.labels, sets.starts)
        if self.group_by_aspect:
            sizes = _sizes(source)
            order = Grouped(order, sizes[:, 1] >= sizes[:, 0])
        return order

    def collate(self, use: Use) -> Callable[[list[Any]], Any]:
        from datamodules.detection.collate import collate_eval, collate_train

        functions: dict[Use, Callable[[list[Any]], Any]] = {
            "train": collate_train,
            "val": collate_eval,
            "predict": collate_views,
        }
        return functions[use]

    def predict_dataset(self) -> PredictImages:
        source = PredictFiles(self.find_predict_images()) if self.predict_paths else self._sets["val"].source
        return PredictImages(source, self.eval_transform.build())

    def _check(self, source: DetectionSource, split: Split) -> None:
        owner = type(self).__name__
        if len(source.categories) != self.num_classes:
            raise ValueError(
                f"{owner}: the {split} annotations have {len(source.categories)} classes, "
                f"num_classes={self.num_classes}."
            )
        if split == "train" and self.masks and not source.has_masks:
            raise ValueError(f"{owner}: the train annotations have no masks. Set masks=false, and train on boxes.")

    def _trainable(self, source: DetectionSource) -> Array:
        large = _sizes(source).min(axis=1, initial=np.iinfo(np.int64).max) >= self.min_image_size
        has_objects = np.diff(source.label_sets().starts) > 0
        chosen = np.flatnonzero(large if self.keep_empty else large & has_objects)
        if len(chosen) == 0:
            raise ValueError(
                f"{type(self).__name__}: none of {len(source)} training images can be used: {int((~large).sum())} have "
                f"a side below min_image_size={self.min_image_size}, {int((~has_objects).sum())} have no objects."
            )
        return chosen


def _sizes(source: DetectionSource) -> Array:
    """Height and width of all images, `(M, 2)` int64."""
    return np.array([source.size(index) for index in range(len(source))], dtype=np.int64).reshape(-1, 2)
