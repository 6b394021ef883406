"""From a source and a pipeline to the samples of a batch. Training replaces unreadable images, nothing else does."""

from collections.abc import Mapping

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from datamodules.batch import Array, DetectionTruth
from datamodules.detection.pipeline import TrainPipeline, TrainSample
from datamodules.detection.records import Categories, DetectionSource, LabelSets, Objects
from datamodules.sampling import SampleKey
from datamodules.training import TrainImages
from datamodules.views import ViewPipeline, ViewSample, look, read_or_raise


class EvalSample(ViewSample):
    """One image of a `DetectionEvalBatch`, not padded."""

    truth: DetectionTruth


class ChosenImages:
    """Some images of a source, whose files are checked against the size that the annotations were made for.

    Args:
        source: The images.
        chosen: `(M,)` indices, or None for all images.
    """

    def __init__(self, source: DetectionSource, chosen: Array | None = None) -> None:
        self._source = source
        self._chosen = np.arange(len(source)) if chosen is None else chosen

    @property
    def categories(self) -> Categories:
        """The classes by label."""
        return self._source.categories

    @property
    def has_masks(self) -> bool:
        """Whether `objects` have masks."""
        return self._source.has_masks

    @property
    def skipped(self) -> Mapping[str, int]:
        """Reason and number of what the source left out."""
        return self._source.skipped

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, index: int) -> Image.Image:
        """Return the RGB image.

        Raises:
            ValueError: It has another size than the annotations say. Boxes and masks would be somewhere else.
        """
        image = self._source.read(int(self._chosen[index]))
        if (image.height, image.width) != (size := self.size(index)):
            raise ValueError(
                f"the file has {image.height} x {image.width} pixels, the annotations were made for {size[0]} x "
                f"{size[1]} (height x width)"
            )
        return image

    def objects(self, index: int) -> Objects:
        """Return what is on the image."""
        return self._source.objects(int(self._chosen[index]))

    def image_id(self, index: int) -> int | str:
        """Return what the annotation file calls the image."""
        return self._source.image_id(int(self._chosen[index]))

    def size(self, index: int) -> tuple[int, int]:
        """Return height and width of the original image."""
        return self._source.size(int(self._chosen[index]))

    def name(self, index: int) -> str:
        """Return where the image came from."""
        return self._source.name(int(self._chosen[index]))

    def label_sets(self) -> LabelSets:
        """Return the labels of each image's objects."""
        sets = self._source.label_sets()
        counts = np.diff(sets.starts)[self._chosen]
        starts = np.concatenate([[0], np.cumsum(counts)])
        # Label n of the result stands n - (its image's start here) after its image's start in the source.
        places = np.arange(starts[-1]) + np.repeat(sets.starts[:-1][self._chosen] - starts[:-1], counts)
        return LabelSets(sets.labels[places], starts)


class DetectionDataset(TrainImages[DetectionSource, TrainPipeline, TrainSample]):
    """Training samples: see `TrainImages`."""

    def __getitem__(self, key: SampleKey | int) -> TrainSample:
        """Return the sample of `(epoch, index)`."""
        found, image, seed = self.draw(key)
        return self.pipeline(image, self.source.objects(found), seed)


class DetectionEvalDataset(Dataset[EvalSample]):
    """Images with their truth; an unreadable one is an error, since without it the metric would be another one.

    Args:
        source: Images and objects.
        pipeline: From image to views.
    """

    def __init__(self, source: DetectionSource, pipeline: ViewPipeline) -> None:
        self.source, self.pipeline = source, pipeline

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> EvalSample:
        sample = look(self.source, self.pipeline, index, read_or_raise(self.source, index, "evaluation"))
        return EvalSample(**sample, truth=self.source.objects(index).truth())
