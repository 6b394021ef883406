"""What the segmentation heads share.

Shapes: B batch, H W size of a map.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from tasks.layers import SyncBatchNorm


class ConvNormReLU(nn.Module):
    """Convolution of stride 1 without bias, synchronised batch norm, ReLU; the size of the map stays.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        kernel_size: In pixels, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = SyncBatchNorm(out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with normal weights that keep the variance of the gradient."""
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, H, W)` to `(B, out_channels, H, W)`."""
        return F.relu(self.norm(self.conv(x)))


class PixelClassifier(nn.Conv2d):
    """The last layer of a head: dropout of whole channels, then a linear layer at each pixel.

    Args:
        channels: Of the input.
        num_classes: Length of the logits.
        dropout: Share of the channels that training drops.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__(channels, num_classes, 1)
        self.dropout = dropout

    def reset_parameters(self) -> None:
        """Start with nearly equal logits, as the authors do."""
        nn.init.normal_(self.weight, std=0.01)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, channels, H, W)` to logits `(B, num_classes, H, W)`."""
        return super().forward(F.dropout2d(x, self.dropout, self.training))


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps `(B, C, H, W)` bilinearly to `size` (height, width); without smoothing where they shrink."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
