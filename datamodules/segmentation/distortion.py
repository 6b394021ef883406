"""Random changes of colour: mmseg's photometric distortion, with its order, ranges and rounding.

albumentations' ColorJitter has another order, other ranges and other arithmetic.

Shapes: H W size of the image.
"""

import cv2
import numpy as np

from datamodules.batch import Array

# Added to all values.
BRIGHTNESS = 32.0
# What values and saturations are multiplied by.
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
# Added to hues, which are half degrees: from -HUE to below HUE.
HUE = 18
_NUM_HUES = 180


def distort(pixels: Array, random: np.random.Generator) -> Array:
    """Change brightness, contrast, saturation and hue of `(H, W, 3)` uint8 RGB, each with probability 1/2.

    Contrast comes second or last, either with probability 1/2.
    """
    if random.integers(2):
        pixels = cv2.LUT(pixels, _line(1.0, random.uniform(-BRIGHTNESS, BRIGHTNESS)))
    contrast_second = bool(random.integers(2))
    if contrast_second:
        pixels = _change_contrast(pixels, random)
    if random.integers(2):
        pixels = _change_hsv(pixels, 1, _line(random.uniform(*SATURATION), 0.0))
    if random.integers(2):
        pixels = _change_hsv(pixels, 0, _rotation(int(random.integers(-HUE, HUE))))
    return pixels if contrast_second else _change_contrast(pixels, random)


def _change_contrast(pixels: Array, random: np.random.Generator) -> Array:
    if not random.integers(2):
        return pixels
    changed: Array = cv2.LUT(pixels, _line(random.uniform(*CONTRAST), 0.0))
    return changed


def _change_hsv(pixels: Array, channel: int, table: Array) -> Array:
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = cv2.LUT(np.ascontiguousarray(hsv[..., channel]), table)
    changed: Array = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return changed


def _line(factor: float, offset: float) -> Array:
    """Return `value * factor + offset` of each value, `(256,)` uint8, rounded towards 0."""
    values: Array = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return values.clip(0, 255).astype(np.uint8)


def _rotation(shift: int) -> Array:
    return ((np.arange(256) + shift) % _NUM_HUES).astype(np.uint8)
