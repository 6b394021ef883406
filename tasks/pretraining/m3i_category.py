"""The term for samples that have a class: their vectors against one vector for each class.

Shapes: n samples, D channels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.pretraining.means import weighted_mean


class Categories(nn.Module):
    """A learned vector for each class, in the space of the vectors of texts and at their temperature.

    Args:
        num_classes: Number of classes, K.
        dim: Channels of the vectors, D.
    """

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_classes, dim))
        # Only directions count.
        nn.init.normal_(self.table, std=dim**-0.5)

    def forward(self, embedding: Tensor, label: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        """Return this process's part of the mean cross entropy over all processes (see `weighted_mean`).

        Args:
            embedding: `(n, D)` unit vectors.
            label: `(n,)` int64, negative where there is none.
            weight: `(n,)` float32, how much each sample counts if it has a label.
            scale: Scalar, one over the temperature.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            logits = scale * embedding @ F.normalize(self.table.float(), dim=-1).T
            loss = F.cross_entropy(logits, label.clamp(min=0), reduction="none")
            return weighted_mean(loss, weight * (label >= 0))
