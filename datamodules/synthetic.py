"""Images made from their index, with labels readable from the pixels: for tests and smoke runs, no files needed."""

import math
from typing import Any

import numpy as np
from PIL import Image

from datamodules.classification import ClassificationData, Split
from datamodules.sources import ImageSource
from datamodules.transforms import SMALL_EVAL, SMALL_TRAIN, EvalTransform, TrainTransform


class SyntheticClassification(ClassificationData):
    """Noisy images whose mean colour is the label.

    Args:
        num_classes: Number of labels.
        image_size: Side of the square images, pixels.
        batch_size: Images per device and step.
        num_samples: Training images per epoch over all ranks.
        num_val_samples: Validation images; they share none with the training images.
        num_workers: Loader processes per device.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation.
        **options: Further arguments of `ClassificationData`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        image_size: int = 64,
        batch_size: int = 8,
        num_samples: int = 64,
        num_val_samples: int = 32,
        num_workers: int = 0,
        train_transform: TrainTransform = SMALL_TRAIN,
        eval_transform: EvalTransform = SMALL_EVAL,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            image_size,
            batch_size,
            num_workers,
            train_transform,
            eval_transform,
            **options,
        )
        self.num_samples = num_samples
        self.num_val_samples = num_val_samples

    def open_split(self, split: Split) -> ImageSource:
        if split == "train":
            return Colours(self.num_samples, self.num_classes, self.image_size)
        return Colours(self.num_val_samples, self.num_classes, self.image_size, first=self.num_samples)


class Colours:
    """A source of images with mean colour `colour(label)` and pixel noise.

    Args:
        length: Number of images.
        num_classes: Labels repeat with this period.
        size: Side in pixels.
        first: Index of the first image in the endless sequence.
    """

    def __init__(self, length: int, num_classes: int, size: int, first: int = 0) -> None:
        self._length, self._num_classes, self._size, self._first = length, num_classes, size, first

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Image.Image:
        noise = np.random.default_rng(self._first + index).integers(-12, 13, (self._size, self._size, 3))
        return Image.fromarray((colour(self.label(index), self._num_classes) + noise).astype(np.uint8))

    def label(self, index: int) -> int:
        return (self._first + index) % self._num_classes

    def name(self, index: int) -> str:
        return f"synthetic[{self._first + index}]"


def colour(label: int, num_classes: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the `(3,)` RGB mean of a class, in [16, 240): a point of the coarsest cubic grid with enough of them."""
    levels = max(math.ceil(round(num_classes ** (1 / 3), 6)), 2)
    digits = [label // levels**power % levels for power in range(3)]
    return np.array([16 + digit * 223 // (levels - 1) for digit in digits])
