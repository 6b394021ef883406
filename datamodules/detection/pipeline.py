"""The one place in detection that knows albumentations: settings become functions on images, boxes and masks.

A plan (sizes, crop, flip) is drawn first and then carried out, on the image and the boxes at once and on the masks of
the boxes that are left. Masks stay run lengths until then: as bitmaps, those of one photograph take tens of megabytes.

Shapes: H W size of the original image, h w of the resized one, N objects.
"""

import os
import random
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.batch import Array, RunLengths
from datamodules.detection.records import Objects
from datamodules.detection.rle import decode
from datamodules.detection.transforms import (
    DetectionEvalTransform,
    DetectionTrainTransform,
    PixelChange,
    RandomCrop,
    resized,
)
from datamodules.views import View

# albumentations otherwise asks the package index for a newer version, with a two-second wait, at import.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A
import cv2

# Crops that are tried until one shows an object. After that the whole image is taken.
MAX_CROPS = 50


class TrainSample(TypedDict):
    """One image of a `DetectionBatch`, not padded."""

    image: Tensor  # (3, h, w) float32, normalised
    boxes: Tensor  # (N, 4) float32 xyxy, pixels of `image`
    labels: Tensor  # (N,) int64
    masks: NotRequired[Tensor]  # (N, h, w) uint8


@dataclass(frozen=True)
class Plan:
    """What is done to one image, in this order: resize and crop, where there is a crop; resize; flip."""

    size: tuple[int, int]  # height and width of the result, pixels
    flip: bool = False
    before_crop: tuple[int, int] | None = None  # height and width
    crop: tuple[int, int, int, int] | None = None  # left, top, right, bottom, in pixels of `before_crop`

    def steps(self, interpolation: int) -> list[A.BasicTransform]:
        """Return the plan as albumentations transforms without chance."""
        steps: list[A.BasicTransform] = []
        if self.before_crop is not None and self.crop is not None:
            steps += [A.Resize(*self.before_crop, interpolation=interpolation), A.Crop(*self.crop)]
        steps.append(A.Resize(*self.size, interpolation=interpolation))
        return [*steps, A.HorizontalFlip(p=1.0)] if self.flip else steps


class TrainPipeline:
    """Draw a plan and carry it out.

    Args:
        settings: What may be drawn.
        masks: Whether samples have masks.

    Raises:
        ValueError: `settings.pixels` names something that is no pixel transform of albumentations.
    """

    def __init__(self, settings: DetectionTrainTransform, *, masks: bool) -> None:
        self.settings, self.masks = settings, masks
        self._pixels = A.Compose([_pixel_change(change) for change in settings.pixels])

    def __call__(self, image: Image.Image, objects: Objects, seed: np.random.SeedSequence) -> TrainSample:
        """Turn an RGB image and its objects into a sample; crowds are left out. `seed` decides all that is drawn."""
        objects = objects.select(~objects.crowd)
        pixels, boxes = np.asarray(image), _corners(objects.boxes)
        plan_seed, pixel_seed = (int(word) for word in seed.generate_state(2))
        plan = draw_plan(self.settings, image.height, image.width, boxes, np.random.default_rng(plan_seed))
        if self.settings.pixels:
            self._pixels.set_random_state(np.random.default_rng(pixel_seed), random.Random(pixel_seed))
            pixels = self._pixels(image=pixels)["image"]
        pixels, boxes, kept = apply_plan(plan, pixels, boxes, self.settings.min_box_size)
        sample = TrainSample(
            image=normalised(pixels, self.settings.mean, self.settings.std),
            boxes=torch.from_numpy(boxes),
            labels=torch.from_numpy(objects.labels[kept]),
        )
        if self.masks:
            assert objects.masks is not None
            sample["masks"] = torch.from_numpy(apply_to_masks(plan, [objects.masks[index] for index in kept]))
        return sample


class EvalPipeline:
    """Resize, and for test-time augmentation resize and flip in several ways.

    Args:
        settings: The sizes.
    """

    def __init__(self, settings: DetectionEvalTransform) -> None:
        self.settings = settings
        sizes = ((settings.short_side, settings.long_side), *settings.extra_sizes)
        flips = (False, True) if settings.extra_flip else (False,)
        self._views = [(size, flip) for size in sizes for flip in flips]

    def __call__(self, image: Image.Image) -> list[View]:
        """Return the views of an RGB image; the first is the plain one, of `short_side` and `long_side`."""
        pixels, views = np.asarray(image), []
        for limits, flip in self._views:
            plan = Plan(resized(image.height, image.width, *limits), flip)
            changed = A.Compose(plan.steps(cv2.INTER_LINEAR))(image=pixels)["image"]
            views.append(View(image=normalised(changed, self.settings.mean, self.settings.std), flipped=flip))
        return views


def draw_plan(
    settings: DetectionTrainTransform, height: int, width: int, boxes: Array, random: np.random.Generator
) -> Plan:
    """Draw what happens to an image of `height` x `width` pixels with `boxes` `(N, 4)` xyxy."""
    flip = bool(random.random() < settings.flip)
    crop = settings.crop
    if crop is not None and random.random() < crop.probability:
        for _ in range(MAX_CROPS):
            plan = _draw_crop(settings, crop, height, width, flip, random)
            if crop.keep_empty or len(boxes) == 0 or _is_any_left(plan, height, width, boxes, settings.min_box_size):
                return plan
    return Plan(resized(height, width, _draw_side(settings, random), settings.long_side), flip)


def apply_plan(plan: Plan, pixels: Array, boxes: Array, min_box_size: float) -> tuple[Array, Array, Array]:
    """Carry out a plan on an image and its boxes.

    Args:
        plan: Made for this image.
        pixels: `(H, W, 3)` uint8.
        boxes: `(N, 4)` float64 xyxy, pixels; what lies outside of the image is cut off.
        min_box_size: Boxes whose width or height is less in the end are dropped, pixels.

    Returns:
        Image `(h, w, 3)` uint8, boxes `(M, 4)` float32 xyxy, and which of the N they are, `(M,)` int64.
    """
    # `clip` and `filter_invalid_bboxes`, since a box on the border or without extent is otherwise an error. The size
    # is that of the result, so nothing is dropped in between.
    rules = A.BboxParams(
        format="pascal_voc",
        label_fields=["index"],
        clip=True,
        filter_invalid_bboxes=True,
        min_width=min_box_size,
        min_height=min_box_size,
        check_each_transform=False,
    )
    done = A.Compose(plan.steps(cv2.INTER_LINEAR), bbox_params=rules)(
        image=pixels, bboxes=boxes, index=np.arange(len(boxes))
    )
    # albumentations returns the numbers of the boxes as floats.
    kept = np.asarray(done["index"], dtype=np.int64).reshape(-1)
    return done["image"], np.asarray(done["bboxes"], dtype=np.float32).reshape(-1, 4), kept


def apply_to_masks(plan: Plan, masks: list[RunLengths]) -> Array:
    """Carry out a plan on masks of the original image, nearest neighbour: `(N, h, w)` uint8."""
    steps = A.Compose(plan.steps(cv2.INTER_NEAREST))
    changed = np.zeros((len(masks), *plan.size), dtype=np.uint8)
    for target, mask in zip(changed, masks, strict=True):
        target[:] = steps(image=decode(mask)[..., None])["image"][..., 0]
    return changed


def normalised(pixels: Array, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """Turn `(h, w, 3)` uint8 into `(3, h, w)` float32: in [0, 1], minus `mean`, over `std`."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
    return tensor.div_(255).sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1))


def _draw_side(settings: DetectionTrainTransform, random: np.random.Generator) -> int:
    if settings.choose == "between":
        low, high = settings.short_sides
        return int(random.integers(low, high + 1))
    return int(random.choice(settings.short_sides))


def _draw_crop(
    settings: DetectionTrainTransform,
    crop: RandomCrop,
    height: int,
    width: int,
    flip: bool,
    random: np.random.Generator,
) -> Plan:
    before = resized(height, width, int(random.choice(crop.short_sides)), crop.long_side)
    # First the sides, then the place, each uniform: mmdet's `absolute_range`.
    sides = [int(random.integers(min(crop.sides[0], side), min(crop.sides[1], side) + 1)) for side in before]
    top, left = (int(random.integers(whole - part + 1)) for whole, part in zip(before, sides, strict=True))
    rectangle = (left, top, left + sides[1], top + sides[0])
    size = resized(sides[0], sides[1], _draw_side(settings, random), settings.long_side)
    return Plan(size, flip, before, rectangle)


def _is_any_left(plan: Plan, height: int, width: int, boxes: Array, min_box_size: float) -> bool:
    """Whether a box `(N, 4)` of the original image is at least `min_box_size` wide and high after the plan."""
    assert plan.before_crop is not None
    assert plan.crop is not None
    left, top, right, bottom = plan.crop
    to_crop = np.array([plan.before_crop[1] / width, plan.before_crop[0] / height])
    to_result = np.array([plan.size[1] / (right - left), plan.size[0] / (bottom - top)])
    low = np.maximum(boxes[:, :2] * to_crop, [left, top])
    high = np.minimum(boxes[:, 2:] * to_crop, [right, bottom])
    # The pipeline computes in float32, whose rounding must not turn a box that was found here into none.
    return bool(((high - low) * to_result >= min_box_size + 1e-2).all(1).any())


def _corners(boxes: Array) -> Array:
    corners: Array = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return corners


def _pixel_change(change: PixelChange) -> A.BasicTransform:
    kind = getattr(A, change.name, None)
    if not (isinstance(kind, type) and issubclass(kind, A.ImageOnlyTransform)):
        raise ValueError(
            f"PixelChange: name={change.name!r}, expected a class of albumentations that changes pixels where they are "
            "(an ImageOnlyTransform), such as ColorJitter."
        )
    return kind(**change.options)
