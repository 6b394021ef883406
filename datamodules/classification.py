"""What every classification datamodule shares: its arguments, its loaders, and where predict gets its images."""

import warnings
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.batch import ClassificationBatch, PredictBatch
from datamodules.sampling import EvalSampler, TrainLoader, TrainSampler, loader_generator
from datamodules.sources import IMAGE_SUFFIXES, FileSource, ImageSource, find_images
from datamodules.transforms import EVAL, TRAIN, EvalTransform, TrainTransform

if TYPE_CHECKING:
    from datamodules.dataset import ClassificationDataset

Split = Literal["train", "val"]


class ClassificationData(LightningDataModule):
    """Yield `ClassificationBatch`es for training and evaluation, `PredictBatch`es for prediction.

    A subclass says where the images are (`open_split`). `test` evaluates the `val` split. `predict` takes
    `predict_paths`, or the `val` split when there are none.

    Args:
        num_classes: Number of classes; checked when the data is opened.
        image_size: Side of the square images in a batch, pixels.
        batch_size: Images per device and step. Global batch = this x devices x nodes x accumulate_grad_batches.
        num_workers: Loader processes per device; 0 loads in the main process.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation and prediction.
        seed: Of order, random changes and replacements; with epoch and index it decides every pixel of a batch.
        max_corrupt_share: Share of a split's images that may be unreadable before that is an error.
        predict_paths: Image files, and folders that are searched with their subfolders.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        num_classes: int,
        image_size: int = 224,
        batch_size: int = 64,
        num_workers: int = 8,
        train_transform: TrainTransform = TRAIN,
        eval_transform: EvalTransform = EVAL,
        seed: int = 0,
        max_corrupt_share: float = 0.01,
        predict_paths: list[Path] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{type(self).__name__}: {name}={value}, expected at least {least}.")
        if not 0 <= max_corrupt_share <= 1:
            raise ValueError(f"{type(self).__name__}: max_corrupt_share={max_corrupt_share}, expected 0 to 1.")
        self.num_classes = num_classes
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.seed = seed
        self.max_corrupt_share = max_corrupt_share
        self.predict_paths = predict_paths or []
        # Known after `setup`, for data that names its classes.
        self.class_names: list[str] | None = None
        self._sets: dict[Split, ClassificationDataset] = {}

    @abstractmethod
    def open_split(self, split: Split) -> ImageSource:
        """Open one split and check it against `num_classes`; called in `setup`."""

    def find_class_names(self) -> list[str] | None:
        """Return the names by label where the data has them, without opening a split."""
        return None

    def setup(self, stage: str) -> None:
        # Here, not above: it imports albumentations and timm, which `--help` can do without.
        from datamodules.dataset import ClassificationDataset

        splits: list[Split] = ["train", "val"] if stage == "fit" else ["val"]
        if stage == "predict" and self.predict_paths:
            splits = []
        for split in splits:
            if split not in self._sets:
                transform = self.train_transform if split == "train" else self.eval_transform
                self._sets[split] = ClassificationDataset(
                    self.open_split(split),
                    transform.build(self.image_size),
                    seed=self.seed,
                    max_corrupt_share=self.max_corrupt_share,
                )
        self.class_names = self.find_class_names()

    def train_dataloader(self) -> TrainLoader:
        dataset = self._sets["train"]
        sampler = TrainSampler(dataset, self.batch_size, **self._ranks(), seed=self.seed)
        if len(sampler) == 0:
            raise ValueError(
                f"{type(self).__name__}: {len(dataset)} training images do not fill one batch of {self.batch_size} on "
                f"each of {sampler.num_replicas} devices. Lower batch_size."
            )
        return TrainLoader(dataset, sampler=sampler, drop_last=True, **self._loading())

    def val_dataloader(self) -> "DataLoader[ClassificationBatch]":
        return self._eval_loader(self._sets["val"])

    def test_dataloader(self) -> "DataLoader[ClassificationBatch]":
        return self._eval_loader(self._sets["val"])

    def predict_dataloader(self) -> "DataLoader[PredictBatch]":
        from datamodules.dataset import PredictImages

        source = self._open_predict_paths() if self.predict_paths else self._sets["val"].source
        return self._eval_loader(PredictImages(source, self.eval_transform.build(self.image_size)))

    def teardown(self, stage: str) -> None:
        """Report unreadable images, whose number otherwise only `corrupt_images` shows."""
        for split, names in self.corrupt_images.items():
            if names:
                warnings.warn(
                    f"{type(self).__name__}: {len(names)} of {len(self._sets[split])} {split} images are unreadable; "
                    f"other images took their places. The first: {', '.join(names[:3])}. "
                    "`datamodule.corrupt_images` has them all.",
                    stacklevel=2,
                )

    @property
    def corrupt_images(self) -> dict[Split, list[str]]:
        """Names of the unreadable images that this rank has met, for each opened split."""
        return {split: dataset.corrupt_images() for split, dataset in self._sets.items()}

    def _eval_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(dataset, sampler=EvalSampler(dataset, **self._ranks()), **self._loading())

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": _one_thread,
            "pin_memory": torch.cuda.is_available(),
            "generator": loader_generator(),
        }

    def _ranks(self) -> dict[str, int]:
        # Lightning's own answer also holds for strategies in which several ranks read the same samples.
        ranks = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return ranks or {"num_replicas": 1, "rank": 0}

    def _open_predict_paths(self) -> FileSource:
        images: list[Path] = []
        for path in map(Path, self.predict_paths):
            found = find_images(path) if path.is_dir() else [path]
            if not found or not path.exists():
                problem = f"has no image file ({', '.join(IMAGE_SUFFIXES)})" if path.exists() else "does not exist"
                raise FileNotFoundError(f"{type(self).__name__}: predict_paths: {path} {problem}.")
            images += found
        return FileSource(Path(), ((str(path), 0) for path in images))


def _one_thread(worker: int) -> None:
    # OpenCV's thread pool does not survive a fork, and a worker has one core.
    import cv2

    cv2.setNumThreads(0)
