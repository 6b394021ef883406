"""Where the tokens of one view lie in another view of the same image, after SiameseIM (arXiv:2206.01204).

A view is a crop, flipped or not, as `ImageTextBatch.view` says. Both views have the same number of tokens.

Shapes: B batch, h w tokens of a view, N = h * w, D channels.
"""

import torch
from torch import Tensor

# The sizes of two crops differ by a factor near 1, so its logarithm is stretched to the range of the positions.
LOG_SIZE_FACTOR = 10.0
_LONGEST_PERIOD = 10000.0


def grid_positions(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return row and column of each token, `(N, 2)` float32, row by row."""
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    return torch.cartesian_prod(rows, columns)


def relative_positions(view: Tensor, other: Tensor, height: int, width: int) -> Tensor:
    """Return where the tokens of `other` lie among those of `view`.

    Args:
        view: `(B, 5)`: top, left, height and width of the crop as shares of the whole image, and 1 if it is flipped.
        other: `(B, 5)`, of the same images.
        height: Rows of tokens, h.
        width: Columns of tokens, w.

    Returns:
        `(B, N, 4)` float32: row and column, counted in tokens of `view` from the centre of its first one, and how much
        higher and wider a token of `other` is, as `LOG_SIZE_FACTOR * log(ratio)`.
    """
    view, other = view.float(), other.float()
    centres = (grid_positions(height, width, view.device) + 0.5) / view.new_tensor([height, width])
    centres = _flip(centres.expand(len(view), -1, -1), other)
    # In shares of the whole image, then of `view`.
    centres = other[:, None, 0:2] + centres * other[:, None, 2:4]
    centres = _flip((centres - view[:, None, 0:2]) / view[:, None, 2:4], view)
    positions = centres * view.new_tensor([height, width]) - 0.5
    sizes = LOG_SIZE_FACTOR * (other[:, None, 2:4] / view[:, None, 2:4]).log()
    return torch.cat([positions, sizes.expand_as(positions)], -1)


def sincos(positions: Tensor, dim: int) -> Tensor:
    """Map `(..., n)` numbers to sines and cosines of geometric frequencies, `(..., n * dim)`; `dim` is even."""
    steps = torch.arange(dim // 2, dtype=torch.float32, device=positions.device) / (dim // 2)
    angles = positions[..., None] * _LONGEST_PERIOD**-steps
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def _flip(centres: Tensor, view: Tensor) -> Tensor:
    """Mirror the columns of `(B, N, 2)` points in [0, 1] where the view is flipped."""
    row, column = centres.unbind(-1)
    return torch.stack([row, torch.where(view[:, None, 4] > 0.5, 1 - column, column)], -1)
