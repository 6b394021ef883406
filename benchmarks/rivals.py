"""The operators by other means, with the same results: what the kernels are measured against.

Shapes: B batch, H W input size, h w output size, G groups, D channels per group, K points per group. Of deformable
attention: S pixels of all levels, Q queries, M heads, D channels per head, L levels, P points per level.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d


@dataclass(frozen=True)
class Rival:
    """An implementation: how it arranges inputs, what it computes, and the INTERNIMAGE_OPS that it needs."""

    compute: Callable[..., Tensor]
    arrange: Callable[[list[Tensor]], list[Tensor]] = lambda tensors: tensors
    to_channels_last: Callable[[Tensor], Tensor] = lambda output: output
    choice: str = "auto"

    def runs(self, tensors: list[Tensor]) -> tuple[Callable[[], Tensor], Callable[[], object]]:
        """Return the forward without gradients, and forward and backward; the last tensor is the output's gradient."""
        *leaves, grad = self.arrange(tensors)

        def forward() -> Tensor:
            with torch.no_grad():
                return self.compute(*leaves)

        def forward_backward() -> object:
            return torch.autograd.grad(self.compute(*leaves), leaves, grad)

        return forward, forward_backward


@contextlib.contextmanager
def operators(choice: str) -> Iterator[None]:
    before = os.environ.get("INTERNIMAGE_OPS")
    os.environ["INTERNIMAGE_OPS"] = choice
    try:
        yield
    finally:
        os.environ.pop("INTERNIMAGE_OPS")
        if before is not None:
            os.environ["INTERNIMAGE_OPS"] = before


def dcnv3_grid_sample(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    *,
    groups: int,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
    softmax: bool = False,
) -> Tensor:
    """Compute `ops.dcnv3` as the authors' fallback does.

    That is: pad with zeros, build a normalised float32 grid, `grid_sample` all K points of all pixels, weight and sum.
    It samples in float32 whatever the dtype, as autocast makes theirs do, and holds the `(B * G, D, h * w, K)` samples.
    """
    if softmax:
        mask = mask.unflatten(-1, (groups, -1)).softmax(-1).flatten(-2)
    padded = F.pad(x.float(), (0, 0, padding, padding, padding, padding))
    batch, height, width, channels = padded.shape
    span = dilation * (kernel_size - 1)
    rows = torch.arange((height - span - 1) // stride + 1, device=x.device) * stride + span // 2
    columns = torch.arange((width - span - 1) // stride + 1, device=x.device) * stride + span // 2
    pixels = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).float()  # (h, w, 2), x before y
    step = torch.arange(kernel_size, device=x.device) * dilation - span // 2
    taps = torch.cartesian_prod(step, step).float()  # (K, 2), x outermost
    if remove_center:
        centre = kernel_size**2 // 2
        taps = torch.cat([taps[:centre], taps[centre + 1 :]])
    points = len(taps)
    size = torch.tensor([width, height], device=x.device, dtype=torch.float32)
    displacement = (offset.float().unflatten(-1, (groups, points, 2)) + taps) * offset_scale
    location = (pixels[:, :, None, None] + displacement + 0.5) / size * 2 - 1  # (B, h, w, G, K, 2)
    grid = location.permute(0, 3, 1, 2, 4, 5).flatten(2, 3).flatten(0, 1)  # (B * G, h * w, K, 2)
    planes = padded.unflatten(-1, (groups, -1)).permute(0, 3, 4, 1, 2).flatten(0, 1)  # (B * G, D, H, W)
    samples = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weights = mask.float().unflatten(-1, (groups, points)).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
    summed = (samples * weights.unsqueeze(1)).sum(-1)  # (B * G, D, h * w)
    output = summed.view(batch, channels, len(rows), len(columns)).permute(0, 2, 3, 1)
    return output.contiguous().to(x.dtype)


def torchvision_inputs(x: Tensor, offset: Tensor, mask: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arrange 3 x 3 inputs as `deform_conv2d` wants them: channels first, points row by row, (dy, dx)."""
    rows_first = (2, 0, 1)
    offset = offset.unflatten(-1, (groups, 3, 3, 2)).flip(-1).transpose(-3, -2).flatten(-4)
    mask = mask.unflatten(-1, (groups, 3, 3)).transpose(-2, -1).flatten(-3)
    arranged = [
        torch.stack([image.permute(rows_first) for image in tensor]).contiguous() for tensor in (x, offset, mask)
    ]
    return arranged[0], arranged[1], arranged[2]


def dcnv3_torchvision(x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
    """Compute 3 x 3 DCNv3 by torchvision's DCNv2, depthwise with weights of 1; layout of `torchvision_inputs`."""
    weight = x.new_ones(x.shape[1], 1, 3, 3)
    return deform_conv2d(x, offset, weight, padding=1, mask=mask)


def deformable_attention_grid_sample(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Compute `ops.deformable_attention` as the PyTorch implementations in use do.

    It samples in float32 whatever the dtype, as autocast makes them do, and holds the `(B * M, D, Q, L * P)` samples.
    """
    batch, _, heads, depth = value.shape
    queries = locations.shape[1]
    planes = value.float().permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in shapes], -1)
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B * M, Q, P, 2)
    samples = [
        F.grid_sample(plane.unflatten(-1, shape), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        for plane, shape, grid in zip(planes, shapes, grids, strict=True)
    ]
    factors = weights.float().transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    summed = (torch.cat(samples, -1) * factors).sum(-1)  # (B * M, D, Q)
    return summed.view(batch, heads * depth, queries).transpose(1, 2).to(value.dtype)
