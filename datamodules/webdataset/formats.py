"""How raw samples become a batch: each part of it is made once and filled row by row, so that nothing is collated.

Shapes: B batch, H W image size, L context length.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from datamodules.batch import ClassificationBatch, ImageTextBatch
from datamodules.sources import IMAGE_SUFFIXES
from datamodules.webdataset.captions import Captions
from datamodules.webdataset.labels import Labels
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.text import Tokenizer
from datamodules.webdataset.writers import ImageWriter

# Extensions as `RawSample` has them, without the dot; the first that a sample has is its image.
IMAGE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
IMAGE_KEYS = ("image", "other_image")


class Builder(Protocol):
    """One batch in the making."""

    def write(self, row: int, sample: RawSample, draw: Draw, source: int, name: str) -> None:
        """Fill a row; it may be filled again.

        Args:
            row: Number in the batch.
            sample: What to fill it with.
            draw: Of the sample's random changes.
            source: Number of the data source.
            name: Where the sample came from.

        Raises:
            BadSample: The sample cannot be used; the row is to be filled with another, or marked invalid.
        """

    def finish(self, valid: Tensor) -> Any:
        """Return the batch; rows where `valid`, `(B,)` bool, is False are blank."""


class Format(Protocol):
    """What a batch is. It is pickled for worker processes."""

    def builder(self, batch_size: int) -> Builder:
        """Return an empty batch to fill."""


@dataclass(frozen=True, kw_only=True)
class ImageTextFormat:
    """Images with their texts, and their labels where there are some: `ImageTextBatch`.

    Args:
        writer: Of images; with two views, the second becomes `other_image`.
        tokenizer: Of texts.
        captions: Which part of a sample is its text.
        num_classes: A sample with a label must have one in [0, num_classes); 0 reads no labels.
        labels: Where labels are.
    """

    writer: ImageWriter
    tokenizer: Tokenizer
    captions: Captions = field(default_factory=Captions)
    num_classes: int = 0
    labels: Labels = field(default_factory=Labels)

    def builder(self, batch_size: int) -> "ImageTextBuilder":
        """Return an empty batch to fill."""
        return ImageTextBuilder(self, batch_size)


class ImageTextBuilder:
    """One `ImageTextBatch` in the making.

    Args:
        form: What it holds.
        batch_size: B.
    """

    def __init__(self, form: ImageTextFormat, batch_size: int) -> None:
        self.form = form
        self.views = [image_rows(form.writer, batch_size) for _ in range(form.writer.num_views)]
        self.text = [""] * batch_size
        self.label, self.source = [-1] * batch_size, [0] * batch_size
        self.key = [""] * batch_size
        self.view = torch.zeros(batch_size, 2, 5)

    def write(self, row: int, sample: RawSample, draw: Draw, source: int, name: str) -> None:
        """Fill a row: see `Builder`."""
        form = self.form
        # The image last: all else is cheaper, and a bad sample is not worth decoding.
        label = form.labels.find(sample, form.num_classes) if form.num_classes else None
        text = form.captions.find(sample, draw)
        views = form.writer.write(image_part(sample), draw, [images[row] for images in self.views])
        self.text[row], self.label[row] = text, -1 if label is None else label
        self.source[row], self.key[row] = source, name
        if len(views) > 1:
            self.view[row] = torch.tensor(views)

    def finish(self, valid: Tensor) -> ImageTextBatch:
        """Return the batch: see `Builder`."""
        text, text_length = self.form.tokenizer.encode(self.text)
        label, source = torch.tensor(self.label), torch.tensor(self.source)
        # A mask that selects nothing still takes as long as a copy of the images.
        if not valid.all():
            empty = ~valid
            for blank in (*self.views, text, source, self.view):
                blank[empty] = 0
            # An invalid row is a text of one token, which towers can take.
            text_length[empty], label[empty] = 1, -1
        batch = ImageTextBatch(
            image=self.views[0],
            text=text,
            text_length=text_length,
            label=label,
            source=source,
            valid=valid,
            key=self.key,
        )
        if len(self.views) > 1:
            batch["other_image"], batch["view"] = self.views[1], self.view
        return batch


@dataclass(frozen=True, kw_only=True)
class ImageLabelFormat:
    """Labelled images: `ClassificationBatch`.

    Args:
        writer: Of images; one view.
        num_classes: Labels are in [0, num_classes).
        label_key: Extension of the part that holds the label: text, or with a dot a field of JSON, as `json.label`.
        label_map: Label by what stands there, or a JSON file of that: an object, or a list of names in the order of
            their labels. None: labels stand there as numbers.
    """

    writer: ImageWriter
    num_classes: int
    label_key: str = "cls"
    label_map: dict[str, int] | Path | None = None

    def builder(self, batch_size: int) -> "ImageLabelBuilder":
        """Return an empty batch to fill."""
        return ImageLabelBuilder(self, batch_size)


class ImageLabelBuilder:
    """One `ClassificationBatch` in the making.

    Args:
        form: What it holds.
        batch_size: B.
    """

    def __init__(self, form: ImageLabelFormat, batch_size: int) -> None:
        self.form, self.labels = form, Labels(key=form.label_key, label_map=form.label_map)
        self.image = image_rows(form.writer, batch_size)
        self.label = torch.zeros(batch_size, dtype=torch.int64)

    def write(self, row: int, sample: RawSample, draw: Draw, source: int, name: str) -> None:
        """Fill a row: see `Builder`."""
        label = self.labels.find(sample, self.form.num_classes)
        if label is None:
            raise BadSample("parts", f"no part `{self.form.label_key}`, but {', '.join(sample.parts)}")
        self.form.writer.write(image_part(sample), draw, [self.image[row]])
        self.label[row] = label

    def finish(self, valid: Tensor) -> ClassificationBatch:
        """Return the batch: see `Builder`."""
        if not valid.all():
            self.image[~valid], self.label[~valid] = 0, 0
        return ClassificationBatch(image=self.image, label=self.label, valid=valid)


def image_part(sample: RawSample) -> memoryview:
    """Return the image file of a sample.

    Raises:
        BadSample: It has none.
    """
    for extension in IMAGE_EXTENSIONS:
        if (data := sample.parts.get(extension)) is not None:
            return data
    raise BadSample("parts", f"no image ({', '.join(IMAGE_EXTENSIONS)}), but {', '.join(sample.parts)}")


def image_rows(writer: ImageWriter, batch_size: int) -> Tensor:
    """Return `(B, 3, H, W)` zeros for images, channels-last."""
    side = writer.image_size
    return shared_zeros(batch_size, side, side, 3, dtype=writer.dtype).permute(0, 3, 1, 2)


def shared_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return zeros, in a worker process in shared memory, so that the batch is not copied on its way."""
    if get_worker_info() is None:
        return torch.zeros(*shape, dtype=dtype)
    # Zeros as they come: the kernel blanks the pages when they are first touched.
    tensor = torch.empty(0, dtype=dtype)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    storage = tensor.untyped_storage()._new_shared(num_bytes, device="cpu")  # type: ignore[no-untyped-call]
    return tensor.new(storage).resize_(*shape)


def normalize(batch: Any, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Any:
    """Turn the uint8 images of a batch into float32, on the device where they are; float images are done already.

    Args:
        batch: Of any form; its `image` and `other_image` are `(B, 3, H, W)`.
        mean: Of RGB in [0, 1], subtracted.
        std: What the difference is divided by.
    """
    changed = {key: _normalize(batch[key], mean, std) for key in IMAGE_KEYS if key in batch}
    return {**batch, **changed}


def _normalize(image: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    if image.dtype != torch.uint8:
        return image
    # The arithmetic of torchvision's ToTensor and Normalize, in their order; channels-last stays.
    return image.float().div_(255).sub_(_channels(*mean, image.device)).div_(_channels(*std, image.device))


@lru_cache
def _channels(red: float, green: float, blue: float, device: torch.device) -> Tensor:
    """Return `(3, 1, 1)` numbers; kept, since a copy to the device waits for it."""
    return torch.tensor((red, green, blue), device=device).view(3, 1, 1)
