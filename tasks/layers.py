"""What heads of several tasks share.

Shapes: B batch, C_i channels of the i-th feature, h_i w_i its size, finest first.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FeaturePyramidNetwork


class FPN(FeaturePyramidNetwork):  # type: ignore[misc]
    """Feature pyramid (arXiv:1612.03144): lateral 1x1 convolutions, a top-down path, 3x3 convolutions.

    The top-down path enlarges by nearest neighbour to the size of the finer level. Extra levels take every second pixel
    of the level before.

    Args:
        widths: Channels of the features, finest first.
        channels: Channels of every output.
        num_extra: Levels that are added at the coarse end.
    """

    def __init__(self, widths: Sequence[int], channels: int = 256, *, num_extra: int = 1) -> None:
        super().__init__(list(widths), channels)
        self.num_extra = num_extra
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map features `(B, C_i, h_i, w_i)` to `len(features) + num_extra` maps of `channels`, finest first."""
        named = OrderedDict((str(level), feature) for level, feature in enumerate(features))
        levels = list(super().forward(named).values())
        for _ in range(self.num_extra):
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return levels


class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm over the pixels of all processes; where it cannot be synchronised, over those of this one.

    Training without several processes, or on a CPU (PyTorch synchronises on accelerators only), warns once.
    """

    def forward(self, x: Tensor) -> Tensor:
        num_processes = (
            distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        )
        if not self.training or (x.is_cuda and num_processes > 1):
            return super().forward(x)
        warnings.warn(
            f"SyncBatchNorm: {num_processes} process{'es' if num_processes > 1 else ''} on {x.device.type}, so each "
            "takes the statistics of its own images only. Small batches make them noisy: use several GPUs with DDP.",
            stacklevel=1,
        )
        return _BatchNorm.forward(self, x)


def mean_counts(counts: Sequence[int], device: torch.device) -> Tensor:
    """Return the mean of each count over all processes of a run: what sums of losses are divided by.

    Gradients are averaged over processes, so that the sum of all over the count of all remains: processes of few images
    train like one of many, wherever the objects are. A count of nothing becomes one object in all.
    """
    total = torch.tensor(counts, dtype=torch.float32, device=device)
    if not (distributed.is_available() and distributed.is_initialized()):
        return total.clamp(min=1)
    distributed.all_reduce(total)
    return total.clamp(min=1) / distributed.get_world_size()
