"""Bilinear samples by gathers, for the operators' references.

A table holds `(B, H, W, G * D)` features with a border of zeros: one row of D channels per (image, pixel, group). The
border makes all four corners of a point between -1 and the size readable.

Shapes: B batch, H W size, G groups, D channels per group. Points are `(B, ..., G)`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Slopes(NamedTuple):
    """Derivatives of a point's sample: by its weight, and per unit of weight by its coordinates; 0 for a void point."""

    weight: Tensor
    y: Tensor
    x: Tensor


class Corners(NamedTuple):
    """Where points read; tensors have the shape of the points."""

    rows: tuple[Tensor, Tensor, Tensor, Tensor]  # of the table: top left, top right, bottom left, bottom right
    dx: Tensor  # distance from the left column, [0, 1)
    dy: Tensor  # distance from the top row, [0, 1)
    inside: Tensor  # False where the point contributes nothing

    def gather(self, table: Tensor, weight: Tensor) -> Tensor:
        """Return samples times the points' weights, `(B, ..., G, D)`."""
        out = table.new_zeros(())
        for rows, share in zip(self.rows, self._weights(weight), strict=True):
            out = out + share.unsqueeze(-1) * F.embedding(rows, table)
        return out

    def scatter(self, table: Tensor, weight: Tensor, grad: Tensor) -> None:
        """Add to `table` what `gather`'s gradient is for `grad`, `(B, ..., G, D)`."""
        depth = grad.shape[-1]
        for rows, share in zip(self.rows, self._weights(weight), strict=True):
            # Element by element: whole rows at once take a sort on CPUs, which crawls when cores are busy.
            elements = rows.unsqueeze(-1) * depth + torch.arange(depth, device=rows.device)
            table.view(-1).scatter_add_(0, elements.flatten(), (share.unsqueeze(-1) * grad).flatten())

    def slopes(self, table: Tensor, grad: Tensor) -> Slopes:
        """Return the derivatives of the sum over channels of `grad` times the samples."""
        top_left, top_right, bottom_left, bottom_right = (
            (grad * F.embedding(rows, table)).sum(-1) for rows in self.rows
        )
        top = top_left + self.dx * (top_right - top_left)
        bottom = bottom_left + self.dx * (bottom_right - bottom_left)
        left = top_left + self.dy * (bottom_left - top_left)
        right = top_right + self.dy * (bottom_right - top_right)
        found = (top + self.dy * (bottom - top), bottom - top, right - left)
        return Slopes(*(torch.where(self.inside, slope, 0) for slope in found))

    def _weights(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bilinear weights of the four corners times the points' own weights."""
        weight = torch.where(self.inside, weight, 0)
        bottom = weight * self.dy
        top = weight - bottom
        return top * (1 - self.dx), top * self.dx, bottom * (1 - self.dx), bottom * self.dx


def to_table(features: Tensor, groups: int) -> Tensor:
    """Return the table of `(B, H, W, G * D)` features, `(B * (H + 2) * (W + 2) * G, D)`."""
    return F.pad(features, (0, 0, 1, 1, 1, 1)).reshape(-1, features.shape[-1] // groups)


def from_table(table: Tensor, shape: Sequence[int]) -> Tensor:
    """Return what lies within the border, a view of `shape` (B, H, W, G * D)."""
    batch, height, width, channels = shape
    return table.view(batch, height + 2, width + 2, channels)[:, 1:-1, 1:-1]


def locate(y: Tensor, x: Tensor, height: int, width: int) -> Corners:
    """Find the corners of points.

    A point with a coordinate <= -1, >= the size or not finite contributes nothing. At whole-number coordinates the
    derivative is the right-hand one.

    Args:
        y: Coordinates in pixels, `(B, ..., G)`; 0 is the centre of the first row.
        x: Likewise.
        height: H.
        width: W.
    """
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    # Selecting before the arithmetic keeps NaN and infinity out of the gradients too.
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    top, left = y.detach().floor(), x.detach().floor()
    batch, groups = y.shape[0], y.shape[-1]
    image = torch.arange(batch, device=y.device).view(-1, *[1] * (y.dim() - 1))
    group = torch.arange(groups, device=y.device)
    rows = []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row = (image * (height + 2) + top.long() + (1 + down)) * (width + 2) + left.long() + (1 + right)
        rows.append(torch.where(inside, row, 0) * groups + group)
    return Corners((rows[0], rows[1], rows[2], rows[3]), x - left, y - top, inside)
