"""Multi-scale deformable attention in plain PyTorch: every device and dtype, the truth for the compiled kernels.

The sampling geometry is that of Deformable DETR (arXiv:2010.04159, eq. 3), which is `grid_sample`'s with
`align_corners=False` and zeros outside: location `(x, y)` of a level of H x W pixels reads at column `x * W - 0.5` and
row `y * H - 0.5`.

Shapes: B batch, S pixels of all levels, Q queries, M heads, D channels per head, L levels, P points per level.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ops.bilinear import Corners, from_table, locate, to_table


def deformable_attention_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute `ops.deformable_attention` by gathers, unchecked; differentiable by autograd to any order.

    float16 and bfloat16 are computed in float32. Arguments and result are those of `ops.deformable_attention`.
    """
    real = torch.promote_types(value.dtype, torch.float32)
    locations, weights = sampling_locations.to(real), attention_weights.to(real)
    out = locations.new_zeros(())
    for level, features in _levels(value.to(real), spatial_shapes):
        table = to_table(features, value.shape[2])
        for point in range(weights.shape[-1]):
            corners = _locate(locations[..., level, point, :], spatial_shapes[level])
            out = out + corners.gather(table, weights[..., level, point])
    return out.flatten(-2).to(value.dtype)


def deformable_attention_reference_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `deformable_attention_reference` for `value`, `sampling_locations` and `attention_weights`.

    Autograd would keep 4 L P tensors of the output's size; this keeps a handful.
    """
    real = torch.promote_types(value.dtype, torch.float32)
    locations, weights = sampling_locations.to(real), attention_weights.to(real)
    grad = torch.unflatten(grad.to(real), -1, value.shape[2:])  # (B, Q, M, D)
    grad_value = []
    grad_location, grad_weight = locations.new_empty(locations.shape), weights.new_empty(weights.shape)
    for level, features in _levels(value.to(real), spatial_shapes):
        height, width = spatial_shapes[level]
        table = to_table(features, value.shape[2])
        grad_table = torch.zeros_like(table)
        for point in range(weights.shape[-1]):
            corners = _locate(locations[..., level, point, :], (height, width))
            weight = weights[..., level, point]
            corners.scatter(grad_table, weight, grad)
            slopes = corners.slopes(table, grad)
            weight = torch.where(corners.inside, weight, 0)
            grad_location[..., level, point, 0] = weight * width * slopes.x
            grad_location[..., level, point, 1] = weight * height * slopes.y
            grad_weight[..., level, point] = slopes.weight
        grad_value.append(from_table(grad_table, features.shape).flatten(1, 2))
    return (
        torch.cat(grad_value, 1).view(value.shape).to(value.dtype),
        grad_location.to(sampling_locations.dtype),
        grad_weight.to(attention_weights.dtype),
    )


def _levels(value: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
    """Yield each level's index and its `(B, H, W, M * D)` features."""
    parts = torch.split(value.flatten(-2), [height * width for height, width in spatial_shapes], 1)
    for level, (part, shape) in enumerate(zip(parts, spatial_shapes, strict=True)):
        yield level, torch.unflatten(part, 1, shape)


def _locate(location: Tensor, shape: tuple[int, int]) -> Corners:
    """Find what one point of every (query, head) reads in a level of `shape` (H, W); `location` is `(B, Q, M, 2)`."""
    height, width = shape
    return locate(location[..., 1] * height - 0.5, location[..., 0] * width - 0.5, height, width)
