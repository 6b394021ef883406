"""Data in, typed batches out. Everything here yields the dicts of `datamodules.batch`."""

from datamodules.batch import ClassificationBatch, PredictBatch
from datamodules.classification import ClassificationData
from datamodules.fashion_mnist import FashionMNIST
from datamodules.folder import ImageFolders
from datamodules.listfile import ListFiles
from datamodules.mnist import MNIST5k
from datamodules.synthetic import SyntheticClassification
from datamodules.transforms import EvalTransform, TrainTransform

__all__ = [
    "ClassificationBatch",
    "ClassificationData",
    "EvalTransform",
    "FashionMNIST",
    "ImageFolders",
    "ListFiles",
    "MNIST5k",
    "PredictBatch",
    "SyntheticClassification",
    "TrainTransform",
]
