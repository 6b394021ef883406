"""Coloured shapes with exact boxes and masks, made from their index: for tests and smoke runs, no files needed."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from datamodules.batch import Array
from datamodules.detection import rle
from datamodules.detection.categories import number_categories
from datamodules.detection.data import DetectionData
from datamodules.detection.records import LabelSets, Objects
from datamodules.detection.transforms import DetectionEvalTransform, DetectionTrainTransform
from datamodules.loading import Split
from datamodules.synthetic import colour

# Every so many images one is without objects.
EMPTY_PERIOD = 8
MAX_OBJECTS = 5
# An object whose visible part is smaller is left out, pixels.
MIN_AREA = 16
# The default images keep their size.
SMALL_TRAIN = DetectionTrainTransform(short_sides=(96,), long_side=128)
SMALL_EVAL = DetectionEvalTransform(short_side=96, long_side=128)


class SyntheticDetection(DetectionData):
    """Ellipses, rectangles and triangles on a noisy ground; colour and form are the class.

    Args:
        num_classes: Number of classes.
        image_size: Longer side of the images, pixels; the other is three quarters of it, wide and high ones in turn.
        num_samples: Training images; one of eight is without objects.
        num_val_samples: Validation images; they share none with the training images.
        num_workers: Loader processes per device; 0 loads in the main process.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation.
        **options: Further arguments of `DetectionData`.
    """

    def __init__(
        self,
        num_classes: int = 3,
        image_size: int = 128,
        num_samples: int = 64,
        num_val_samples: int = 32,
        num_workers: int = 0,
        train_transform: DetectionTrainTransform = SMALL_TRAIN,
        eval_transform: DetectionEvalTransform = SMALL_EVAL,
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
            image_size=(image_size, 32), num_samples=(num_samples, 1), num_val_samples=(num_val_samples, 1)
        )
        self.image_size = image_size
        self.num_samples = num_samples
        self.num_val_samples = num_val_samples

    def open_split(self, split: Split) -> "Shapes":
        if split == "train":
            return Shapes(self.num_samples, self.num_classes, self.image_size, masks=self.masks)
        return Shapes(self.num_val_samples, self.num_classes, self.image_size, first=self.num_samples, masks=self.masks)


class Shapes:
    """A source of drawn images.

    Args:
        length: Number of images.
        num_classes: Number of classes.
        size: Longer side, pixels.
        first: Index of the first image in the endless sequence.
        seed: Of the sequence.
        masks: Whether objects have masks.
    """

    def __init__(
        self, length: int, num_classes: int, size: int, *, first: int = 0, seed: int = 0, masks: bool = True
    ) -> None:
        self._length, self._num_classes, self._side = length, num_classes, size
        self._first, self._seed, self.has_masks = first, seed, masks
        self.categories = number_categories("Shapes", [f"class_{label}" for label in range(num_classes)])
        self.skipped: Mapping[str, int] = {}

    def __len__(self) -> int:
        return self._length

    def read(self, index: int) -> Image.Image:
        """Return the RGB image."""
        owners, labels, random = self._draw(index)
        ground = random.integers(100, 140, (*owners.shape, 3))
        colours = np.array([(0, 0, 0), *(colour(int(label), self._num_classes) for label in labels)])
        noise = random.integers(-12, 13, ground.shape)
        pixels = np.where(owners[..., None] > 0, colours[owners] + noise, ground)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def objects(self, index: int) -> Objects:
        """Return what is on the image: the visible part of each shape."""
        owners, labels, _ = self._draw(index)
        bitmaps = [owners == number for number in range(1, len(labels) + 1)]
        visible = [number for number, bitmap in enumerate(bitmaps) if bitmap.sum() >= MIN_AREA]
        return Objects(
            boxes=np.array([rle.bounding_box(bitmaps[number]) for number in visible], dtype=np.float64).reshape(-1, 4),
            labels=labels[visible],
            areas=np.array([bitmaps[number].sum() for number in visible], dtype=np.float64),
            crowd=np.zeros(len(visible), dtype=bool),
            masks=[rle.encode(bitmaps[number]) for number in visible] if self.has_masks else None,
        )

    def image_id(self, index: int) -> int:
        """Return the number in the endless sequence."""
        return self._first + index

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width."""
        short = self._side * 3 // 4
        return (short, self._side) if (self._first + index) % 2 == 0 else (self._side, short)

    def name(self, index: int) -> str:
        """Return a name with the number."""
        return f"shapes[{self._first + index}]"

    def label_sets(self) -> LabelSets:
        """Return the labels of each image's objects."""
        return self._label_sets

    @cached_property
    def _label_sets(self) -> LabelSets:
        labels = [self.objects(index).labels for index in range(len(self))]
        images = np.repeat(np.arange(len(self)), [len(part) for part in labels])
        return LabelSets.from_pairs(images, np.concatenate([np.zeros(0, np.int64), *labels]), len(self))

    def _draw(self, index: int) -> tuple[Array, Array, np.random.Generator]:
        """Return the number of the uppermost shape at each pixel (0: none), the label of each, and what is left."""
        random = np.random.default_rng((self._seed, self._first + index))
        height, width = self.size(index)
        empty = (self._first + index) % EMPTY_PERIOD == EMPTY_PERIOD - 1
        labels = random.integers(self._num_classes, size=0 if empty else int(random.integers(1, MAX_OBJECTS + 1)))
        canvas = Image.new("L", (width, height))
        brush = ImageDraw.Draw(canvas)
        for number, label in enumerate(labels, start=1):
            sides = random.integers(self._side // 8, self._side // 3, 2)
            left, top = random.integers([width - sides[0], height - sides[1]])
            right, bottom = left + sides[0] - 1, top + sides[1] - 1
            if label % 3 == 0:
                brush.ellipse((left, top, right, bottom), fill=number)
            elif label % 3 == 1:
                brush.rectangle((left, top, right, bottom), fill=number)
            else:
                brush.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=number)
        return np.asarray(canvas), labels, random
