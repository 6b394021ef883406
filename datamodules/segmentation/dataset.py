"""From a source and a pipeline to the samples of a batch. Training replaces unreadable images, nothing else does."""

from PIL import Image
from torch.utils.data import Dataset

from datamodules.batch import Array
from datamodules.sampling import SampleKey
from datamodules.segmentation.pipeline import TrainPipeline, TrainSample
from datamodules.segmentation.records import SegmentationSource
from datamodules.training import TrainImages
from datamodules.views import ViewPipeline, ViewSample, look, read_or_raise


class EvalSample(ViewSample):
    """One image of a `SegmentationEvalBatch`, not padded."""

    truth: Array


class SegmentationDataset(TrainImages[SegmentationSource, TrainPipeline, TrainSample]):
    """Training samples: see `TrainImages`."""

    def __getitem__(self, key: SampleKey | int) -> TrainSample:
        """Return the sample of `(epoch, index)`.

        Raises:
            ValueError: The mask is unreadable, means nothing, or has another size than the image.
        """
        found, image, seed = self.draw(key)
        return self.pipeline(image, _mask_of(self.source, found, image), seed)


class SegmentationEvalDataset(Dataset[EvalSample]):
    """Images with their truth; an unreadable one is an error, since without it the metric would be another one.

    Args:
        source: Images and masks.
        pipeline: From image to views.
    """

    def __init__(self, source: SegmentationSource, pipeline: ViewPipeline) -> None:
        self.source, self.pipeline = source, pipeline

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> EvalSample:
        image = read_or_raise(self.source, index, "evaluation")
        truth = _mask_of(self.source, index, image)
        return EvalSample(**look(self.source, self.pipeline, index, image), truth=truth)


def _mask_of(source: SegmentationSource, index: int, image: Image.Image) -> Array:
    mask = source.mask(index)
    if mask.shape != (image.height, image.width):
        raise ValueError(
            f"{source.name(index)} has {image.height} x {image.width} pixels and its mask {mask.shape[0]} x "
            f"{mask.shape[1]} (height x width). Give both the same size: labels would be of other pixels."
        )
    return mask
