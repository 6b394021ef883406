"""Coloured shapes with exact masks, made from their index: for tests and smoke runs, no files needed."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from datamodules.batch import Array
from datamodules.loading import Split
from datamodules.segmentation.data import SegmentationData
from datamodules.segmentation.records import Classes, generated_palette
from datamodules.segmentation.transforms import SegmentationEvalTransform, SegmentationTrainTransform
from datamodules.synthetic import colour

MAX_OBJECTS = 5

TRAIN = SegmentationTrainTransform(short_side=48, long_side=64, crop=(64, 64), distortion=False)
EVAL = SegmentationEvalTransform(short_side=48, long_side=64)


class SyntheticSegmentation(SegmentationData):
    """Ellipses, rectangles and triangles on a noisy ground, class 0; colour and form are the class.

    Args:
        num_classes: Number of classes, at least 2.
        image_size: Longer side of the images, pixels; the other is three quarters of it, wide and high ones in turn.
        num_samples: Training images.
        num_val_samples: Validation images; they share none with the training images.
        num_workers: Loader processes per device; 0 loads in the main process.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation and prediction.
        **options: Further arguments of `SegmentationData`.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        num_classes: int = 4,
        image_size: int = 64,
        num_samples: int = 64,
        num_val_samples: int = 16,
        num_workers: int = 0,
        train_transform: SegmentationTrainTransform = TRAIN,
        eval_transform: SegmentationEvalTransform = EVAL,
        **options: Any,
    ) -> None:
        super().__init__(
            num_classes,
            num_workers=num_workers,
            train_transform=train_transform,
            eval_transform=eval_transform,
            **options,
        )
        self._check_least(
            num_classes=(num_classes, 2),
            image_size=(image_size, 32),
            num_samples=(num_samples, 1),
            num_val_samples=(num_val_samples, 1),
        )
        self.image_size = image_size
        self.num_samples = num_samples
        self.num_val_samples = num_val_samples

    def open_split(self, split: Split) -> "Scenes":
        if split == "train":
            return Scenes(self.num_samples, self.num_classes, self.image_size)
        return Scenes(self.num_val_samples, self.num_classes, self.image_size, first=self.num_samples)

    def find_classes(self) -> Classes:
        return scene_classes(self.num_classes)


class Scenes:
    """A source of drawn images.

    Args:
        length: Number of images.
        num_classes: Number of classes, the ground included.
        size: Longer side, pixels.
        first: Index of the first image in the endless sequence.
        seed: Of the sequence.
    """

    def __init__(self, length: int, num_classes: int, size: int, *, first: int = 0, seed: int = 0) -> None:
        self._length, self._num_classes, self._side = length, num_classes, size
        self._first, self._seed = first, seed
        self.classes = scene_classes(num_classes)

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Image.Image:
        """Return the RGB image."""
        labels, random = self._draw(index)
        colours = [(120, 120, 120), *(colour(label, self._num_classes - 1) for label in range(self._num_classes - 1))]
        noise = random.integers(-12, 13, (*labels.shape, 3))
        return Image.fromarray((np.array(colours)[labels] + noise).clip(0, 255).astype(np.uint8))

    def mask(self, index: int) -> Array:
        """Return the label of each pixel."""
        return self._draw(index)[0]

    def image_id(self, index: int) -> str:
        """Return a name with the number in the endless sequence."""
        return f"scene_{self._first + index}"

    def name(self, index: int) -> str:
        """Return a name with the number."""
        return f"scenes[{self._first + index}]"

    def _draw(self, index: int) -> tuple[Array, np.random.Generator]:
        """Return the labels, and the random numbers that are left."""
        number = self._first + index
        random = np.random.default_rng((self._seed, number))
        short = self._side * 3 // 4
        height, width = (short, self._side) if number % 2 == 0 else (self._side, short)
        canvas = Image.new("L", (width, height))
        brush = ImageDraw.Draw(canvas)
        for label in random.integers(1, self._num_classes, size=int(random.integers(1, MAX_OBJECTS + 1))):
            sides = random.integers(self._side // 6, self._side // 2, 2)
            left, top = random.integers([width - sides[0], height - sides[1]])
            right, bottom = left + sides[0] - 1, top + sides[1] - 1
            if label % 3 == 1:
                brush.ellipse((left, top, right, bottom), fill=int(label))
            elif label % 3 == 2:
                brush.rectangle((left, top, right, bottom), fill=int(label))
            else:
                brush.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=int(label))
        return np.array(canvas), random


def scene_classes(num_classes: int) -> Classes:
    """Return the ground, black, and the classes of the shapes."""
    names = ("ground", *(f"class_{label}" for label in range(1, num_classes)))
    return Classes(names, ((0, 0, 0), *generated_palette(num_classes - 1)))
