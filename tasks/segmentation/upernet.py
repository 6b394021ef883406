"""UPerNet (arXiv:1807.10221): pyramid pooling on the coarsest feature, a feature pyramid, all levels fused.

Shapes: B batch, K classes, C channels of the head, h w size of the finest feature.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage import Backbone
from tasks.segmentation.layers import ConvNormReLU, PixelClassifier, resize
from tasks.segmentation.losses import pixel_cross_entropy
from tasks.segmentation.segmentor import PixelSegmentor

# Cells along each side of the grids that pyramid pooling averages over.
POOL_SIDES = (1, 2, 3, 6)


class PyramidPooling(nn.Module):
    """A feature beside its averages over coarse grids (arXiv:1612.01105), fused.

    Args:
        in_channels: Of the feature.
        channels: Of each branch and of the output.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvNormReLU(in_channels, channels) for _ in POOL_SIDES)
        self.fuse = ConvNormReLU(in_channels + len(POOL_SIDES) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, h, w)` to `(B, channels, h, w)`."""
        branches = zip(self.branches, POOL_SIDES, strict=True)
        pooled = [resize(branch(F.adaptive_avg_pool2d(x, side)), x.shape[-2:]) for branch, side in branches]
        fused: Tensor = self.fuse(torch.cat([x, *pooled], 1))
        return fused


class UPerNetHead(nn.Module):
    """Features of all levels to logits at the size of the finest.

    Args:
        widths: Channels of the features, finest first.
        num_classes: K.
        channels: C.
        dropout: Before the classifier.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, *, channels: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        self.pooling = PyramidPooling(widths[-1], channels)
        self.laterals = nn.ModuleList(ConvNormReLU(width, channels) for width in widths[:-1])
        self.outputs = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in widths[:-1])
        self.fuse_outputs = ConvNormReLU(len(widths) * channels, channels, 3)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features `(B, widths[i], h_i, w_i)`, finest first, to logits `(B, K, h, w)`."""
        *finer, coarsest = features
        levels = [lateral(x) for lateral, x in zip(self.laterals, finer, strict=True)]
        levels.append(self.pooling(coarsest))
        for level in reversed(range(len(finer))):
            levels[level] = levels[level] + resize(levels[level + 1], levels[level].shape[-2:])
        maps = [output(x) for output, x in zip(self.outputs, levels[:-1], strict=True)]
        maps.append(levels[-1])
        size = maps[0].shape[-2:]
        logits: Tensor = self.classifier(self.fuse_outputs(torch.cat([resize(x, size) for x in maps], 1)))
        return logits


class FCNHead(nn.Module):
    """One feature to logits at its own size: a convolution and a classifier.

    Args:
        in_channels: Of the feature.
        num_classes: K.
        channels: Of the convolution.
        dropout: Before the classifier.
    """

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = ConvNormReLU(in_channels, channels, 3)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, in_channels, h, w)` to logits `(B, K, h, w)`."""
        logits: Tensor = self.classifier(self.conv(x))
        return logits


class UPerNet(PixelSegmentor):
    """UPerNet with an auxiliary head, the authors' on every InternImage.

    A training batch holds two images or more, counted over all GPUs: pyramid pooling leaves one pixel of each, and
    batch norm has no variance of one.

    Args:
        backbone: Any backbone.
        num_classes: Length of the logits.
        channels: Of the head.
        aux_channels: Of the auxiliary head, which training alone uses.
        aux_index: Feature of the backbone that the auxiliary head sees, 0 the finest.
        aux_weight: Of the auxiliary loss in the total; 0 leaves out the auxiliary head.
        dropout: Before the classifiers.
        valid_only: Average the losses over the pixels that are not ignored, not over all as the authors do.

    Raises:
        ValueError: The backbone has no feature of this index.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 512,
        aux_channels: int = 256,
        aux_index: int = 2,
        aux_weight: float = 0.4,
        dropout: float = 0.1,
        valid_only: bool = False,
    ) -> None:
        widths = backbone.widths
        head = UPerNetHead(widths, num_classes, channels=channels, dropout=dropout)
        super().__init__(backbone, head, valid_only=valid_only)
        if not 0 <= aux_index < len(widths):
            raise ValueError(
                f"UPerNet: aux_index is {aux_index}, expected 0 to {len(widths) - 1}: the backbone gives {len(widths)} "
                "features."
            )
        self.aux_index = aux_index
        self.aux_weight = aux_weight
        self.auxiliary = (
            FCNHead(widths[aux_index], num_classes, channels=aux_channels, dropout=dropout) if aux_weight else None
        )

    def losses(self, features: Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
        """Return the weighted losses of both heads."""
        losses = super().losses(features, target)
        if self.auxiliary is not None:
            logits = self.auxiliary(features[self.aux_index])
            loss = pixel_cross_entropy(logits, target, valid_only=self.valid_only)
            losses["aux_cross_entropy"] = self.aux_weight * loss
        return losses
