"""What every classification datamodule shares: its arguments, its data sets, and where predict gets its images."""

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.loading import ImageData, Split
from datamodules.sources import FileSource, ImageSource
from datamodules.transforms import EVAL, TRAIN, EvalTransform, TrainTransform

if TYPE_CHECKING:
    from datamodules.dataset import PredictImages

__all__ = ["ClassificationData", "Split"]


class ClassificationData(ImageData):
    """Yield `ClassificationBatch`es for training and evaluation, `PredictBatch`es for prediction.

    A subclass says where the images are (`open_split`). `test` evaluates the `val` split. `predict` takes
    `predict_paths`, or the `val` split when there are none.

    Args:
        num_classes: Number of classes; checked when the data is opened.
        image_size: Side of the square images in a batch, pixels.
        batch_size: Images per device and step. Global batch = this x devices x nodes x accumulate_grad_batches.
        num_workers: Loader processes per device; 0 loads in the main process.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation and prediction.
        seed: Of order, random changes and replacements; with epoch and index it decides every pixel of a batch.
        max_corrupt_share: Share of a split's images that may be unreadable before that is an error.
        predict_paths: Image files, and folders that are searched with their subfolders.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 8,
        train_transform: TrainTransform = TRAIN,
        eval_transform: EvalTransform = EVAL,
        seed: int = 0,
        max_corrupt_share: float = 0.01,
        predict_paths: list[Path] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, max_corrupt_share, predict_paths)
        self._check_least(num_classes=(num_classes, 1), image_size=(image_size, 1))
        self.num_classes = num_classes
        self.image_size = image_size
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        # Known after `setup`, for data that names its classes.
        self.class_names: list[str] | None = None

    @abstractmethod
    def open_split(self, split: Split) -> ImageSource:
        """Open one split and check it against `num_classes`; called in `setup`."""

    def find_class_names(self) -> list[str] | None:
        """Return the names by label where the data has them, without opening a split."""
        return None

    def setup(self, stage: str) -> None:
        # Here, not above: it imports albumentations and timm, which `--help` can do without.
        from datamodules.dataset import ClassificationDataset

        for split in self._to_open(stage):
            transform = self.train_transform if split == "train" else self.eval_transform
            dataset = ClassificationDataset(
                self.open_split(split),
                transform.build(self.image_size),
                seed=self.seed,
                max_corrupt_share=self.max_corrupt_share,
            )
            self._sets[split], self._replaced[split] = dataset, dataset.images
        self.class_names = self.find_class_names()

    def predict_dataset(self) -> "PredictImages":
        from datamodules.dataset import PredictImages

        if self.predict_paths:
            source: ImageSource = FileSource(Path(), ((str(path), 0) for path in self.find_predict_images()))
        else:
            source = self._sets["val"].source
        return PredictImages(source, self.eval_transform.build(self.image_size))
