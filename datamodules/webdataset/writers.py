"""From an image file in memory to rows of a batch.

Shapes: H W size of a row.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from torch import Tensor

from datamodules.transforms import ImageDoesNotFitError
from datamodules.webdataset.crops import NUM_NUMBERS, random_crop
from datamodules.webdataset.decode import MAX_PIXELS, EncodedImage
from datamodules.webdataset.records import BadSample, Draw
from datamodules.webdataset.resize import Interpolation, flip_in_place, resize

if TYPE_CHECKING:
    from datamodules.pipeline import Pipeline

# Top, left, height and width as shares of the whole image, and 1 where it is flipped: as in `ImageTextBatch.view`.
View = tuple[float, float, float, float, float]
WHOLE: View = (0.0, 0.0, 1.0, 1.0, 0.0)


class ImageWriter(Protocol):
    """What makes images for a batch. It is pickled for worker processes."""

    @property
    def image_size(self) -> int:
        """Side of the square rows, pixels."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows: uint8, or float32 that is normalised."""

    @property
    def num_views(self) -> int:
        """Rows that are made of an image."""

    def write(self, data: memoryview, draw: Draw, rows: list[Tensor]) -> list[View]:
        """Fill `num_views` rows, each `(3, H, W)`, and return which part of the image each shows.

        Raises:
            BadSample: The image is truncated, broken or too large.
        """


@dataclass(frozen=True, kw_only=True)
class CropWriter:
    """Random resized crops and flips; see `datamodules.webdataset.transforms.FastTrain`."""

    image_size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    interpolation: Interpolation
    num_views: int = 1
    max_pixels: int = MAX_PIXELS
    dtype: torch.dtype = torch.uint8

    def write(self, data: memoryview, draw: Draw, rows: list[Tensor]) -> list[View]:
        """Fill the rows: see `ImageWriter`."""
        image = EncodedImage(data, max_pixels=self.max_pixels)
        numbers = draw.uniform(self.num_views * NUM_NUMBERS).tolist()
        crops = [
            random_crop(
                numbers[view * NUM_NUMBERS :],
                image.height,
                image.width,
                scale=self.scale,
                ratio=self.ratio,
                flip=self.flip,
            )
            for view in range(self.num_views)
        ]
        # No crop that the full size would shrink may have to be enlarged.
        share = max(1, min(min(crop.height, crop.width) for crop in crops) / self.image_size)
        factor = image.factor((math.ceil(image.height / share), math.ceil(image.width / share)))
        pixels = image.decode(factor)
        # On whole pixels of what was decoded; the views say so.
        crops = [crop.reduced(factor, *pixels.shape[:2]) for crop in crops]
        for row, (top, left, height, width, flip) in zip(rows, crops, strict=True):
            resize(pixels[top : top + height, left : left + width], row, self.interpolation)
            if flip:
                flip_in_place(row)
        return [crop.shares(image.height / factor, image.width / factor) for crop in crops]


@dataclass(frozen=True, kw_only=True)
class CentreWriter:
    """Resize of the shorter side, then the centre; see `datamodules.webdataset.transforms.FastEval`."""

    image_size: int
    shorter_side: int
    interpolation: Interpolation
    num_views: int = 1
    max_pixels: int = MAX_PIXELS
    dtype: torch.dtype = torch.uint8

    def write(self, data: memoryview, draw: Draw, rows: list[Tensor]) -> list[View]:
        """Fill the row: see `ImageWriter`."""
        pixels = EncodedImage(data, max_pixels=self.max_pixels).decode()
        shorter = min(pixels.shape[:2])
        # torchvision's rounding, of the longer side and of the centre.
        height, width = (int(self.shorter_side * side / shorter) for side in pixels.shape[:2])
        # A line of pixels becomes a band: gigabytes.
        if height * width > self.max_pixels:
            raise BadSample("size", f"{height} x {width} pixels after the resize, at most {self.max_pixels} may be")
        whole = torch.empty(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
        resize(pixels, whole, self.interpolation)
        side = self.image_size
        top, left = round((height - side) / 2), round((width - side) / 2)
        rows[0].copy_(whole[:, top : top + side, left : left + side])
        return [(top / height, left / width, side / height, side / width, 0.0)]


class PipelineWriter:
    """The PIL pipelines of image folders, on shards.

    Args:
        pipeline: From an RGB image and a seed to a normalised float32 tensor.
        max_pixels: Larger images are bad.
    """

    dtype = torch.float32
    num_views = 1

    def __init__(self, pipeline: "Pipeline", *, max_pixels: int = MAX_PIXELS) -> None:
        self.pipeline, self.max_pixels = pipeline, max_pixels

    @property
    def image_size(self) -> int:
        """Side of the square rows, pixels."""
        return self.pipeline.image_size

    def write(self, data: memoryview, draw: Draw, rows: list[Tensor]) -> list[View]:
        """Fill the row: see `ImageWriter`. The part that it shows is not known, and is said to be the whole."""
        pixels = EncodedImage(data, max_pixels=self.max_pixels).decode()
        try:
            rows[0].copy_(self.pipeline(Image.fromarray(pixels), draw.sequence()))
        except ImageDoesNotFitError as error:
            raise BadSample("size", str(error)) from error
        return [WHOLE]
