"""From a source and a pipeline to the samples of a batch, with unreadable images replaced, counted and bounded."""

import warnings
from collections.abc import Iterator
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.pipeline import Pipeline
from datamodules.sampling import REPLACEMENT, SAMPLE, SampleKey
from datamodules.sources import UNREADABLE, ImageSource

# So many unreadable images in a row are no accident at any share worth training with.
MAX_ATTEMPTS = 10
NUM_NAMED = 3


class ClassificationSample(TypedDict):
    """One row of a `ClassificationBatch`."""

    image: Tensor  # (3, H, W) float32, normalised
    label: int


class PredictSample(TypedDict):
    """One row of a `PredictBatch`."""

    image: Tensor  # (3, H, W) float32, normalised
    path: str


class CorruptImagesError(RuntimeError):
    """More images are unreadable than the datamodule allows."""


class ClassificationDataset(Dataset[ClassificationSample]):
    """Samples that depend on (seed, epoch, index) and on nothing else.

    An unreadable image is replaced, label included, by another one that the same three numbers choose, so that the
    replacement too is the same for any number of workers and ranks and after a resume.

    Args:
        source: Labelled images.
        pipeline: From image and seed to tensor.
        seed: Of the pipeline's randomness and of replacements.
        max_corrupt_share: Share of the source's images that may be unreadable.
    """

    def __init__(self, source: ImageSource, pipeline: Pipeline, *, seed: int, max_corrupt_share: float) -> None:
        self.source, self.pipeline = source, pipeline
        self.seed, self.max_corrupt_share = seed, max_corrupt_share
        # One byte an image, shared with the worker processes. Writing 1 twice is harmless, so no lock is needed.
        self._corrupt = torch.zeros(len(source), dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> ClassificationSample:
        """Return the sample of `(epoch, index)`; a plain index means epoch 0.

        Raises:
            CorruptImagesError: Past `max_corrupt_share`, or `MAX_ATTEMPTS` unreadable images in a row.
            ValueError: The pipeline cannot take the image's size.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        for candidate in self._candidates(epoch, index):
            try:
                image = self.source.read(candidate)
            except UNREADABLE as error:
                self._record(candidate, error)
                continue
            seed = np.random.SeedSequence((SAMPLE, self.seed, epoch, index))
            try:
                return {"image": self.pipeline(image, seed), "label": self.source.label(candidate)}
            except ValueError as error:
                raise ValueError(f"{self.source.name(candidate)}: {error}") from error
        raise CorruptImagesError(
            f"{MAX_ATTEMPTS} images in a row are unreadable, the first is {self.source.name(index)}. "
            "Check the path, the mount and the format. " + self._account()
        )

    def corrupt_images(self) -> list[str]:
        """Return the names of the unreadable images found so far by this process and its workers."""
        return [self.source.name(int(index)) for index in self._corrupt.nonzero().flatten()]

    def _candidates(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        other = np.random.default_rng((REPLACEMENT, self.seed, epoch, index))
        yield from (int(number) for number in other.integers(len(self), size=MAX_ATTEMPTS - 1))

    def _record(self, index: int, error: Exception) -> None:
        if self._corrupt[index]:
            return
        self._corrupt[index] = 1
        count = int(self._corrupt.count_nonzero())
        if count > self.max_corrupt_share * len(self):
            raise CorruptImagesError(
                self._account() + f" At most max_corrupt_share={self.max_corrupt_share} may be: repair or remove them, "
                "or raise it."
            ) from error
        if count <= NUM_NAMED:
            warnings.warn(
                f"{self.source.name(index)} is unreadable ({error}) and another image takes its place. All such images "
                "are counted; the total is reported at the end.",
                stacklevel=2,
            )

    def _account(self) -> str:
        named = ", ".join(self.corrupt_images()[:NUM_NAMED])
        return f"{int(self._corrupt.count_nonzero())} of {len(self)} images are unreadable ({named}, ...)."


class PredictImages(Dataset[PredictSample]):
    """Images without labels, for `predict`; an unreadable one is an error, since the user asked for it by name.

    Args:
        source: The images; their labels are not used.
        pipeline: From image to tensor.
    """

    def __init__(self, source: ImageSource, pipeline: Pipeline) -> None:
        self.source, self.pipeline = source, pipeline

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> PredictSample:
        name = self.source.name(index)
        try:
            return {"image": self.pipeline(self.source.read(index)), "path": name}
        except UNREADABLE as error:
            raise ValueError(f"predict: cannot use {name}: {error}") from error
