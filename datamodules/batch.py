"""The batches that datamodules yield and tasks consume: plain dicts with typed keys.

A TypedDict is a dict at run time, so collation, pinning, device transfer and DeepSpeed's dtype cast all accept it,
and a datamodule from another project only has to use the same keys.

Shapes: B batch, H W image size, N objects of an image.
"""

from typing import NotRequired, TypedDict

from torch import Tensor

# Mean and standard deviation of ImageNet's RGB in [0, 1]; `image` is normalised with them unless a transform says so.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ClassificationBatch(TypedDict):
    """What `tasks.Classification` trains and is evaluated on."""

    image: Tensor  # (B, 3, H, W) float32, normalised
    label: Tensor  # (B,) int64 in [0, num_classes)


class PredictBatch(TypedDict):
    """What `tasks.Classification` predicts."""

    image: Tensor  # (B, 3, H, W) float32, normalised
    path: list[str]  # length B: where each image came from


class DetectionTarget(TypedDict):
    """Ground truth of one image, for the detectors of `tasks.detection`."""

    boxes: Tensor  # (N, 4) float32 xyxy, pixels of the padded image
    labels: Tensor  # (N,) int64 in [0, num_classes)
    masks: NotRequired[Tensor]  # (N, H, W) uint8, 1 inside the object, at the padded image's size
