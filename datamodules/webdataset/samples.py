"""Batches of images that differ in size: each row is a sample of its own, and those that are left are collated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from PIL import Image
from torch import Tensor

from datamodules.detection.images import upright
from datamodules.sources import UNREADABLE
from datamodules.webdataset.decode import MAX_PIXELS, open_image
from datamodules.webdataset.records import BadSample, Draw, RawSample

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class SampleFormat(Generic[Sample]):
    """A batch of samples that are made one by one, without those that are not valid.

    Args:
        make: From a raw sample, its random numbers and where it came from to a sample. Raises `BadSample`.
        collate: From one or more samples to a batch.
    """

    make: Callable[[RawSample, Draw, str], Sample]
    collate: Callable[[list[Sample]], Any]

    def builder(self, batch_size: int) -> "SampleBuilder[Sample]":
        """Return an empty batch to fill."""
        return SampleBuilder(self, batch_size)


class SampleBuilder(Generic[Sample]):
    """One batch in the making.

    Args:
        form: What it holds.
        batch_size: Rows to fill.
    """

    def __init__(self, form: SampleFormat[Sample], batch_size: int) -> None:
        self.form = form
        self.samples: list[Sample | None] = [None] * batch_size

    def write(self, row: int, sample: RawSample, draw: Draw, source: int, name: str) -> None:
        """Fill a row: see `datamodules.webdataset.formats.Builder`."""
        self.samples[row] = self.form.make(sample, draw, name)

    def finish(self, valid: Tensor) -> Any:
        """Return the batch of the valid rows, or None if there are none (see `EvalLoader`)."""
        rows = zip(self.samples, valid.tolist(), strict=True)
        kept = [sample for sample, is_valid in rows if is_valid and sample is not None]
        return self.form.collate(kept) if kept else None


def read_upright(data: memoryview, size: tuple[int, int]) -> Image.Image:
    """Return the RGB image, turned as EXIF says, unless only the unturned one has the annotated height and width.

    Raises:
        BadSample: It is truncated, broken or too large, or has another size in either case.
    """
    image = open_image(data)
    if image.height * image.width > MAX_PIXELS:
        raise BadSample("size", f"{image.height} x {image.width} pixels, at most {MAX_PIXELS} may be")
    try:
        turned = upright(image, size)
    except UNREADABLE as error:
        raise BadSample("decode", str(error)) from error
    if (turned.height, turned.width) != size:
        raise BadSample(
            "label",
            f"the image has {turned.height} x {turned.width} pixels, its annotation was made for {size[0]} x {size[1]} "
            "(height x width)",
        )
    return turned
