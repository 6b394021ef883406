"""What happens to an image and its mask between decoding and the batch: settings, chosen in YAML, cheap to pickle.

The work itself is in `datamodules.segmentation.pipeline`, which is imported when the first image needs it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from datamodules.segmentation.pipeline import EvalPipeline, TrainPipeline


@dataclass(frozen=True, kw_only=True)
class SegmentationTrainTransform:
    """Random changes of a training image and its mask; the defaults are the authors' for 512 pixels on ADE20K.

    In this order: resize, crop, flip, colours, and zeros (in the mask 255) at the right and at the bottom of what is
    smaller than the crop. The image keeps its aspect ratio.

    Args:
        short_side: Limit of the shorter side, pixels, times the ratio.
        long_side: Limit of the longer side, pixels, times the ratio.
        ratio: Range of the ratio.
        crop: Height and width of the result, pixels.
        cat_max_ratio: A crop of which one class covers such a share, pixels to ignore aside, is drawn again, ten times
            at most. 1 takes every crop.
        flip: Probability of a left-right flip.
        distortion: Whether brightness, contrast, saturation and hue change.
        mean: Subtracted from RGB in [0, 1].
        std: What the difference is divided by.

    Raises:
        ValueError: A size or a std that is not positive, an empty range, or a share or probability outside [0, 1].
    """

    short_side: int = 512
    long_side: int = 2048
    ratio: tuple[float, float] = (0.5, 2.0)
    crop: tuple[int, int] = (512, 512)
    cat_max_ratio: float = 0.75
    flip: float = 0.5
    distortion: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        owner = "SegmentationTrainTransform"
        _check_sizes(owner, short_side=self.short_side, long_side=self.long_side, crop=min(self.crop))
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"{owner}: ratio={self.ratio}, expected (low, high) with 0 < low <= high.")
        if not 0 < self.cat_max_ratio <= 1:
            raise ValueError(f"{owner}: cat_max_ratio={self.cat_max_ratio}, expected a share in (0, 1].")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"{owner}: flip={self.flip}, expected a probability in [0, 1].")
        _check_std(owner, self.std)

    def build(self) -> "TrainPipeline":
        """Return the function from an image, its mask and a seed to a training sample."""
        from datamodules.segmentation.pipeline import TrainPipeline

        return TrainPipeline(self)


@dataclass(frozen=True, kw_only=True)
class SegmentationEvalTransform:
    """How an image is evaluated; the defaults give the pixels of the authors' evaluation on ADE20K at 512 pixels.

    Args:
        short_side: Limit of the shorter side, pixels.
        long_side: Limit of the longer side, pixels. The image is scaled until one side reaches its limit.
        multiple: Then both sides are stretched to the next multiple of this, pixels; null leaves them.
        extra_scales: Test-time augmentation: more ratios of both limits.
        extra_flip: Test-time augmentation: each size also flipped, left and right.
        mean: Subtracted from RGB in [0, 1].
        std: What the difference is divided by.

    Raises:
        ValueError: A size, a scale or a std that is not positive.
    """

    short_side: int = 512
    long_side: int = 2048
    multiple: int | None = 32
    extra_scales: tuple[float, ...] = ()
    extra_flip: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        owner = "SegmentationEvalTransform"
        _check_sizes(owner, short_side=self.short_side, long_side=self.long_side, multiple=self.multiple or 1)
        smallest = min(self.extra_scales, default=1.0) * min(self.short_side, self.long_side)
        if smallest < 1:
            raise ValueError(
                f"{owner}: extra_scales={self.extra_scales}, expected positive numbers that leave a pixel of each side."
            )
        _check_std(owner, self.std)

    def build(self) -> "EvalPipeline":
        """Return the function from an image to its normalised views."""
        from datamodules.segmentation.pipeline import EvalPipeline

        return EvalPipeline(self)


def _check_sizes(owner: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{owner}: {name}={value}, expected positive numbers of pixels.")


def _check_std(owner: str, std: tuple[float, float, float]) -> None:
    if min(std) <= 0:
        raise ValueError(f"{owner}: std={std}, expected three positive numbers.")


# The authors' on ADE20K at 512 pixels.
TRAIN_512 = SegmentationTrainTransform()
EVAL_512 = SegmentationEvalTransform()
