"""Two images in one, cell by cell, after MixMIM (arXiv:2205.13137).

Shapes: B batch, H W image size, N tokens of an image, V those of them that show one of its two images.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Side of a cell in pixels: the stride of the last stage, so that no token there sees two images in its own patch.
CELL = 32


class Mixed(NamedTuple):
    """Images of which each shows cells of itself and of its partner."""

    image: Tensor  # (B, 3, H, W)
    own: Tensor  # (B, N - V) int64, the tokens that show the image itself, ascending
    partner: Tensor  # (B, V) int64, those that show its partner, ascending
    share: float  # V / N, the same in all images


def of_partner(x: Tensor) -> Tensor:
    """Give each row what its partner has: the row before it, inside the process; the first takes the last."""
    return x.roll(1, 0)


def mix(image: Tensor, ratio: float, stride: int) -> Mixed:
    """Replace cells of each image by those of its partner; which ones is drawn for each image.

    Args:
        image: `(B, 3, H, W)`.
        ratio: Share of the partner in (0, 1), rounded to whole cells, of which each of the two keeps at least one.
        stride: Pixels of a token's side; divides a cell's.

    Raises:
        ValueError: The image is not made of whole cells, or of fewer than two.
    """
    height, width = image.shape[2] // CELL, image.shape[3] // CELL
    cells = height * width
    if image.shape[2] % CELL or image.shape[3] % CELL or cells < 2:
        raise ValueError(
            f"mix: the images are {tuple(image.shape[2:])} pixels, expected sides divisible by {CELL} and at least two "
            f"cells of {CELL} x {CELL}. Change image_size of the data."
        )
    assert CELL % stride == 0
    count = min(max(round(ratio * cells), 1), cells - 1)
    chosen = torch.rand(len(image), cells, device=image.device).argsort(1)[:, :count]
    taken = torch.zeros(len(image), cells, dtype=torch.bool, device=image.device).scatter_(1, chosen, True)
    taken = taken.view(-1, height, width)
    # A sort that keeps the order puts the image's own tokens first.
    order = _enlarge(taken, CELL // stride).flatten(1).to(torch.uint8).argsort(stable=True)
    num_own = (cells - count) * (CELL // stride) ** 2
    mixed = torch.where(_enlarge(taken, CELL)[:, None], of_partner(image), image)
    return Mixed(mixed, order[:, :num_own], order[:, num_own:], count / cells)


def _enlarge(cells: Tensor, factor: int) -> Tensor:
    return cells.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
