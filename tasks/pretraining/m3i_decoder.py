"""Transformer that predicts the tokens of a view from some tokens of another one, after SiameseIM (arXiv:2206.01204).

Shapes: B batch, V visible tokens, N tokens to predict, C channels of the tokens.
"""

import torch
from torch import Tensor, nn

from tasks.pretraining.m3i_positions import sincos


class Decoder(nn.Module):
    """Visible tokens and one mask token for each token to predict attend to each other; the latter become predictions.

    Args:
        channels: Channels of the tokens, C.
        dim: Channels inside; divisible by 4 and by `num_heads`.
        depth: Number of blocks.
        num_heads: Heads of the attention.

    Raises:
        ValueError: `dim` does not divide.
    """

    def __init__(self, channels: int, *, dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise ValueError(f"Decoder: dim is {dim}, expected a multiple of 4 and of num_heads={num_heads}.")
        self.dim = dim
        self.input = nn.Linear(channels, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        # From positions and sizes to the channels of positions.
        self.position = nn.Linear(2 * dim, dim)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, channels)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, visible: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
        """Return predictions `(B, N, C)`.

        Args:
            visible: `(B, V, C)`.
            places: `(B, V, 2)`, row and column of each visible token in its view.
            wanted: `(B, N, 4)`, positions and sizes of the tokens to predict in that view (see `relative_positions`).
        """
        seen = self.input(visible) + sincos(places, self.dim // 2)
        asked = self.mask_token + self.position(sincos(wanted, self.dim // 2))
        x = self.blocks(torch.cat([seen, asked], 1))
        return self.output(self.norm(x[:, visible.shape[1] :]))  # type: ignore[no-any-return]
