"""Antialiased resize of uint8 RGB by torch's vectorised kernels, straight into where the pixels go.

Shapes: h w size of the source, H W size of the target.
"""

from typing import Literal

import torch
from torch import Tensor

from datamodules.batch import Array

Interpolation = Literal["bicubic", "bilinear"]
# `F.interpolate` calls these and cannot be given the memory to write to; a new tensor costs half as much as the resize.
_KERNELS = {
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
}


def resize(source: Array, target: Tensor, interpolation: Interpolation) -> None:
    """Resize `(h, w, 3)` uint8 into `(3, H, W)` uint8, which is fastest with channels last."""
    pixels = torch.from_numpy(source).permute(2, 0, 1)[None]
    _KERNELS[interpolation](pixels, target.shape[-2:], False, out=target[None])


def flip_in_place(target: Tensor) -> None:
    """Flip `(3, H, W)` left and right."""
    # Four axes, which torch flips fast where the channels are last.
    target[None].copy_(target[None].flip(-1))
