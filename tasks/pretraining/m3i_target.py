"""The network that gives the tokens to predict: an average over time of the one in training.

Shapes: B batch, H W image size, N tokens, C their channels.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage import Backbone, ClipProjectorHead


def momentum_at(step: int, total_steps: int, first: float) -> float:
    """Return the share of the old average that is kept: from `first` at step 0 to 1 at the end, along a cosine."""
    progress = min(step / total_steps, 1.0)
    return 1 - (1 - first) * (1 + math.cos(math.pi * progress)) / 2


class MomentumTarget(nn.Module):
    """Copy of a backbone and of the head that makes tokens of its features; follows both, and gets no gradient.

    It is always in evaluation mode, so that stochastic depth leaves it whole. The average is float32, since steps as
    small as its own are lost in less.

    Args:
        backbone: To copy.
        head: To copy; its tokens are the targets.
    """

    started: Tensor

    def __init__(self, backbone: Backbone, head: ClipProjectorHead) -> None:
        super().__init__()
        self.backbone = deepcopy(backbone)
        self.head = deepcopy(head)
        self.requires_grad_(False)
        self.register_buffer("started", torch.tensor(False))
        self._ready = False
        self.eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def start(self, backbone: nn.Module, head: nn.Module) -> None:
        """Take the weights as they are, once in a run: after initial weights were loaded, not after a resume.

        Raises:
            ValueError: Weights are not float32, or not whole in this process.
        """
        if self._ready:
            return
        for name, old, new in self._pairs(backbone, head):
            if old.shape != new.shape or (new.is_floating_point() and new.dtype != torch.float32):
                raise ValueError(
                    f"MomentumTarget: {name} is {new.dtype} {tuple(new.shape)}, expected torch.float32 "
                    f"{tuple(old.shape)}: an average needs whole weights. Train with ddp and precision 32-true, "
                    "bf16-mixed or 16-mixed."
                )
        if not self.started:
            self._follow(backbone, head, 0.0)
            self.started.fill_(True)
        self._ready = True

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, 3, H, W)` to tokens `(B, N, C)` float32, each with mean 0 and variance 1 over its channels."""
        tokens = self.head.tokens(self.backbone(image)).flatten(2).transpose(1, 2).float()
        return F.layer_norm(tokens, tokens.shape[-1:])

    def update(self, backbone: nn.Module, head: nn.Module, momentum: float) -> None:
        """Move to the weights given, and keep `momentum` of the old ones."""
        self._follow(backbone, head, momentum)

    @torch.no_grad()
    def _follow(self, backbone: nn.Module, head: nn.Module, momentum: float) -> None:
        averages, weights = [], []
        for _, old, new in self._pairs(backbone, head):
            if old.is_floating_point():
                averages.append(old)
                weights.append(new)
            else:
                old.copy_(new)
        torch._foreach_lerp_(averages, weights, 1 - momentum)

    def _pairs(self, backbone: nn.Module, head: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, average and weight of each parameter and buffer."""
        for part, copy, module in (("backbone", self.backbone, backbone), ("head", self.head, head)):
            weights = module.state_dict()
            for name, average in copy.state_dict().items():
                yield f"{part}.{name}", average, weights[name]
