"""Which part of an image is taken: a function of random numbers, without pixels."""

import math
from collections.abc import Sequence
from typing import NamedTuple

NUM_ATTEMPTS = 10
# Random numbers of a crop: area and shape of each attempt, place, flip.
NUM_NUMBERS = 2 * NUM_ATTEMPTS + 3


class Crop(NamedTuple):
    """A rectangle of an image, pixels, and whether it is flipped left and right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool

    def shares(self, height: float, width: float) -> tuple[float, float, float, float, float]:
        """Return top, left, height and width as shares of an image of that size, and 1 where flipped."""
        top, left = self.top / height, self.left / width
        return top, left, min(self.height / height, 1 - top), min(self.width / width, 1 - left), float(self.flip)

    def reduced(self, factor: int, height: int, width: int) -> "Crop":
        """Return the crop in pixels of the image decoded `factor` times smaller, to `height` and `width`."""
        top, left = min(round(self.top / factor), height - 1), min(round(self.left / factor), width - 1)
        bottom = min(max(round((self.top + self.height) / factor), top + 1), height)
        right = min(max(round((self.left + self.width) / factor), left + 1), width)
        return Crop(top, left, bottom - top, right - left, self.flip)


def random_crop(
    numbers: Sequence[float],
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
) -> Crop:
    """Return a crop by the rule of timm's RandomResizedCropAndInterpolation.

    Area uniform, width over height uniform in its logarithm; if ten such do not fit, the largest centre crop whose
    shape is allowed.

    Args:
        numbers: `NUM_NUMBERS` of [0, 1).
        height: Of the image, pixels.
        width: Of the image, pixels.
        scale: Range of the crop's area as a share of the image's.
        ratio: Range of the crop's width over its height.
        flip: Probability of a flip.
    """
    place = numbers[2 * NUM_ATTEMPTS :]
    flipped = place[2] < flip
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(NUM_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[2 * attempt])
        shape = math.exp(low + (high - low) * numbers[2 * attempt + 1])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1))
            return Crop(top, left, h, w, flipped)
    # A side is at least a pixel, however thin the image.
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return Crop((height - h) // 2, (width - w) // 2, h, w, flipped)
