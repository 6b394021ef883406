"""What happens to an image of a shard between its bytes and the batch: settings, chosen in YAML, cheap to pickle."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.webdataset.resize import Interpolation
from datamodules.webdataset.writers import CentreWriter, CropWriter, ImageWriter, PipelineWriter


class ImageTransform(ABC):
    """Settings of what makes an image of a batch."""

    @abstractmethod
    def build(self, image_size: int) -> ImageWriter:
        """Return what writes images of `image_size` pixels a side into a batch."""


@dataclass(frozen=True, kw_only=True)
class FastTrain(ImageTransform):
    """Random resized crop and flip, uint8: more than twice as fast as with PIL.

    The crops have the distribution of timm's RandomResizedCropAndInterpolation. A JPEG of which the crop is at least
    twice the size of the batch's images is decoded at a half, a quarter or an eighth.

    Args:
        scale: Range of the crop's area as a share of the image's.
        ratio: Range of the crop's width over its height.
        flip: Probability of a left-right flip.
        interpolation: Of the resize, antialiased.

    Raises:
        ValueError: A probability outside [0, 1], or an empty range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if not 0 <= self.flip <= 1:
            raise ValueError(f"{owner}: flip={self.flip}, expected a probability in [0, 1].")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"{owner}: scale={self.scale}, expected 0 < low <= high <= 1.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"{owner}: ratio={self.ratio}, expected 0 < low <= high.")

    def build(self, image_size: int) -> CropWriter:
        """Return what writes images: see `ImageTransform`."""
        return self._writer(image_size, num_views=1)

    def _writer(self, image_size: int, num_views: int) -> CropWriter:
        return CropWriter(
            image_size=image_size,
            scale=self.scale,
            ratio=self.ratio,
            flip=self.flip,
            interpolation=self.interpolation,
            num_views=num_views,
        )


@dataclass(frozen=True, kw_only=True)
class TwoViews(FastTrain):
    """Two views of each image, drawn as `FastTrain` does, of one decode; the batch says where they lie."""

    def build(self, image_size: int) -> CropWriter:
        """Return what writes images: see `ImageTransform`."""
        return self._writer(image_size, num_views=2)


@dataclass(frozen=True, kw_only=True)
class FastEval(ImageTransform):
    """The shorter side to `image_size / crop_pct`, then the centre, uint8.

    Args:
        crop_pct: Share of the resized shorter side that the centre crop keeps.
        interpolation: Of the resize, antialiased.

    Raises:
        ValueError: `crop_pct` outside (0, 1].
    """

    crop_pct: float = 1.0
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"FastEval: crop_pct={self.crop_pct}, expected a share in (0, 1].")

    def build(self, image_size: int) -> CentreWriter:
        """Return what writes images: see `ImageTransform`."""
        return CentreWriter(
            image_size=image_size,
            shorter_side=round(image_size / self.crop_pct),
            interpolation=self.interpolation,
        )


@dataclass(frozen=True, kw_only=True)
class PilTransform(ImageTransform):
    """The transforms of image folders, in PIL and albumentations: RandAugment, erasing, padding; float32, normalised.

    Args:
        transform: Their settings.
    """

    transform: TrainTransform | EvalTransform

    def build(self, image_size: int) -> PipelineWriter:
        """Return what writes images: see `ImageTransform`."""
        return PipelineWriter(self.transform.build(image_size))


@dataclass(frozen=True, kw_only=True)
class Albumentations(ImageTransform):
    """A pipeline of albumentations, as `A.to_dict` or `A.save` write it.

    It leaves `(image_size, image_size, 3)` arrays, or tensors with the channels first: uint8, which the datamodule
    normalises, or float, which it takes as normalised.

    Args:
        transform: The pipeline, or its JSON or YAML file.
    """

    transform: dict[str, Any] | Path

    def build(self, image_size: int) -> ImageWriter:
        """Return what writes images: see `ImageTransform`.

        Raises:
            ValueError: The pipeline leaves another size or type.
        """
        from datamodules.webdataset.albumentation import AlbumentationsWriter

        return AlbumentationsWriter(self.transform, image_size)
