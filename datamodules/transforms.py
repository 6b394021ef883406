"""What happens to an image between decoding and the batch: settings, chosen in YAML, cheap to build and to pickle.

The work itself is in `datamodules.pipeline`, which is imported when the first image needs it: albumentations and timm
take about a second that `--help` and inference do not have to pay.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from datamodules.pipeline import Pipeline


class ImageDoesNotFitError(ValueError):
    """An image is larger than the datamodule's `image_size`, and its transform only pads."""


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random changes of a training image; the defaults are the InternImage authors' ImageNet recipe.

    Args:
        fit: How an image becomes a square of the datamodule's `image_size`. `crop`: random resized crop, bicubic.
            `resize`: the whole image, its aspect ratio changed, bicubic. `pad`: the image as it is, at a random place
            on black, for images that are not larger than `image_size`.
        scale: Range of the crop's area as a share of the image's (`fit="crop"` only).
        ratio: Range of the crop's width over its height (`fit="crop"` only).
        flip: Probability of a left-right flip.
        rand_augment: timm's policy string (`rand-m9-mstd0.5-inc1`: two operations of magnitude 9), or null for none.
        erasing: Probability that a random rectangle of the normalised image becomes Gaussian noise.
        mean: Subtracted from RGB in [0, 1].
        std: What the difference is divided by.

    Raises:
        ValueError: A probability outside [0, 1], an empty range, or a std that is not positive.
    """

    fit: Literal["crop", "resize", "pad"] = "crop"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name, probability in (("flip", self.flip), ("erasing", self.erasing)):
            if not 0 <= probability <= 1:
                raise ValueError(f"TrainTransform: {name}={probability}, expected a probability in [0, 1].")
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"TrainTransform: {name}={(low, high)}, expected 0 < low <= high.")
        if self.rand_augment is not None and not self.rand_augment.startswith("rand"):
            raise ValueError(
                f"TrainTransform: rand_augment={self.rand_augment!r}, expected timm's form `rand-m9-mstd0.5-inc1` or "
                "null for none."
            )
        _check_std("TrainTransform", self.std)

    def build(self, image_size: int) -> "Pipeline":
        """Return the function from a decoded image and a seed to a `(3, image_size, image_size)` tensor."""
        from datamodules.pipeline import train_pipeline

        return train_pipeline(self, image_size)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """How an image is evaluated; the defaults give the pixels of the InternImage authors' evaluation.

    Args:
        fit: `crop`: shorter side to `image_size / crop_pct`, then the centre. `resize`: the whole image, its aspect
            ratio changed. `pad`: the image as it is, in the middle of black, for images not larger than `image_size`.
        crop_pct: Share of the resized shorter side that the centre crop keeps (`fit="crop"` only).
        mean: Subtracted from RGB in [0, 1].
        std: What the difference is divided by.

    Raises:
        ValueError: `crop_pct` outside (0, 1], or a std that is not positive.
    """

    fit: Literal["crop", "resize", "pad"] = "crop"
    crop_pct: float = 1.0
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"EvalTransform: crop_pct={self.crop_pct}, expected a share in (0, 1].")
        _check_std("EvalTransform", self.std)

    def build(self, image_size: int) -> "Pipeline":
        """Return the function from a decoded image to a `(3, image_size, image_size)` tensor; it ignores the seed."""
        from datamodules.pipeline import eval_pipeline

        return eval_pipeline(self, image_size)


def _check_std(owner: str, std: tuple[float, float, float]) -> None:
    if min(std) <= 0:
        raise ValueError(f"{owner}: std={std}, expected three positive numbers.")


# Defaults of the datamodules.
TRAIN = TrainTransform()
EVAL = EvalTransform()
# Photographs of one object bear crops, flips and colour changes; digits and tiny pictures do not.
SMALL_TRAIN = TrainTransform(fit="pad", flip=0.0, rand_augment=None, erasing=0.0)
SMALL_EVAL = EvalTransform(fit="pad")
