"""The head of SegFormer (arXiv:2105.15203) as the authors use it: each level projected, enlarged and fused.

Its levels have a batch norm and a ReLU and are joined finest first. The original, which transformers implements,
projects with a bias and no ReLU and joins them coarsest first, so that weights cannot be converted.

Shapes: B batch, K classes, h w size of the finest feature.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from internimage import Backbone
from tasks.segmentation.layers import ConvNormReLU, PixelClassifier, resize
from tasks.segmentation.segmentor import PixelSegmentor


class SegFormerHead(nn.Module):
    """Features of all levels to logits at the size of the finest.

    Args:
        widths: Channels of the features, finest first.
        num_classes: K.
        channels: Of each level.
        dropout: Before the classifier.
    """

    def __init__(self, widths: Sequence[int], num_classes: int, *, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.levels = nn.ModuleList(ConvNormReLU(width, channels) for width in widths)
        self.fuse = ConvNormReLU(len(widths) * channels, channels)
        self.classifier = PixelClassifier(channels, num_classes, dropout)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features `(B, widths[i], h_i, w_i)`, finest first, to logits `(B, K, h, w)`."""
        size = features[0].shape[-2:]
        maps = [resize(level(x), size) for level, x in zip(self.levels, features, strict=True)]
        logits: Tensor = self.classifier(self.fuse(torch.cat(maps, 1)))
        return logits


class SegFormer(PixelSegmentor):
    """The SegFormer head on a backbone, the authors' on InternImage-L and XL for street scenes.

    Args:
        backbone: Any backbone.
        num_classes: Length of the logits.
        channels: Of the head.
        dropout: Before the classifier.
        valid_only: Average the loss over the pixels that are not ignored, not over all as the authors do.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        channels: int = 256,
        dropout: float = 0.1,
        valid_only: bool = False,
    ) -> None:
        head = SegFormerHead(backbone.widths, num_classes, channels=channels, dropout=dropout)
        super().__init__(backbone, head, valid_only=valid_only)
