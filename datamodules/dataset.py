"""From a source and a pipeline to the samples of a batch."""

from typing import TypedDict

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.corrupt import CorruptImagesError as CorruptImagesError
from datamodules.corrupt import ReplacedImages
from datamodules.pipeline import Pipeline
from datamodules.sampling import SAMPLE, SampleKey
from datamodules.sources import UNREADABLE, ImageSource


class ClassificationSample(TypedDict):
    """One row of a `ClassificationBatch`."""

    image: Tensor  # (3, H, W) float32, normalised
    label: int


class PredictSample(TypedDict):
    """One row of a `PredictBatch`."""

    image: Tensor  # (3, H, W) float32, normalised
    path: str


class ClassificationDataset(Dataset[ClassificationSample]):
    """Samples that depend on (seed, epoch, index) and on nothing else.

    An unreadable image is replaced, label included.

    Args:
        source: Labelled images.
        pipeline: From image and seed to tensor.
        seed: Of the pipeline's randomness and of replacements.
        max_corrupt_share: Share of the source's images that may be unreadable.
    """

    def __init__(self, source: ImageSource, pipeline: Pipeline, *, seed: int, max_corrupt_share: float) -> None:
        self.source, self.pipeline, self.seed = source, pipeline, seed
        self.images = ReplacedImages(source, seed=seed, max_corrupt_share=max_corrupt_share)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> ClassificationSample:
        """Return the sample of `(epoch, index)`; a plain index means epoch 0.

        Raises:
            CorruptImagesError: Too many images are unreadable.
            ValueError: The pipeline cannot take the image's size.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        found, image = self.images.read(epoch, index)
        seed = np.random.SeedSequence((SAMPLE, self.seed, epoch, index))
        try:
            return {"image": self.pipeline(image, seed), "label": self.source.label(found)}
        except ValueError as error:
            raise ValueError(f"{self.source.name(found)}: {error}") from error


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
