"""Anchors: the boxes that a region proposal network starts from.

Shapes: A anchors per pixel, h_i w_i size of the i-th level.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# The authors pad each image to a multiple of this before the batch is padded to its largest image.
PADDING = 32


class Anchors:
    """One square and two oblong boxes around the corner of every pixel of every level.

    torchvision's anchors are rounded to whole pixels and stand on `image size // level size`, which is not the stride
    where a level's size was rounded up. These are neither.

    Args:
        strides: Input pixels per pixel of each level.
        scale: Side of the square anchor in strides.
        ratios: Height over width; the area stays.
    """

    def __init__(
        self, strides: Sequence[int], *, scale: float = 8.0, ratios: Sequence[float] = (0.5, 1.0, 2.0)
    ) -> None:
        self.strides = tuple(strides)
        self.scale = scale
        self.ratios = tuple(ratios)

    def __call__(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
        """Return the anchors of levels of size `(h_i, w_i)`: `(h_i * w_i * A, 4)` each, pixel by pixel."""
        ratios = torch.tensor(self.ratios, device=device).sqrt()
        unit = torch.stack([1 / ratios, ratios], -1) * self.scale / 2
        unit = torch.cat([-unit, unit], -1)  # (A, 4)
        levels = []
        for stride, (height, width) in zip(self.strides, shapes, strict=True):
            y, x = torch.meshgrid(
                torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
            )
            corner = torch.stack([x, y, x, y], -1).reshape(-1, 1, 4)
            levels.append(((corner + unit) * stride).flatten(0, 1))
        return levels

    def used(self, shapes: Sequence[tuple[int, int]], size: tuple[int, int], device: torch.device) -> list[Tensor]:
        """Return for each level which anchors, `(h_i * w_i * A,)` bool, take part in training for an image of `size`.

        Pixels that only the padding of the batch has do not, those of the padding to a multiple of 32 do.
        """
        padded = [-(-length // PADDING) * PADDING for length in size]
        levels = []
        for stride, shape in zip(self.strides, shapes, strict=True):
            rows, columns = (
                torch.arange(length, device=device) < -(-limit // stride)
                for length, limit in zip(shape, padded, strict=True)
            )
            pixels = (rows[:, None] & columns).flatten()
            levels.append(pixels.repeat_interleave(len(self.ratios)))
        return levels
