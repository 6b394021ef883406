"""Images in evaluation and prediction: one look or several at each, padded to batches. Detection and segmentation.

Shapes: B batch, h w size of an image, H W size of the padded ones.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batch import ImageView, ViewBatch
from datamodules.sources import UNREADABLE, FileSource, to_rgb

# What the strides of the backbones and necks divide.
MULTIPLE = 32


class View(TypedDict):
    """One look at an image, not padded."""

    image: Tensor  # (3, h, w) float32, normalised
    flipped: bool


# From an RGB image to its views, the plain one first.
ViewPipeline = Callable[[Image.Image], list[View]]


class ViewSample(TypedDict):
    """One image of a `ViewBatch`, not padded."""

    views: list[View]  # the plain one first
    original_size: tuple[int, int]  # height and width of the file, pixels
    image_id: int | str
    path: str


class ViewSource(Protocol):
    """Images without annotations."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Return the RGB image. Any error that `UNREADABLE` lists marks it as corrupt."""

    def image_id(self, index: int) -> int | str:
        """Return what results are listed under."""

    def name(self, index: int) -> str:
        """Return where the image came from."""


class PredictFiles(FileSource):
    """Image files to predict, turned as their EXIF orientation says; they are listed under their number.

    Args:
        files: The images.
    """

    def __init__(self, files: list[Path]) -> None:
        super().__init__(Path(), ((str(file), 0) for file in files))

    def read(self, index: int) -> Image.Image:
        with Image.open(self.name(index)) as image:
            return to_rgb(ImageOps.exif_transpose(image))

    def image_id(self, index: int) -> int:
        """Return the number of the file."""
        return index


class PredictImages(Dataset[ViewSample]):
    """Images to predict; an unreadable one is an error.

    Args:
        source: The images.
        pipeline: From image to views.
    """

    def __init__(self, source: ViewSource, pipeline: ViewPipeline) -> None:
        self.source, self.pipeline = source, pipeline

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> ViewSample:
        return look(self.source, self.pipeline, index, read_or_raise(self.source, index, "predict"))


def read_or_raise(source: ViewSource, index: int, use: str) -> Image.Image:
    """Return an image.

    Raises:
        ValueError: It is unreadable; the message says what it was wanted for.
    """
    try:
        return source.read(index)
    except UNREADABLE as error:
        raise ValueError(
            f"{use}: cannot use {source.name(index)}: {error}. Repair it, or remove it from the list."
        ) from error


def look(source: ViewSource, pipeline: ViewPipeline, index: int, image: Image.Image) -> ViewSample:
    """Return the sample of an image that was read."""
    return ViewSample(
        views=pipeline(image),
        original_size=(image.height, image.width),
        image_id=source.image_id(index),
        path=source.name(index),
    )


def collate_views(samples: Sequence[ViewSample]) -> ViewBatch:
    """Pad the images, those of each further view by themselves; the k-th views of all samples make one."""
    image, valid = pad([sample["views"][0]["image"] for sample in samples])
    batch = ViewBatch(
        image=image,
        valid=valid,
        original_size=[sample["original_size"] for sample in samples],
        image_id=[sample["image_id"] for sample in samples],
        path=[sample["path"] for sample in samples],
    )
    views = []
    for same in zip(*(sample["views"][1:] for sample in samples), strict=True):
        image, valid = pad([view["image"] for view in same])
        views.append(ImageView(image=image, valid=valid, flipped=same[0]["flipped"]))
    if views:
        batch["views"] = views
    return batch


def pad(images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Put `(3, h, w)` images into one `(B, 3, H, W)` tensor of zeros, and return it with their sizes."""
    valid = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (-(-max(sides) // MULTIPLE) * MULTIPLE for sides in zip(*valid, strict=True))
    batch = torch.zeros(len(images), 3, height, width)
    for target, image, (h, w) in zip(batch, images, valid, strict=True):
        target[:, :h, :w] = image
    return batch, valid
