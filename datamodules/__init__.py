"""Data in, typed batches out. Everything here yields the dicts of `datamodules.batch`."""

from datamodules.batch import (
    ClassificationBatch,
    DetectionBatch,
    DetectionEvalBatch,
    PredictBatch,
    SegmentationBatch,
    SegmentationEvalBatch,
    ViewBatch,
)
from datamodules.classification import ClassificationData
from datamodules.detection.coco import CocoDetection
from datamodules.detection.crowdhuman import CrowdHumanDetection
from datamodules.detection.data import DetectionData
from datamodules.detection.lvis import LvisDetection
from datamodules.detection.nuclei import StarDistInstances
from datamodules.detection.objects365 import Objects365Detection
from datamodules.detection.openimages import OpenImagesDetection
from datamodules.detection.shards import DetectionShards
from datamodules.detection.synthetic import SyntheticDetection
from datamodules.detection.transforms import DetectionEvalTransform, DetectionTrainTransform
from datamodules.detection.trees import DeepForestTrees
from datamodules.detection.voc import VocDetection
from datamodules.fashion_mnist import FashionMNIST
from datamodules.folder import ImageFolders
from datamodules.listfile import ListFiles
from datamodules.mnist import MNIST5k
from datamodules.orders import ClassAware, RepeatFactor
from datamodules.segmentation.data import SegmentationData
from datamodules.segmentation.folders import SegmentationFolders
from datamodules.segmentation.layouts import FolderLayout
from datamodules.segmentation.nuclei import StarDistNuclei
from datamodules.segmentation.shards import SegmentationShards
from datamodules.segmentation.synthetic import SyntheticSegmentation
from datamodules.segmentation.transforms import SegmentationEvalTransform, SegmentationTrainTransform
from datamodules.synthetic import SyntheticClassification
from datamodules.transforms import EvalTransform, TrainTransform
from datamodules.webdataset.data import ShardData
from datamodules.webdataset.detection import ImageObjectShards
from datamodules.webdataset.image_label import ImageLabelShards
from datamodules.webdataset.image_text import ImageTextShards
from datamodules.webdataset.segmentation import ImageMaskShards
from datamodules.webdataset.settings import Access, Shuffling
from datamodules.webdataset.sources import Shards

__all__ = [
    "Access",
    "ClassAware",
    "ClassificationBatch",
    "ClassificationData",
    "CocoDetection",
    "CrowdHumanDetection",
    "DeepForestTrees",
    "DetectionBatch",
    "DetectionData",
    "DetectionEvalBatch",
    "DetectionEvalTransform",
    "DetectionShards",
    "DetectionTrainTransform",
    "EvalTransform",
    "FashionMNIST",
    "FolderLayout",
    "ImageFolders",
    "ImageLabelShards",
    "ImageMaskShards",
    "ImageObjectShards",
    "ImageTextShards",
    "ListFiles",
    "LvisDetection",
    "MNIST5k",
    "Objects365Detection",
    "OpenImagesDetection",
    "PredictBatch",
    "RepeatFactor",
    "SegmentationBatch",
    "SegmentationData",
    "SegmentationEvalBatch",
    "SegmentationEvalTransform",
    "SegmentationFolders",
    "SegmentationShards",
    "SegmentationTrainTransform",
    "ShardData",
    "Shards",
    "Shuffling",
    "StarDistInstances",
    "StarDistNuclei",
    "SyntheticClassification",
    "SyntheticDetection",
    "SyntheticSegmentation",
    "TrainTransform",
    "ViewBatch",
    "VocDetection",
]
