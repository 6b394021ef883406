"""The loss between predicted and target tokens: UniGrad (arXiv:2112.05141) on dense features, as in SiameseIM.

Shapes: B batch, N tokens, C channels.
"""

import torch
from torch import Tensor

from tasks.pretraining.means import second_moment, weighted_mean


def dense_loss(prediction: Tensor, target: Tensor, weight: Tensor, *, decorrelation: float) -> Tensor:
    """Return the mean of (|p - t|^2 + decorrelation * p^T S p) / C over the tokens of all processes.

    S is the second moment of the target tokens of all processes. The second part pushes predictions, and with them the
    network that the targets follow, away from directions that all targets share, so that they do not all become equal.

    Args:
        prediction: `(B, N, C)`, p.
        target: `(B, N, C)` float32, t, without gradient.
        weight: `(B,)` float32, how much each image counts.
        decorrelation: Factor on the second part.

    Returns:
        Scalar float32, this process's part of the mean (see `weighted_mean`); 0 where nothing counts.
    """
    assert not target.requires_grad
    with torch.autocast(prediction.device.type, enabled=False):
        prediction = prediction.float()
        moment = second_moment(target.flatten(0, 1), weight.repeat_interleave(target.shape[1]))
        attraction = (prediction - target).square().sum(-1)
        repulsion = ((prediction @ moment) * prediction).sum(-1)
        per_image = (attraction + decorrelation * repulsion).mean(1) / prediction.shape[-1]
        return weighted_mean(per_image, weight)


def spread(target: Tensor, weight: Tensor) -> Tensor:
    """Return the standard deviation of target tokens over tokens and images that count, as a mean over channels.

    Tokens have variance 1 over their channels, so it is 1 at most, and 0 where all tokens are equal: collapse.

    Args:
        target: `(B, N, C)` float32.
        weight: `(B,)` float32, how much each image counts.
    """
    share = (weight / weight.sum().clamp(min=1e-6))[:, None, None] / target.shape[1]
    mean = (target * share).sum((0, 1))
    return ((target - mean).square() * share).sum((0, 1)).sqrt().mean()
