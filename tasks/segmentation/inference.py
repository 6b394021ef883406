"""From scores at every pixel to a map of classes on the original image.

The authors' order, which makes a difference when several looks at an image are averaged: scores are averaged over
sliding windows, cut to the image, resized to the original, and turned into probabilities by a softmax; these are
averaged over flips and scales. Mask2Former's scores are probabilities already, and get the softmax too.

Shapes: B batch, K classes, H W size of the image, h w size of the original.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.batch import ImageView, ViewBatch
from tasks.segmentation.layers import resize

# From images (B, 3, H, W) to scores (B, K, H, W), as `PixelSegmentor.scores`.
Scorer = Callable[[Tensor], Tensor]

# Classes that are resized to the original at once where only the best is wanted: of 150, all would take gigabytes.
_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class SlidingWindow:
    """Score an image by overlapping windows of one size; where they overlap, scores are averaged.

    The last window of a row or column is moved back so that it ends with the image. A smaller image is one window.

    Args:
        crop: Height and width of a window in pixels; the size that the model was trained on.
        stride: Vertical and horizontal distance of windows in pixels, at most the crop.
        device: Where the scores of the whole image are added up, for example "cpu" where they do not fit beside the
            model; otherwise on the model's.

    Raises:
        ValueError: A size is not positive, or windows would leave gaps.
    """

    crop: tuple[int, int]
    stride: tuple[int, int]
    device: str | None = None

    def __post_init__(self) -> None:
        for crop, stride in zip(self.crop, self.stride, strict=True):
            if not 0 < stride <= crop:
                raise ValueError(
                    f"SlidingWindow: crop is {self.crop} and stride {self.stride}, expected positive numbers and a "
                    "stride of at most the crop: a larger one leaves pixels without a score."
                )

    @torch.no_grad()
    def scores(self, scorer: Scorer, image: Tensor) -> Tensor:
        """Map `(B, 3, H, W)` to scores `(B, K, H, W)`, float32, holding one window of each image at a time."""
        size = image.shape[-2:]
        rows, columns = (_windows(*sides) for sides in zip(size, self.crop, self.stride, strict=True))
        total = None
        for row in rows:
            for column in columns:
                scores = scorer(image[..., row, column]).float()
                if total is None:
                    total = scores.new_zeros(*scores.shape[:2], *size, device=self.device or scores.device)
                total[..., row, column] += scores.to(total.device)
        assert total is not None
        return total.div_(_coverage(rows, size[0], total)[:, None] * _coverage(columns, size[1], total))


class View(NamedTuple):
    """One look at the images of a batch.

    Fields:
        image: `(B, 3, H, W)`, normalised.
        flipped: Whether left and right are swapped in it.
    """

    image: Tensor
    flipped: bool = False


@dataclass(frozen=True, kw_only=True)
class TestTime:
    """Average the probabilities of several looks at each image.

    The image is enlarged as it stands in the batch. The authors resize the file for each scale, which keeps details
    that the evaluation transform has smoothed away.

    Args:
        scales: Factors on the sides of the image.
        flip: Look at the mirror image of each scale too.
        divisor: Sides are rounded up to a multiple of this many pixels.

    Raises:
        ValueError: A scale or the divisor is not positive, or there is no scale.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    divisor: int = 32

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0 or self.divisor < 1:
            raise ValueError(
                f"TestTime: scales are {self.scales} and divisor {self.divisor}, expected positive numbers, and at "
                "least one scale."
            )

    def views(self, image: Tensor) -> Iterator[View]:
        """Yield the looks at images `(B, 3, H, W)`, one after another."""
        for scale in self.scales:
            # To whole pixels first: 1.1 * 1600 is a little more than 1760.
            sides = (round(side * scale) for side in image.shape[-2:])
            scaled = resize(image, [-(-side // self.divisor) * self.divisor for side in sides])
            yield View(scaled)
            if self.flip:
                yield View(scaled.flip(-1), flipped=True)


@torch.no_grad()
def segment(
    scorer: Scorer,
    batch: ViewBatch,
    *,
    window: SlidingWindow | None = None,
    test_time: TestTime | None = None,
) -> list[Tensor]:
    """Return the most probable class at every pixel of each original image of a batch, over its views if it has some.

    Args:
        scorer: Of the model, for example `UPerNet.scores`.
        batch: A flipped view was flipped before it was padded to the right.
        window: Score by sliding windows, not the whole image at once.
        test_time: Make views of the batch's image.

    Returns:
        Class maps `(h, w)` int64.

    Raises:
        ValueError: The batch has views, and `test_time` would make more.
    """
    if "views" not in batch:
        sizes = batch["valid"], batch["original_size"]
        return class_maps(scorer, batch["image"], *sizes, window=window, test_time=test_time)
    if test_time is not None:
        raise ValueError(
            f"TestTime: the data gives {1 + len(batch['views'])} views of each image already, and {test_time} would "
            "make views of its own. Take one of the two."
        )
    if window is not None:
        scorer = partial(window.scores, scorer)
    views = [ImageView(image=batch["image"], valid=batch["valid"], flipped=False), *batch["views"]]
    maps = []
    for place, size in enumerate(batch["original_size"]):
        cut = (_cut(view, place) for view in views)
        maps.append(mean_probabilities(scorer, cut, size)[0].argmax(0))
    return maps


@torch.no_grad()
def class_maps(
    scorer: Scorer,
    image: Tensor,
    sizes: Sequence[tuple[int, int]],
    original_sizes: Sequence[tuple[int, int]],
    *,
    window: SlidingWindow | None = None,
    test_time: TestTime | None = None,
) -> list[Tensor]:
    """Return the most probable class at every pixel of each original image, `(h, w)` int64.

    Args:
        scorer: Of the model, for example `UPerNet.scores`.
        image: `(B, 3, H, W)`, normalised, the images in the upper left corner where they are padded.
        sizes: (height, width) of each image in the padded one.
        original_sizes: (height, width) of each file.
        window: Score by sliding windows, not the whole image at once.
        test_time: Average over flips and scales, image by image.
    """
    if window is not None:
        scorer = partial(window.scores, scorer)
    if test_time is None:
        batch = scorer(image)
        cut = (scores[:, :height, :width] for scores, (height, width) in zip(batch, sizes, strict=True))
        return [best_class(scores, original) for scores, original in zip(cut, original_sizes, strict=True)]
    maps = []
    for one, (height, width), original in zip(image, sizes, original_sizes, strict=True):
        views = test_time.views(one[None, :, :height, :width])
        maps.append(mean_probabilities(scorer, views, original)[0].argmax(0))
    return maps


def mean_probabilities(scorer: Scorer, views: Iterable[View], size: Sequence[int]) -> Tensor:
    """Return the probabilities `(B, K, h, w)` on the original images of `size`, averaged over views of them."""
    total, count = None, 0
    for view in views:
        probabilities = resize(scorer(view.image), size).softmax(1)
        if view.flipped:
            probabilities = probabilities.flip(-1)
        total = probabilities if total is None else total.add_(probabilities)
        count += 1
    assert total is not None
    return total.div_(count)


def best_class(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Resize scores `(K, H, W)` to `size` and return the class of the greatest at each pixel, `(h, w)` int64.

    A softmax would not change which is the greatest, so there is none.
    """
    best = label = None
    for start in range(0, len(scores), _CHUNK):
        value, index = resize(scores[None, start : start + _CHUNK], size)[0].max(0)
        index += start
        if best is None or label is None:
            best, label = value, index
        else:
            # Equal scores: the first class, as argmax has it.
            label = torch.where(value > best, index, label)
            best = torch.maximum(best, value)
    assert label is not None
    return label


def _cut(view: ImageView, place: int) -> View:
    height, width = view["valid"][place]
    return View(view["image"][place : place + 1, :, :height, :width], view["flipped"])


def _windows(length: int, crop: int, stride: int) -> list[slice]:
    count = max(length - crop + stride - 1, 0) // stride + 1
    ends = (min(number * stride + crop, length) for number in range(count))
    return [slice(max(end - crop, 0), end) for end in ends]


def _coverage(windows: Sequence[slice], length: int, like: Tensor) -> Tensor:
    """Count the windows over each of `length` pixels."""
    count = like.new_zeros(length)
    for window in windows:
        count[window] += 1
    return count
