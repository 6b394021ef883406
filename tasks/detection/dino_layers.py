"""Layers of DINO's transformer (arXiv:2203.03605) and position codes.

Shapes: B batch, Q queries, S positions of all levels of the pyramid, L levels, C channels.
Boxes are (cx, cy, w, h) over the size of the unpadded image, so in [0, 1].
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from tasks.attention import DeformableAttention, SelfAttention, ffn

# Keeps the logit of a box at the border finite.
BOX_EPS = 1e-3


def inverse_sigmoid(x: Tensor) -> Tensor:
    """Return the logit of the nearest probability, finite: between -6.9 and 6.9."""
    x = x.clamp(0, 1)
    return (x.clamp(min=BOX_EPS) / (1 - x).clamp(min=BOX_EPS)).log()


def sine_code(coordinate: Tensor, channels: int, temperature: float) -> Tensor:
    """Code each coordinate in [0, 1] as sines and cosines of `channels / 2` wavelengths: `(...)` to `(..., channels)`.

    The wavelengths grow from 1 to `temperature`.
    """
    # Explicitly in float32, since `bf16-true` makes bfloat16 the default.
    pair = torch.arange(channels, dtype=torch.float32, device=coordinate.device) // 2
    angle = 2 * math.pi * coordinate[..., None] / temperature ** (2 * pair / channels)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], -1).flatten(-2)


def mlp(*widths: int) -> nn.Sequential:
    """Return linear layers of these widths with ReLU between them."""
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the image, feed-forward network; norms after each."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, hidden_dim: int, ffn_chunks: int) -> None:
        super().__init__()
        self.self_attention = SelfAttention(dim, num_heads)
        self.attention = DeformableAttention(dim, num_heads, num_levels)
        self.ffn = ffn(dim, hidden_dim, ffn_chunks)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        hidden: Tensor | None,
        memory: Tensor,
        reference: Tensor,
        padding: Tensor,
        shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Refine queries `(B, Q, C)`; `hidden` `(Q, Q)` is True where a query (row) must not see another (column)."""
        query = x + position
        x = self.norms[0](x + self.self_attention(query, query, x, attn_mask=hidden, need_weights=False)[0])
        x = self.norms[1](x + self.attention(x + position, memory, reference, padding, shapes))
        return self.norms[2](x + self.ffn(x))  # type: ignore[no-any-return]
