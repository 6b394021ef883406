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
from torch import Tensor

from ops.bilinear import Corners, from_table, locate, to_table

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
        (kernel_y, kernel_x), (stride_y, stride_x), (padding_y, padding_x), (dilation_y, dilation_x) = self[:4]
        return (
            (height + 2 * padding_y - dilation_y * (kernel_y - 1) - 1) // stride_y + 1,
            (width + 2 * padding_x - dilation_x * (kernel_x - 1) - 1) // stride_x + 1,
        )

    def points(self) -> Iterator[tuple[int, int]]:
        """Kernel indices (row, column) in the order of the offset and mask channels."""
        height, width = self.kernel_size
        for column in range(width):
            for row in range(height):
                if not (self.remove_center and row == height // 2 and column == width // 2):
                    yield row, column


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
        out = out + _locate(offsets[..., k, :], point, x.shape, taps).gather(table, weights[..., k])
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
    grad_table = torch.zeros_like(table)
    grad_offset, grad_weight = offsets.new_empty(offsets.shape), weights.new_empty(weights.shape)
    for k, point in enumerate(taps.points()):
        corners = _locate(offsets[..., k, :], point, x.shape, taps)
        corners.scatter(grad_table, weights[..., k], grad)
        slopes = corners.slopes(table, grad)
        scale = torch.where(corners.inside, weights[..., k] * taps.offset_scale, 0)
        grad_offset[..., k, 0] = scale * slopes.x
        grad_offset[..., k, 1] = scale * slopes.y
        grad_weight[..., k] = slopes.weight
    if softmax:
        grad_weight = weights * (grad_weight - (weights * grad_weight).sum(-1, keepdim=True))
    return (
        from_table(grad_table, x.shape).to(x.dtype, memory_format=torch.contiguous_format, copy=True),
        grad_offset.flatten(-3).to(offset.dtype),
        grad_weight.flatten(-2).to(mask.dtype),
    )


def _prepare(x: Tensor, offset: Tensor, mask: Tensor, taps: Taps, softmax: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lay out the inputs by point.

    Returns:
        The table of `x`; the offsets `(B, h, w, G, K, 2)`; the weights `(B, h, w, G, K)`.
    """
    weights = torch.unflatten(mask, -1, (taps.groups, taps.num_points))
    if softmax:
        weights = weights.softmax(-1)
    return to_table(x, taps.groups), torch.unflatten(offset, -1, (taps.groups, taps.num_points, 2)), weights


def _locate(offset: Tensor, point: tuple[int, int], shape: Sequence[int], taps: Taps) -> Corners:
    """Find what kernel point `point` reads, for `(B, h, w, G, 2)` offsets and an input of `shape` (B, H, W, C)."""
    y = _coordinate(offset[..., 1], point, taps, axis=0)
    x = _coordinate(offset[..., 0], point, taps, axis=1)
    return locate(y, x, shape[1], shape[2])


def _coordinate(offset: Tensor, point: tuple[int, int], taps: Taps, axis: int) -> Tensor:
    """Sampling coordinate along `axis` (0 height, 1 width) in input pixels, in the authors' order of operations."""
    half = taps.dilation[axis] * (taps.kernel_size[axis] - 1) // 2
    output = torch.arange(offset.shape[1 + axis], device=offset.device, dtype=offset.dtype)
    output = output.view((-1, 1, 1) if axis == 0 else (-1, 1))
    start = output * taps.stride[axis] + (half - taps.padding[axis]) - half * taps.offset_scale
    return start + (offset + point[axis] * taps.dilation[axis]) * taps.offset_scale
