"""What the training sets of all tasks share: samples that can be made again."""

from typing import Generic, TypeVar

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from datamodules.corrupt import NamedImages, ReplacedImages
from datamodules.sampling import SAMPLE, SampleKey

Source = TypeVar("Source", bound=NamedImages)
Pipeline = TypeVar("Pipeline")
Sample = TypeVar("Sample")


class TrainImages(Dataset[Sample], Generic[Source, Pipeline, Sample]):
    """Training samples that depend on (seed, epoch, index) and on nothing else.

    An unreadable image is replaced, with all that belongs to it. A subclass makes a sample of what `draw` returns.

    Args:
        source: Annotated images.
        pipeline: From an image, its annotation and a seed to a sample.
        seed: Of the pipeline's randomness and of replacements.
        max_corrupt_share: Share of the source's images that may be unreadable.
    """

    def __init__(self, source: Source, pipeline: Pipeline, *, seed: int, max_corrupt_share: float) -> None:
        self.source, self.pipeline, self.seed = source, pipeline, seed
        self.images = ReplacedImages(source, seed=seed, max_corrupt_share=max_corrupt_share)

    def __len__(self) -> int:
        return len(self.source)

    def draw(self, key: SampleKey | int) -> tuple[int, Image.Image, np.random.SeedSequence]:
        """Return which image of the source stands at `(epoch, index)`, the image, and the seed of the pipeline.

        A plain index means epoch 0. One past the end begins again at the first image, with another seed
        (`datamodules.orders`).

        Raises:
            CorruptImagesError: Too many images are unreadable.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        found, image = self.images.read(epoch, index % len(self))
        return found, image, np.random.SeedSequence((SAMPLE, self.seed, epoch, index))
