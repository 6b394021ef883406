"""Fashion-MNIST (or any MNIST look-alike) from its four idx files."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.classification import ClassificationData, Split
from datamodules.sources import ArraySource
from datamodules.transforms import SMALL_EVAL, SMALL_TRAIN, EvalTransform, TrainTransform

CLASS_NAMES = ["T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
FILE_PREFIXES: dict[Split, str] = {"train": "train", "val": "t10k"}


class FashionMNIST(ClassificationData):
    """60,000 training and 10,000 test images of 28 x 28 pixels in 10 classes; `val` is the standard test split.

    Args:
        root: Holds `{train,t10k}-images-idx3-ubyte.gz` and `{train,t10k}-labels-idx1-ubyte.gz`. The default is where
            Debian's package dataset-fashion-mnist puts them.
        image_size: Side of the batch's images, pixels; 28 or more with the default transforms.
        batch_size: Images per device and step.
        num_workers: Loader processes per device.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation.
        **options: Further arguments of `ClassificationData`.
    """

    def __init__(
        self,
        root: Path = Path("/usr/share/datasets/fashion-mnist"),
        image_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        train_transform: TrainTransform = SMALL_TRAIN,
        eval_transform: EvalTransform = SMALL_EVAL,
        **options: Any,
    ) -> None:
        super().__init__(10, image_size, batch_size, num_workers, train_transform, eval_transform, **options)
        self.root = root

    def open_split(self, split: Split) -> ArraySource:
        prefix = FILE_PREFIXES[split]
        images = _read_idx(self.root / f"{prefix}-images-idx3-ubyte.gz", num_dims=3)
        labels = _read_idx(self.root / f"{prefix}-labels-idx1-ubyte.gz", num_dims=1)
        if len(images) != len(labels) or labels.max() >= self.num_classes:
            raise ValueError(
                f"FashionMNIST: {self.root} has {len(images)} {prefix} images and {len(labels)} labels up to "
                f"{labels.max()}, expected equally many and labels up to {self.num_classes - 1}."
            )
        return ArraySource(images, labels, f"fashion-mnist/{split}")

    def find_class_names(self) -> list[str]:
        return CLASS_NAMES


def _read_idx(path: Path, *, num_dims: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read bytes in idx format: magic 0, 0, 8 (uint8), number of axes; their lengths, big-endian; the values."""
    if not path.is_file():
        raise FileNotFoundError(
            f"FashionMNIST: {path} does not exist. Debian and Ubuntu: apt-get install dataset-fashion-mnist; "
            "or set root to the folder with the four idx files."
        )
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"FashionMNIST: {path} is not a whole gzip file: {error}") from error
    header = 4 + 4 * num_dims
    shape = tuple(int(length) for length in np.frombuffer(content[4:header], dtype=">u4"))
    if content[:4] != bytes([0, 0, 8, num_dims]) or len(content) != header + int(np.prod(shape)):
        raise ValueError(f"FashionMNIST: {path} is not an idx file of bytes with {num_dims} axes, or is cut short.")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
