"""Images to predict: files in folders, or the samples of shards, through the same transform as evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batch import PredictBatch
from datamodules.webdataset.formats import Format, image_part, image_rows
from datamodules.webdataset.meters import Meter
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.writers import ImageWriter


@dataclass(frozen=True, kw_only=True)
class PredictFormat:
    """Images and where they came from: `PredictBatch`, in which rows that are not valid are left out.

    Args:
        writer: Of images; one view.
    """

    writer: ImageWriter

    def builder(self, batch_size: int) -> "PredictBuilder":
        """Return an empty batch to fill."""
        return PredictBuilder(self.writer, batch_size)


class PredictBuilder:
    """One `PredictBatch` in the making.

    Args:
        writer: Of images.
        batch_size: B.
    """

    def __init__(self, writer: ImageWriter, batch_size: int) -> None:
        self.writer, self.image, self.path = writer, image_rows(writer, batch_size), [""] * batch_size

    def write(self, row: int, sample: RawSample, draw: Draw, source: int, name: str) -> None:
        """Fill a row: see `datamodules.webdataset.formats.Builder`."""
        self.writer.write(image_part(sample), draw, [self.image[row]])
        self.path[row] = name

    def finish(self, valid: Tensor) -> PredictBatch:
        """Return the batch of the valid rows."""
        kept = valid.nonzero().flatten().tolist()
        image = self.image if len(kept) == len(valid) else self.image[kept]
        return PredictBatch(image=image, path=[self.path[row] for row in kept])


class FileBatches(Dataset[tuple[Any, Meter]]):
    """Batches of image files, by number; an unreadable image is an error.

    Args:
        files: This rank's images.
        form: Of the batches.
        batch_size: Images of a batch, the last one aside.
    """

    def __init__(self, files: list[Path], form: Format, batch_size: int) -> None:
        self.files, self.form, self.batch_size = files, form, batch_size

    def __len__(self) -> int:
        # Lightning takes no loader of length 0, so a rank without files has an empty batch.
        return max(1, -(-len(self.files) // self.batch_size))

    def __getitem__(self, number: int) -> tuple[Any, Meter]:
        files = self.files[number * self.batch_size : (number + 1) * self.batch_size]
        builder = self.form.builder(len(files))
        for row, file in enumerate(files):
            extension = file.suffix.lower().removeprefix(".")
            try:
                sample = RawSample(str(file), {extension: memoryview(file.read_bytes())})
                builder.write(row, sample, Draw(0, 0, 0, row), 0, str(file))
            except (OSError, BadSample) as error:
                raise ValueError(
                    f"predict: cannot use {file}: {error}. Repair it, or remove it from the list."
                ) from error
        return builder.finish(torch.ones(len(files), dtype=torch.bool)), Meter()
