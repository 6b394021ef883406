"""DCNv3 by other means, with the same results: what the kernels are measured against.

Shapes: B batch, H W input size, h w output size, G groups, D channels per group, K points per group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d


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
