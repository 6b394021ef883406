"""The batches that datamodules yield and tasks consume: plain dicts with typed keys.

A TypedDict is a dict at run time, so collation, pinning, device transfer and DeepSpeed's dtype cast all accept it,
and a datamodule from another project only has to use the same keys.

Shapes: B batch, H W image size, N objects of an image.
"""

from typing import Any, NotRequired, TypedDict

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

# Mean and standard deviation of ImageNet's RGB in [0, 1]; `image` is normalised with them unless a transform says so.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ClassificationBatch(TypedDict):
    """What `tasks.Classification` trains and is evaluated on."""

    image: Tensor  # (B, 3, H, W) float32, normalised
    label: Tensor  # (B,) int64 in [0, num_classes)
    # (B,) bool, False for samples that only fill up an evaluation batch: they count nowhere. Without it, all count.
    valid: NotRequired[Tensor]


class PredictBatch(TypedDict):
    """What `tasks.Classification` predicts."""

    image: Tensor  # (B, 3, H, W) float32, normalised
    path: list[str]  # length B: where each image came from


class ImageTextBatch(TypedDict):
    """What `tasks.Pretraining` trains on and is evaluated on."""

    image: Tensor  # (B, 3, H, W) float32, normalised
    text: Tensor  # (B, L) int64 token ids, zero after the end
    text_length: Tensor  # (B,) int64, tokens of each text, those of its start and end included
    label: Tensor  # (B,) int64 in [0, num_classes), -1 where there is none
    source: Tensor  # (B,) int64, number of the data source
    valid: Tensor  # (B,) bool, False for samples that only fill up an evaluation batch
    key: list[str]  # length B: where each sample came from
    # A second random view of each image, for objectives that compare views.
    other_image: NotRequired[Tensor]  # (B, 3, H, W) float32, normalised
    # (B, 2, 5) float32: of both views top, left, height and width of the crop as shares of the whole image, and 1 where
    # it is flipped left and right.
    view: NotRequired[Tensor]


class RunLengths(TypedDict):
    """A mask as COCO's compressed run lengths, column by column."""

    size: list[int]  # height, width
    counts: bytes


class DetectionTarget(TypedDict):
    """Ground truth of one training image, for the detectors of `tasks.detection`; without crowds."""

    boxes: Tensor  # (N, 4) float32 xyxy, pixels of the padded image
    labels: Tensor  # (N,) int64 in [0, num_classes)
    masks: NotRequired[Tensor]  # (N, H, W) uint8, 1 inside the object, at the padded image's size


class DetectionTruth(TypedDict):
    """Ground truth of one evaluation image, in pixels of the original image; crowds too.

    NumPy, in COCO's own form and precision: the numbers stay on the host, and scores are those of the annotation file.
    """

    boxes: Array  # (N, 4) float64, left, top, width, height
    labels: Array  # (N,) int64 in [0, num_classes)
    areas: Array  # (N,) float64, of the mask where the data has one
    crowd: Array  # (N,) bool: detections inside count neither way
    masks: NotRequired[list[RunLengths]]  # N
    # Federated annotation (LVIS, Open Images): classes known to be absent, classes of which objects may lack a box.
    negative: NotRequired[list[int]]
    not_exhaustive: NotRequired[list[int]]


class DetectionBatch(TypedDict):
    """What `tasks.Detection` trains on."""

    image: Tensor  # (B, 3, H, W) float32, normalised, zero where padded; H and W are multiples of 32
    valid: list[tuple[int, int]]  # height and width of each image inside the padded one
    target: list[DetectionTarget]


class ImageView(TypedDict):
    """One more look at the images of a batch, for test-time augmentation."""

    image: Tensor  # (B, 3, h, w) as in the batch, at another scale
    valid: list[tuple[int, int]]
    flipped: bool  # left and right; what is padded is at the right and at the bottom all the same


class ViewBatch(TypedDict):
    """What `tasks.Detection` and `tasks.Segmentation` predict."""

    image: Tensor  # (B, 3, H, W) float32, normalised, zero where padded at the right and at the bottom
    valid: list[tuple[int, int]]  # height and width of each image inside the padded one
    original_size: list[tuple[int, int]]  # height and width of each image's file
    image_id: list[int | str]  # of the annotations; for predicted files, their number
    path: list[str]  # where each image came from
    views: NotRequired[list[ImageView]]


class DetectionEvalBatch(ViewBatch):
    """What `tasks.Detection` is evaluated on."""

    truth: list[DetectionTruth]


class SegmentationBatch(TypedDict):
    """What `tasks.Segmentation` trains on."""

    image: Tensor  # (B, 3, H, W) float32, normalised, zero where padded
    # (B, H, W) int64, as the losses need it: the class in [0, num_classes), or 255 where ignored or padded
    mask: Tensor


class SegmentationEvalBatch(ViewBatch):
    """What `tasks.Segmentation` is evaluated on."""

    truth: list[Array]  # (h, w) uint8 at the original size, the class or 255: NumPy, so that it stays on the host


class MaskTarget(TypedDict):
    """Ground truth of one training image for Mask2Former, where its masks are objects and not classes."""

    labels: Tensor  # (N,) int64 in [0, num_classes)
    masks: Tensor  # (N, H, W) bool or uint8, 1 inside, at the padded image's size


class MaskBatch(SegmentationBatch):
    """What `tasks.Segmentation` trains Mask2Former on, for instance and panoptic segmentation."""

    target: NotRequired[list[MaskTarget]]  # without it, one mask for each class in `mask`


class PanopticEvalBatch(SegmentationEvalBatch):
    """What `tasks.Segmentation` evaluates instances and segments on; a key of those that are not asked for may lack."""

    objects: NotRequired[list[DetectionTruth]]  # of things alone, with masks that may overlap
    # Of things and other classes, with masks that do not overlap; nothing counts where there is none.
    segments: NotRequired[list[DetectionTruth]]
