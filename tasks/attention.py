"""Deformable attention and the layers around it, which the transformers of several tasks are made of.

Shapes: B batch, Q queries, S positions of all levels of the pyramid, L levels, C channels, M heads, P points.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops import deformable_attention

# The layer of a deformable attention that moves its sampling points.
_SAMPLING_OFFSETS = "sampling_offsets"


class FFN(nn.Module):
    """Linear, ReLU, linear on the last axis."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]


class ChunkedFFN(nn.Module):
    """An `FFN` whose hidden units are computed in `num_chunks` parts, of which one at a time is in memory.

    Training computes each part again in the backward pass. The released InternImage-G stores its layers so, in four.
    """

    def __init__(self, dim: int, hidden_dim: int, num_chunks: int) -> None:
        super().__init__()
        if num_chunks < 1 or hidden_dim % num_chunks:
            raise ValueError(f"ChunkedFFN: num_chunks={num_chunks} does not divide hidden_dim={hidden_dim}.")
        part = hidden_dim // num_chunks
        self.fc1 = nn.ModuleList(nn.Linear(dim, part) for _ in range(num_chunks))
        self.fc2 = nn.ModuleList(nn.Linear(part, dim, bias=False) for _ in range(num_chunks))
        self.bias = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Start the bias at zero; the linear layers start themselves."""
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bias.expand_as(x)
        for fc1, fc2 in zip(self.fc1, self.fc2, strict=True):
            if torch.is_grad_enabled():
                y = y + checkpoint(_part, x, fc1, fc2, use_reentrant=False)
            else:
                y = y + _part(x, fc1, fc2)
        return y


def _part(x: Tensor, fc1: nn.Module, fc2: nn.Module) -> Tensor:
    return fc2(F.relu(fc1(x)))  # type: ignore[no-any-return]


def ffn(dim: int, hidden_dim: int, num_chunks: int) -> FFN | ChunkedFFN:
    """Return a feed-forward network, in parts where `num_chunks` is above 1."""
    return FFN(dim, hidden_dim) if num_chunks == 1 else ChunkedFFN(dim, hidden_dim, num_chunks)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (arXiv:2010.04159): each query samples a few points of every level.

    Args:
        dim: Channels.
        num_heads: Divides `dim`.
        num_levels: Levels of the pyramid.
        num_points: Points per head and level.
    """

    def __init__(self, dim: int, num_heads: int = 8, num_levels: int = 4, num_points: int = 4) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"DeformableAttention: num_heads={num_heads} does not divide dim={dim}.")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, points * 2)
        self.attention_weights = nn.Linear(dim, points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with equal weights, each head looking in a direction of its own, each point a step further."""
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # (M, 2)
        steps = torch.arange(1, self.num_points + 1)[:, None]
        offsets = (direction[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, query: Tensor, memory: Tensor, reference: Tensor, padding: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Return `(B, Q, C)`.

        Args:
            query: `(B, Q, C)`.
            memory: `(B, S, C)`, the levels one after another.
            reference: `(B, Q, L, 2)` points, from which offsets are counted in pixels of the level, or `(B, Q, L, 4)`
                boxes, from whose centre they are counted in shares of its size. Over the size of the padded image.
            padding: `(B, S)` bool, True where `memory` is to read as zero.
            shapes: (height, width) of each level.
        """
        value = self.value_proj(memory).masked_fill(padding[..., None], 0.0).unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))
        anchor = reference[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        if reference.shape[-1] == 2:
            size = reference.new_tensor([(width, height) for height, width in shapes])
            locations = anchor + offsets / size[:, None]
        else:
            locations = anchor[..., :2] + offsets / self.num_points * anchor[..., 2:] * 0.5
        return self.output_proj(deformable_attention(value, shapes, locations, weights))  # type: ignore[no-any-return]


class SelfAttention(nn.MultiheadAttention):
    """Attention of queries to each other, batch first."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, batch_first=True)

    def reset_parameters(self) -> None:
        """Start afresh; PyTorch's class hides this, and models on the meta device need it."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)


class EncoderLayer(nn.Module):
    """Deformable self-attention and feed-forward network, each with a residual and a norm after it."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, hidden_dim: int, ffn_chunks: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(dim, num_heads, num_levels)
        self.ffn = ffn(dim, hidden_dim, ffn_chunks)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, padding: Tensor, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        x = self.norms[0](x + self.attention(x + position, x, reference, padding, shapes))
        return self.norms[1](x + self.ffn(x))  # type: ignore[no-any-return]


def is_sampling_offset(name: str) -> bool:
    """Tell whether a parameter belongs to the sampling offsets of a `DeformableAttention`."""
    return _SAMPLING_OFFSETS in name.split(".")
