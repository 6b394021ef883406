"""What the datamodules of every task share: loaders, ranks, the count of unreadable images, files to predict."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from datamodules.orders import Order
from datamodules.sampling import EvalSampler, TrainLoader, TrainSampler, loader_generator
from datamodules.sources import IMAGE_SUFFIXES, find_images

if TYPE_CHECKING:
    from datamodules.corrupt import ReplacedImages

Split = Literal["train", "val"]
Use = Literal["train", "val", "predict"]


class ImageData(LightningDataModule):
    """Loaders for data sets of images that a subclass opens in `setup` and keeps in `_sets`.

    `test` evaluates the `val` split. `predict` takes `predict_paths`, or the `val` split when there are none.

    Args:
        batch_size: Images per device and step. Global batch = this x devices x nodes x accumulate_grad_batches.
        num_workers: Loader processes per device; 0 loads in the main process.
        seed: Of order, random changes and replacements; with epoch and index it decides every pixel of a batch.
        max_corrupt_share: Share of a split's images that may be unreadable before that is an error.
        predict_paths: Image files, and folders that are searched with their subfolders.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        seed: int,
        max_corrupt_share: float,
        predict_paths: list[Path] | None,
    ) -> None:
        super().__init__()
        self._check_least(batch_size=(batch_size, 1), num_workers=(num_workers, 0), seed=(seed, 0))
        if not 0 <= max_corrupt_share <= 1:
            raise ValueError(f"{type(self).__name__}: max_corrupt_share={max_corrupt_share}, expected 0 to 1.")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.max_corrupt_share = max_corrupt_share
        self.predict_paths = predict_paths or []
        self._sets: dict[Split, Any] = {}
        # Of the splits whose unreadable images are replaced.
        self._replaced: dict[Split, ReplacedImages] = {}

    @abstractmethod
    def predict_dataset(self) -> Dataset[Any]:
        """Return the images to predict: `find_predict_images()` if `predict_paths` names any, else the `val` split."""

    def train_dataloader(self) -> TrainLoader:
        dataset, order = self._sets["train"], self.train_order()
        sampler = TrainSampler(dataset, self.batch_size, **self._ranks(), seed=self.seed, order=order)
        if len(sampler) == 0:
            raise ValueError(
                f"{type(self).__name__}: {sampler.size} training images do not fill one batch of {self.batch_size} on "
                f"each of {sampler.num_replicas} devices. Lower batch_size."
            )
        return TrainLoader(dataset, sampler=sampler, drop_last=True, **self._loading("train"))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader(self._sets["val"], "val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader(self._sets["val"], "val")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader(self.predict_dataset(), "predict")

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
        """Names of the unreadable images that this rank has met, for each opened split that replaces them."""
        return {split: images.names() for split, images in self._replaced.items()}

    def train_order(self) -> Order | None:
        """Return the order of the training samples; None shuffles them."""
        return None

    def collate(self, use: Use) -> Callable[[list[Any]], Any] | None:
        """Return what turns samples into a batch; None stacks them."""
        return None

    def find_predict_images(self) -> list[Path]:
        """Return the image files of `predict_paths`.

        Raises:
            FileNotFoundError: A path does not exist, or is a folder without images.
        """
        return find_files(self.predict_paths, type(self).__name__)

    def _check_least(self, **numbers: tuple[int, int]) -> None:
        for name, (value, least) in numbers.items():
            if value < least:
                raise ValueError(f"{type(self).__name__}: {name}={value}, expected at least {least}.")

    def _to_open(self, stage: str) -> list[Split]:
        if stage == "predict" and self.predict_paths:
            return []
        splits: list[Split] = ["train", "val"] if stage == "fit" else ["val"]
        return [split for split in splits if split not in self._sets]

    def _eval_loader(self, dataset: Dataset[Any], use: Use) -> DataLoader[Any]:
        return DataLoader(dataset, sampler=EvalSampler(dataset, **self._ranks()), **self._loading(use))

    def _loading(self, use: Use) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": one_thread,
            "pin_memory": torch.cuda.is_available(),
            "generator": loader_generator(),
            "collate_fn": self.collate(use),
        }

    def _ranks(self) -> dict[str, int]:
        # Lightning's own answer also holds for strategies in which several ranks read the same samples.
        ranks = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return ranks or {"num_replicas": 1, "rank": 0}


def find_files(paths: Sequence[Path], owner: str) -> list[Path]:
    """Return the image files of `predict_paths`: files as they are, folders searched with their subfolders.

    Args:
        paths: Files and folders.
        owner: Whose setting it is.

    Raises:
        FileNotFoundError: A path does not exist, or is a folder without images.
    """
    images: list[Path] = []
    for path in map(Path, paths):
        found = find_images(path) if path.is_dir() else [path]
        if not found or not path.exists():
            problem = f"has no image file ({', '.join(IMAGE_SUFFIXES)})" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{owner}: predict_paths: {path} {problem}.")
        images += found
    return images


def check_same_labels(owner: str, splits: Sequence[Sequence[str]]) -> None:
    """Refuse splits whose names, by label, are not the same; they are equally many.

    Args:
        owner: Whose splits they are.
        splits: Names of the classes of each.

    Raises:
        ValueError: They differ.
    """
    for first, second in pairwise(splits):
        for label, (one, other) in enumerate(zip(first, second, strict=True)):
            if one != other:
                raise ValueError(
                    f"{owner}: the splits disagree about label {label}: {one} and {other}. Give both the same classes, "
                    "or name the classes in one order for both."
                )


def one_thread(worker: int) -> None:
    """Give a worker process one thread: `worker_init_fn` of loaders."""
    # OpenCV's thread pool does not survive a fork, and a worker has one core.
    import cv2

    cv2.setNumThreads(0)
