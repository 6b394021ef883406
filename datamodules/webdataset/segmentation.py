"""Images with maps of classes from shards, where they are too many for one disk."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from PIL import Image

from datamodules.batch import Array
from datamodules.loading import check_same_labels
from datamodules.segmentation.masks import label_table, read_mask
from datamodules.segmentation.records import Classes, Colour, generated_palette
from datamodules.segmentation.shards import CLASSES, read_classes
from datamodules.segmentation.transforms import (
    EVAL_512,
    TRAIN_512,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
)
from datamodules.sources import IMAGE_SUFFIXES
from datamodules.views import ViewPipeline, collate_views
from datamodules.webdataset.data import Use
from datamodules.webdataset.formats import Format
from datamodules.webdataset.records import BadSample, Draw, RawSample
from datamodules.webdataset.samples import SampleFormat, read_upright
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.views import ViewShards

if TYPE_CHECKING:
    from datamodules.segmentation.dataset import EvalSample
    from datamodules.segmentation.pipeline import TrainPipeline, TrainSample

_MASK = "png"


class ImageMaskShards(ViewShards):
    """Yield `SegmentationBatch`es for training, `SegmentationEvalBatch`es and, for prediction, `ViewBatch`es.

    A sample is an image (a PNG is `<key>.image.png`) and `<key>.png`, whose values are labels or 255, as
    `datamodules.segmentation.shards.write_shards` writes them. `datamodules.SegmentationShards` reads the same shards
    from a folder; this one reads them from anywhere, and mixes sources.

    Args:
        num_classes: Number of classes; checked when the data is opened.
        train: Sources of the training images.
        val: Source of the images for evaluation. Results are listed by shard and key, so file names of its shards
            differ.
        batch_size: Images per device and step. Global batch = this x devices x nodes x accumulate_grad_batches.
        eval_batch_size: Images per device in evaluation and prediction. They differ in size, and with more than 1 the
            smaller ones are padded, which changes what a head with global pooling finds on them.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation and prediction.
        classes: Folder that holds `classes.json`, or the names of the classes. None: `classes.json` lies beside the
            shards of each source, or in their index.
        **options: Further arguments of `ShardData`. The transforms have their own `mean` and `std`.

    Attributes:
        class_names: Name of each class, known after `setup`.
        palette: RGB of each class, known after `setup`.
        num_used_classes: How many classes, from the first, the data has, known after `setup`; None: all.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        train: Shards | list[Shards] | None = None,
        val: Shards | None = None,
        batch_size: int = 2,
        eval_batch_size: int = 1,
        train_transform: SegmentationTrainTransform = TRAIN_512,
        eval_transform: SegmentationEvalTransform = EVAL_512,
        classes: Path | list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_classes, train, val, batch_size, eval_batch_size, eval_transform, **options)
        if num_classes > 255:
            raise ValueError(f"ImageMaskShards: num_classes={num_classes}, expected at most 255.")
        self.train_transform, self.classes = train_transform, classes
        self.palette: list[Colour] | None = None
        self.num_used_classes: int | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        found = self._classes()
        check_same_labels(type(self).__name__, [classes.names for classes in found])
        self.class_names, self.palette = list(found[0].names), list(found[0].palette)
        self.num_used_classes = found[0].num_used
        for shards in self.val:
            self._check_shard_names(shards)

    def form(self, use: Use) -> Format:
        # Here, not above: it imports albumentations, which `--help` can do without.
        from datamodules.segmentation.collate import collate_eval, collate_train

        table = label_table(self.num_classes)
        if use == "train":
            return SampleFormat(TrainMasks(self.train_transform.build(), table), collate_train)
        make = EvalMasks(self.eval_transform.build(), table)
        return SampleFormat(make, collate_eval if use == "val" else collate_views)

    def _classes(self) -> list[Classes]:
        if isinstance(self.classes, list):
            found = {"classes": Classes(tuple(self.classes), generated_palette(len(self.classes)))}
        else:
            folders = self._beside(CLASSES) if self.classes is None else [Path(self.classes)]
            found = {str(folder / CLASSES): read_classes(folder) for folder in folders}
        for where, classes in found.items():
            self._check_num_classes(len(classes), where)
        return list(found.values())

    def _check_shard_names(self, shards: Shards) -> None:
        manifest = shards.open()
        names = Counter(PurePosixPath(manifest.url(number)).stem for number in range(len(manifest.counts)))
        name, count = names.most_common(1)[0]
        if count > 1:
            raise ValueError(
                f"ImageMaskShards: {count} shards of {manifest.name} are called {name}, and results are listed by "
                "shard and key. Give the shards of `val` different file names."
            )


@dataclass(frozen=True)
class TrainMasks:
    """From a raw sample to a training sample.

    Args:
        pipeline: Of random changes.
        table: Of `label_table`.
    """

    pipeline: "TrainPipeline"
    table: Array

    def __call__(self, sample: RawSample, draw: Draw, name: str) -> "TrainSample":
        """Return the sample.

        Raises:
            BadSample: It cannot be used.
        """
        image, mask = read_pair(sample, self.table, name)
        return self.pipeline(image, mask, draw.sequence())


@dataclass(frozen=True)
class EvalMasks:
    """From a raw sample to one of evaluation.

    Args:
        pipeline: From image to views.
        table: Of `label_table`.
    """

    pipeline: ViewPipeline
    table: Array

    def __call__(self, sample: RawSample, draw: Draw, name: str) -> "EvalSample":
        """Return the sample.

        Raises:
            BadSample: It cannot be used.
        """
        from datamodules.segmentation.dataset import EvalSample

        image, mask = read_pair(sample, self.table, name)
        return EvalSample(
            views=self.pipeline(image),
            original_size=(image.height, image.width),
            image_id=f"{PurePosixPath(name.removesuffix(f'/{sample.key}')).stem}/{sample.key}",
            path=name,
            truth=mask,
        )


def read_pair(sample: RawSample, table: Array, name: str) -> tuple[Image.Image, Array]:
    """Return the RGB image of a sample, turned as its mask is, and the label of each pixel, `(H, W)` uint8.

    Raises:
        BadSample: A part is missing or unreadable, the mask has a value without a meaning, or they differ in size.
    """
    images = (data for part, data in sample.parts.items() if part != _MASK and f".{part}".endswith(IMAGE_SUFFIXES))
    image, mask = next(images, None), sample.parts.get(_MASK)
    if image is None or mask is None:
        raise BadSample("parts", f"expected an image and its mask as `{_MASK}`, found {', '.join(sample.parts)}")
    try:
        labels = read_mask(bytes(mask), table, f"{name}.{_MASK}")
    except ValueError as error:
        raise BadSample("label", str(error)) from error
    height, width = labels.shape
    return read_upright(image, (height, width)), labels
