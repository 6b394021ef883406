"""The one place in segmentation that knows albumentations: settings become functions on images and masks.

Shapes: H W size of the original image, h w of the result.
"""

import os
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from datamodules.batch import Array
from datamodules.detection.pipeline import normalised
from datamodules.detection.transforms import resized
from datamodules.segmentation.distortion import distort
from datamodules.segmentation.records import IGNORE
from datamodules.segmentation.transforms import SegmentationEvalTransform, SegmentationTrainTransform
from datamodules.views import View

# albumentations otherwise asks the package index for a newer version, with a two-second wait, at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A
import cv2

# Crops that are looked at for a variety of classes. The next one is taken as it is.
MAX_CROPS = 10


class TrainSample(TypedDict):
    """One row of a `SegmentationBatch`."""

    image: Tensor  # (3, h, w) float32, normalised
    mask: Tensor  # (h, w) uint8


class TrainPipeline:
    """Resize, crop, flip, change colours and pad.

    Args:
        settings: What may be drawn.
    """

    def __init__(self, settings: SegmentationTrainTransform) -> None:
        self.settings = settings

    def __call__(self, image: Image.Image, mask: Array, seed: np.random.SeedSequence) -> TrainSample:
        """Turn an RGB image and its labels `(H, W)` uint8 into a sample; `seed` decides all that is drawn."""
        settings, random = self.settings, np.random.default_rng(seed)
        ratio = random.uniform(*settings.ratio)
        limits = (max(1, int(settings.short_side * ratio)), max(1, int(settings.long_side * ratio)))
        size = resized(image.height, image.width, *limits)
        whole = _resize(size)(image=np.asarray(image), mask=mask)
        crop = draw_crop(whole["mask"], settings.crop, settings.cat_max_ratio, random)
        steps: list[A.BasicTransform] = [A.Crop(*crop)]
        if random.random() < settings.flip:
            steps.append(A.HorizontalFlip(p=1.0))
        part = A.Compose(steps)(image=whole["image"], mask=whole["mask"])
        pixels = distort(np.ascontiguousarray(part["image"]), random) if settings.distortion else part["image"]
        # After the normalisation, so that it is the mean colour.
        image_tensor = normalised(pixels, settings.mean, settings.std)
        missing = (0, settings.crop[1] - pixels.shape[1], 0, settings.crop[0] - pixels.shape[0])
        return TrainSample(
            image=F.pad(image_tensor, missing),
            mask=F.pad(torch.from_numpy(np.ascontiguousarray(part["mask"])), missing, value=IGNORE),
        )


class EvalPipeline:
    """Resize, and for test-time augmentation resize and flip in several ways.

    Args:
        settings: The sizes.
    """

    def __init__(self, settings: SegmentationEvalTransform) -> None:
        self.settings = settings
        flips = (False, True) if settings.extra_flip else (False,)
        self._views = [(scale, flip) for scale in (1.0, *settings.extra_scales) for flip in flips]

    def __call__(self, image: Image.Image) -> list[View]:
        """Return the views of an RGB image; the first is the plain one, of `short_side` and `long_side`."""
        settings, pixels, views = self.settings, np.asarray(image), []
        for scale, flip in self._views:
            limits = (int(settings.short_side * scale), int(settings.long_side * scale))
            size = resized(image.height, image.width, *limits)
            steps: list[A.BasicTransform] = [A.Resize(*size, interpolation=cv2.INTER_LINEAR)]
            if settings.multiple is not None:
                # Twice, as the authors do: once would give other pixels.
                sides = (-(-side // settings.multiple) * settings.multiple for side in size)
                steps.append(A.Resize(*sides, interpolation=cv2.INTER_LINEAR))
            if flip:
                steps.append(A.HorizontalFlip(p=1.0))
            changed = A.Compose(steps)(image=pixels)["image"]
            views.append(View(image=normalised(changed, settings.mean, settings.std), flipped=flip))
        return views


def draw_crop(
    mask: Array, size: tuple[int, int], cat_max_ratio: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a part of labels `(H, W)` of at most `size` (height, width): left, top, right, bottom.

    One that is wholly of one class, or of which one class covers `cat_max_ratio` or more, pixels to ignore aside, is
    drawn again, up to `MAX_CROPS` times.
    """
    sides = [min(limit, length) for limit, length in zip(size, mask.shape, strict=True)]
    for attempt in range(MAX_CROPS + 1):
        top, left = (int(random.integers(whole - part + 1)) for whole, part in zip(mask.shape, sides, strict=True))
        bottom, right = top + sides[0], left + sides[1]
        if cat_max_ratio == 1 or attempt == MAX_CROPS or _is_varied(mask[top:bottom, left:right], cat_max_ratio):
            break
    return left, top, right, bottom


def _is_varied(mask: Array, cat_max_ratio: float) -> bool:
    counts = np.bincount(mask.ravel(), minlength=IGNORE + 1)[:IGNORE]
    return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio)


def _resize(size: tuple[int, int]) -> A.Compose:
    return A.Compose([A.Resize(*size, interpolation=cv2.INTER_LINEAR, mask_interpolation=cv2.INTER_NEAREST)])
