"""What the datamodules of detection and segmentation over shards share: evaluation in lists, prediction, classes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD
from datamodules.detection.transforms import DetectionEvalTransform
from datamodules.sampling import EvalSampler
from datamodules.segmentation.transforms import SegmentationEvalTransform
from datamodules.views import PredictFiles, PredictImages, collate_views
from datamodules.webdataset.data import ShardData
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.urls import is_local


class ViewShards(ShardData):
    """Shards whose images are evaluated and predicted at sizes of their own, as `ViewBatch`es.

    A sample that cannot be used is left out of its evaluation batch. Each rank takes as many steps as the others: one
    whose batch has no sample left gives another batch once more, which the metrics count once. So collectives in the
    model, as those of sharded weights, stay in step.

    Args:
        num_classes: Number of classes; checked when the data is opened.
        train: Sources of the training images.
        val: Source of the images for evaluation.
        batch_size: Images per device and step. Global batch = this x devices x nodes x accumulate_grad_batches.
        eval_batch_size: Images per device in evaluation and prediction.
        eval_transform: What happens to images in evaluation and prediction.
        **options: Further arguments of `ShardData`. The transforms have their own `mean` and `std`.

    Attributes:
        class_names: Name of each class, known after `setup`.

    Raises:
        ValueError: A number out of range, or `mean` or `std` is given.
    """

    def __init__(
        self,
        num_classes: int,
        train: Shards | list[Shards] | None,
        val: Shards | None,
        batch_size: int,
        eval_batch_size: int,
        eval_transform: DetectionEvalTransform | SegmentationEvalTransform,
        **options: Any,
    ) -> None:
        super().__init__(train, val, batch_size, **options)
        for name, value in (("num_classes", num_classes), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name}={value}, expected at least 1.")
        if (tuple(self.mean), tuple(self.std)) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError(
                f"{type(self).__name__}: mean={self.mean} and std={self.std} have no effect here. Give them to "
                "train_transform and eval_transform."
            )
        self.num_classes, self.eval_batch_size = num_classes, eval_batch_size
        self.eval_transform = eval_transform
        self.class_names: list[str] | None = None

    def file_loader(self, files: list[Path]) -> DataLoader[Any]:
        images = PredictImages(PredictFiles(files), self.eval_transform.build())
        sampler = EvalSampler(images, **self._ranks())
        loading = {**self._loading(), "collate_fn": collate_views}
        return DataLoader(images, self.eval_batch_size, sampler=sampler, **loading)

    def _beside(self, name: str) -> list[Path]:
        """Return the folder of the file `name` for each source: that of its shards, or of their index.

        Raises:
            FileNotFoundError: A source has none.
        """
        return [self._folder_with(name, shards) for shards in [*self.train, *self.val]]

    def _folder_with(self, name: str, shards: Shards) -> Path:
        manifest = shards.open()
        looked = list(dict.fromkeys(_places(manifest.url(0), manifest.folder)))
        for folder in looked:
            if (folder / name).is_file():
                return folder
        raise FileNotFoundError(
            f"{type(self).__name__}: there is no {name} for {manifest.name} in {', '.join(map(str, looked))}. Put it "
            "beside the shards or into their index, or name the classes in the arguments."
        )

    def _check_num_classes(self, found: int, where: str) -> None:
        if found != self.num_classes:
            raise ValueError(f"{type(self).__name__}: {where} has {found} classes, num_classes={self.num_classes}.")


def _places(url: str, index: Path) -> Iterator[Path]:
    """Yield the folders in which a file about the classes may lie."""
    if is_local(url):
        yield Path(url.removeprefix("file://")).parent
    yield index
