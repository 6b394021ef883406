"""Loss and accuracy of a semantic map.

Shapes: B batch, K classes, H W size of the image, h w size of the logits.
"""

import torch.nn.functional as F
from torch import Tensor

from tasks.segmentation.layers import resize

# Class number of pixels that count neither in the loss nor in the metrics.
IGNORE_INDEX = 255


def pixel_cross_entropy(logits: Tensor, target: Tensor, *, valid_only: bool = False) -> Tensor:
    """Mean cross entropy of the pixels, in float32.

    Args:
        logits: `(B, K, h, w)` of any float type, resized bilinearly to the target.
        target: `(B, H, W)` int64, class numbers in [0, K) or 255.
        valid_only: Divide by the number of pixels that are not 255. The authors divide by that of all pixels, so that
            an image with much to ignore weighs less.
    """
    logits = resize(logits.float(), target.shape[-2:])
    # Without a reduction of its own: that of CUDA adds in an order which changes from run to run.
    total = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none").sum()
    return total / ((target != IGNORE_INDEX).sum().clamp(min=1) if valid_only else target.numel())


def pixel_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the pixels that are not 255 whose greatest logit is that of their class; arguments as above."""
    right = resize(logits.float(), target.shape[-2:]).argmax(1) == target
    return right.sum() / (target != IGNORE_INDEX).sum().clamp(min=1)
