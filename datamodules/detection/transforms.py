"""What happens to an image and its objects between decoding and the batch: settings, chosen in YAML, cheap to pickle.

The work itself is in `datamodules.detection.pipeline`, which is imported when the first image needs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from datamodules.detection.pipeline import EvalPipeline, TrainPipeline


@dataclass(frozen=True, kw_only=True)
class RandomCrop:
    """A crop before the resize, as in the detection transformers: the image is made small, and a part of it cut out.

    Args:
        probability: Of the crop; otherwise the whole image is resized.
        short_sides: Before the crop, the shorter side becomes one of these, pixels.
        long_side: Before the crop, the longer side may not exceed this, pixels. The authors limit it to 1333 in Mask
            R-CNN and Cascade R-CNN, and to 4200, which is no limit, in DINO.
        sides: Range of the crop's height and of its width, each drawn by itself, pixels; the image's own where smaller.
        keep_empty: Whether a crop without an object may be trained on. If not, it is drawn again, and the whole image
            stands in where that finds none. The authors keep them in Mask R-CNN and Cascade R-CNN, and not in DINO.

    Raises:
        ValueError: A probability outside [0, 1], or a size that is not positive.
    """

    probability: float = 0.5
    short_sides: tuple[int, ...] = (400, 500, 600)
    long_side: int = 1333
    sides: tuple[int, int] = (384, 600)
    keep_empty: bool = True

    def __post_init__(self) -> None:
        _check_probability("RandomCrop", "probability", self.probability)
        _check_sizes("RandomCrop", short_sides=self.short_sides, long_side=self.long_side)
        _check_range("RandomCrop", "sides", self.sides)


@dataclass(frozen=True, kw_only=True)
class PixelChange:
    """A change of colours, noise or blur from albumentations; what moves pixels is refused.

    Args:
        name: Class in albumentations, such as `ColorJitter`.
        options: Its arguments; `p` is its probability.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DetectionTrainTransform:
    """Random changes of a training image and its objects; the defaults are the authors' for 12 epochs on COCO.

    The image keeps its aspect ratio: it is scaled until the shorter or the longer side reaches its limit.

    Args:
        short_sides: Limits of the shorter side, pixels; see `choose`.
        long_side: Limit of the longer side, pixels.
        choose: `one`: each image takes one of `short_sides`. `between`: any whole number from the first to the second.
        crop: A crop before the resize, or null for none.
        flip: Probability of a left-right flip.
        pixels: Changes of the decoded image before all others, in this order.
        min_box_size: Objects of which less is left are dropped: width and height of the box, pixels of the result.
        mean: Subtracted from RGB in [0, 1].
        std: What the difference is divided by.

    Raises:
        ValueError: A probability outside [0, 1], a size or a std that is not positive, or an empty range.
    """

    short_sides: tuple[int, ...] = (800,)
    long_side: int = 1333
    choose: Literal["one", "between"] = "one"
    crop: RandomCrop | None = None
    flip: float = 0.5
    pixels: tuple[PixelChange, ...] = ()
    min_box_size: float = 1.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        owner = "DetectionTrainTransform"
        _check_sizes(owner, short_sides=self.short_sides, long_side=self.long_side)
        if self.choose == "between":
            _check_range(owner, "short_sides", self.short_sides)
        _check_probability(owner, "flip", self.flip)
        if self.min_box_size <= 0:
            raise ValueError(f"{owner}: min_box_size={self.min_box_size}, expected a positive number of pixels.")
        _check_std(owner, self.std)

    def build(self, *, masks: bool) -> "TrainPipeline":
        """Return the function from an image, its objects and a generator to a training sample."""
        from datamodules.detection.pipeline import TrainPipeline

        return TrainPipeline(self, masks=masks)


@dataclass(frozen=True, kw_only=True)
class DetectionEvalTransform:
    """How an image is evaluated; the defaults give the pixels of the authors' evaluation.

    Args:
        short_side: Limit of the shorter side, pixels.
        long_side: Limit of the longer side, pixels. The image is scaled until one side reaches its limit.
        extra_sizes: Test-time augmentation: more pairs of limits, (shorter, longer).
        extra_flip: Test-time augmentation: each size also flipped, left and right.
        mean: Subtracted from RGB in [0, 1].
        std: What the difference is divided by.

    Raises:
        ValueError: A size or a std that is not positive.
    """

    short_side: int = 800
    long_side: int = 1333
    extra_sizes: tuple[tuple[int, int], ...] = ()
    extra_flip: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        owner = "DetectionEvalTransform"
        _check_sizes(owner, short_side=self.short_side, long_side=self.long_side)
        for pair in self.extra_sizes:
            _check_sizes(owner, extra_sizes=pair)
        _check_std(owner, self.std)

    def build(self) -> "EvalPipeline":
        """Return the function from an image to its normalised views."""
        from datamodules.detection.pipeline import EvalPipeline

        return EvalPipeline(self)


def resized(height: int, width: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Return height and width scaled until one side reaches its limit, rounded as the authors' framework does."""
    scale = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _check_probability(owner: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{owner}: {name}={value}, expected a probability in [0, 1].")


def _check_sizes(owner: str, **sizes: int | Sequence[int]) -> None:
    for name, value in sizes.items():
        values = [value] if isinstance(value, int) else value
        if not values or min(values) < 1:
            raise ValueError(f"{owner}: {name}={value}, expected positive numbers of pixels.")


def _check_range(owner: str, name: str, values: Sequence[int]) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise ValueError(f"{owner}: {name}={values}, expected (low, high) with 0 < low <= high.")


def _check_std(owner: str, std: tuple[float, float, float]) -> None:
    if min(std) <= 0:
        raise ValueError(f"{owner}: std={std}, expected three positive numbers.")


# Shorter sides of the detection transformers.
MULTI_SCALE = tuple(range(480, 801, 32))

# The authors' 12 epochs, and their evaluation.
TRAIN_1X = DetectionTrainTransform()
EVAL_800 = DetectionEvalTransform()
# Their 36 epochs of Mask R-CNN and Cascade R-CNN, and DINO of InternImage-T and -L.
TRAIN_3X = DetectionTrainTransform(short_sides=MULTI_SCALE, crop=RandomCrop())
TRAIN_DINO = DetectionTrainTransform(short_sides=MULTI_SCALE, crop=RandomCrop(long_side=4200, keep_empty=False))
# DINO of InternImage-H and -G on COCO; on LVIS, Open Images and VOC the shorter side ends at 1200.
TRAIN_LARGE = DetectionTrainTransform(short_sides=(600, 1800), long_side=2000, choose="between")
TRAIN_LARGE_1200 = DetectionTrainTransform(short_sides=(600, 1200), long_side=2000, choose="between")
EVAL_1000 = DetectionEvalTransform(short_side=1000, long_side=2000)
