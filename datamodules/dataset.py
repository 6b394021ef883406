"""From a source and a pipeline to the samples of a batch."""

from typing import TypedDict

from torch import Tensor
from torch.utils.data import Dataset

from datamodules.corrupt import CorruptImagesError as CorruptImagesError
from datamodules.pipeline import Pipeline
from datamodules.sampling import SampleKey
from datamodules.sources import UNREADABLE, ImageSource
from datamodules.training import TrainImages


class ClassificationSample(TypedDict):
    """One row of a `ClassificationBatch`."""

    image: Tensor  # (3, H, W) float32, normalised
    label: int


class PredictSample(TypedDict):
    """One row of a `PredictBatch`."""

    image: Tensor  # (3, H, W) float32, normalised
    path: str


class ClassificationDataset(TrainImages[ImageSource, Pipeline, ClassificationSample]):
    """Labelled samples, of training and of evaluation: see `TrainImages`."""

    def __getitem__(self, key: SampleKey | int) -> ClassificationSample:
        """Return the sample of `(epoch, index)`.

        Raises:
            ValueError: The pipeline cannot take the image's size.
        """
        found, image, seed = self.draw(key)
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
