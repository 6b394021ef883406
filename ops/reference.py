"""DCNv3 in plain PyTorch: every device and dtype, the truth that the compiled kernels are tested against.

The sampling geometry is that of the authors' CUDA operator (InternImage, arXiv:2211.05778, eq. 2). For output column
`o`, point `(i, j)` of the kernel, i along the width, reads at column
`half - padding + o * stride - half * scale + (i * dilation + dx) * scale`, `half = dilation * (kernel_size - 1) // 2`.
Rows likewise with j and dy. Points are ordered with i outermost.

Shapes: B batch, H W input size, h w output size, G groups, D channels per group, K points per group.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IntPair = int | Sequence[int]


class Taps(NamedTuple):
    """The static part of the geometry; every pair is (height, width)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    offset_scale: float
    remove_center: bool

    @property
    def num_points(self) -> int:
        """Points per group, K."""
        return self.kernel_size[0] * self.kernel_size[1] - self.remove_center

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the output for an input of `height` x `width` pixels."""
        size = (height, width)
        sizes = [
            (size[a] + 2 * self.padding[a] - self.dilation[a] * (self.kernel_size[a] - 1) - 1) // self.stride[a] + 1
            for a in (0, 1)
        ]
        return sizes[0], sizes[1]

    def points(self) -> Iterator[tuple[int, int]]:
        """Kernel indices (row, column) in the order of the offset and mask channels."""
        height, width = self.kernel_size
        for column in range(width):
            for row in range(height):
                if not (self.remove_center and row == height // 2 and column == width // 2):
                    yield row, column


class _Corners(NamedTuple):
    """Where one point of every (pixel, group) reads; tensors are `(B, h, w, G)`."""

    rows: tuple[Tensor, Tensor, Tensor, Tensor]  # of the table: top left, top right, bottom left, bottom right
    dx: Tensor  # distance from the left column, [0, 1)
    dy: Tensor  # distance from the top row, [0, 1)
    inside: Tensor  # False where the point contributes nothing

    def weights(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bilinear weights of the four corners times the point's own weight."""
        weight = torch.where(self.inside, weight, 0)
        bottom = weight * self.dy
        top = weight - bottom
        return top * (1 - self.dx), top * self.dx, bottom * (1 - self.dx), bottom * self.dx


def pair(value: IntPair) -> tuple[int, int]:
    """Write one number, or (height, width), as (height, width)."""
    if isinstance(value, int):
        return value, value
    if len(value) != 2:
        raise ValueError(f"dcnv3: found {tuple(value)} where one number or (height, width) was expected.")
    height, width = value
    return height, width


def dcnv3_reference(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    groups: int,
    kernel_size: IntPair = 3,
    stride: IntPair = 1,
    padding: IntPair = 1,
    dilation: IntPair = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """Compute `ops.dcnv3` by gathers, unchecked; differentiable by autograd to any order.

    float16 and bfloat16 are computed in float32. Arguments and result are those of `ops.dcnv3`.
    """
    taps = Taps(
        pair(kernel_size), pair(stride), pair(padding), pair(dilation), groups, float(offset_scale), remove_center
    )
    real = torch.promote_types(x.dtype, torch.float32)
    table, offsets, weights = _prepare(x.to(real), offset.to(real), mask.to(real), taps, softmax)
    out = table.new_zeros(())
    for k, point in enumerate(taps.points()):
        corners = _locate(offsets[..., k, :], point, x.shape, taps)
        for rows, weight in zip(corners.rows, corners.weights(weights[..., k]), strict=True):
            out = out + weight.unsqueeze(-1) * F.embedding(rows, table)
    return out.flatten(-2).to(x.dtype)


def dcnv3_reference_backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, taps: Taps, softmax: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `dcnv3_reference` for `x`, `offset` and `mask`.

    Autograd would keep 4 K tensors of the output's size; this keeps a handful.
    """
    real = torch.promote_types(x.dtype, torch.float32)
    table, offsets, weights = _prepare(x.to(real), offset.to(real), mask.to(real), taps, softmax)
    grad = torch.unflatten(grad.to(real), -1, (taps.groups, -1))  # (B, h, w, G, D)
    depth = grad.shape[-1]
    grad_table = torch.zeros_like(table)
    grad_offset, grad_weight = offsets.new_empty(offsets.shape), weights.new_empty(weights.shape)
    for k, point in enumerate(taps.points()):
        corners = _locate(offsets[..., k, :], point, x.shape, taps)
        dots = []
        for rows, weight in zip(corners.rows, corners.weights(weights[..., k]), strict=True):
            dots.append((grad * F.embedding(rows, table)).sum(-1))
            # Element by element: whole rows at once take a sort on CPUs, which crawls when cores are busy.
            elements = rows.unsqueeze(-1) * depth + torch.arange(depth, device=rows.device)
            grad_table.view(-1).scatter_add_(0, elements.flatten(), (weight.unsqueeze(-1) * grad).flatten())
        top_left, top_right, bottom_left, bottom_right = dots
        top = top_left + corners.dx * (top_right - top_left)
        bottom = bottom_left + corners.dx * (bottom_right - bottom_left)
        left = top_left + corners.dy * (bottom_left - top_left)
        right = top_right + corners.dy * (bottom_right - top_right)
        scale = torch.where(corners.inside, weights[..., k] * taps.offset_scale, 0)
        grad_offset[..., k, 0] = scale * (right - left)
        grad_offset[..., k, 1] = scale * (bottom - top)
        grad_weight[..., k] = torch.where(corners.inside, top + corners.dy * (bottom - top), 0)
    if softmax:
        grad_weight = weights * (grad_weight - (weights * grad_weight).sum(-1, keepdim=True))
    batch, height, width, channels = x.shape
    padded = grad_table.view(batch, height + 2, width + 2, channels)
    return (
        padded[:, 1:-1, 1:-1].to(x.dtype, memory_format=torch.contiguous_format, copy=True),
        grad_offset.flatten(-3).to(offset.dtype),
        grad_weight.flatten(-2).to(mask.dtype),
    )


def _prepare(x: Tensor, offset: Tensor, mask: Tensor, taps: Taps, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out the inputs by point.

    Returns:
        The pixels of `x` with a border of zeros, one row per (image, pixel, group), `(B * (H + 2) * (W + 2) * G, D)`;
        the offsets `(B, h, w, G, K, 2)`; the weights `(B, h, w, G, K)`.
    """
    # The border makes all four corners of a point between -1 and the size readable.
    table = F.pad(x, (0, 0, 1, 1, 1, 1)).reshape(-1, x.shape[-1] // taps.groups)
    weights = torch.unflatten(mask, -1, (taps.groups, taps.num_points))
    if softmax:
        weights = weights.softmax(-1)
    return table, torch.unflatten(offset, -1, (taps.groups, taps.num_points, 2)), weights


def _locate(offset: Tensor, point: tuple[int, int], shape: Sequence[int], taps: Taps) -> _Corners:
    """Find what kernel point `point` reads, for `(B, h, w, G, 2)` offsets and an input of `shape` (B, H, W, C)."""
    batch, height, width, _ = shape
    y = _coordinate(offset[..., 1], point, taps, axis=0)
    x = _coordinate(offset[..., 0], point, taps, axis=1)
    inside = (y > -1) & (y < height) & (x > -1) & (x < width)
    # Selecting before the arithmetic keeps NaN and infinity out of the gradients too.
    y, x = torch.where(inside, y, 0), torch.where(inside, x, 0)
    top, left = y.detach().floor(), x.detach().floor()
    image = torch.arange(batch, device=offset.device).view(-1, 1, 1, 1)
    group = torch.arange(taps.groups, device=offset.device)
    corners = []
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row = (image * (height + 2) + top.long() + (1 + down)) * (width + 2) + left.long() + (1 + right)
        corners.append(torch.where(inside, row, 0) * taps.groups + group)
    return _Corners((corners[0], corners[1], corners[2], corners[3]), x - left, y - top, inside)


def _coordinate(offset: Tensor, point: tuple[int, int], taps: Taps, axis: int) -> Tensor:
    """Sampling coordinate along `axis` (0 height, 1 width) in input pixels, in the authors' order of operations."""
    half = taps.dilation[axis] * (taps.kernel_size[axis] - 1) // 2
    output = torch.arange(offset.shape[1 + axis], device=offset.device, dtype=offset.dtype)
    output = output.view((-1, 1, 1) if axis == 0 else (-1, 1))
    start = output * taps.stride[axis] + (half - taps.padding[axis]) - half * taps.offset_scale
    return start + (offset + point[axis] * taps.dilation[axis]) * taps.offset_scale
