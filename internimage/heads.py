"""Classification heads: the list of a backbone's features to logits.

Shapes: B batch, C4 channels of the last feature, h w its size.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from internimage.config import Activation
from internimage.init import init_weights
from internimage.layers import LayerNorm, activation_layer


class ConvHead(nn.Module):
    """1x1 convolution, batch norm, activation, global average and a linear layer, on the last feature (T to XL).

    Args:
        widths: Channels of the backbone's features; the last one counts.
        num_classes: Length of the logits.
        ratio: Channels after the convolution over those before it.
        activation: Activation after the batch norm.
    """

    def __init__(
        self, widths: Sequence[int], num_classes: int, *, ratio: float = 1.5, activation: Activation = "GELU"
    ) -> None:
        super().__init__()
        hidden = int(widths[-1] * ratio)
        self.conv = nn.Conv2d(widths[-1], hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.act = activation_layer(activation)
        self.fc = nn.Linear(hidden, num_classes)
        init_weights(self)

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Map features to one vector per image, the input of the linear layer: `(B, int(ratio * C4))`."""
        return self.act(self.norm(self.conv(features[-1]))).mean((2, 3))  # type: ignore[no-any-return]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features to logits `(B, num_classes)`."""
        return self.fc(self.embed(features))  # type: ignore[no-any-return]


class AttentionPool(nn.Module):
    """One vector from many tokens: attention whose only query is their mean, `(B, N, dim)` to `(B, out_dim)`.

    Query, key and value each have a norm of their own. There is no residual and no positional embedding.
    """

    def __init__(self, dim: int, out_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = LayerNorm(dim)
        self.norm_k = LayerNorm(dim)
        self.norm_v = LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, out_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.q(self.norm_q(tokens.mean(1, keepdim=True)))  # (B, 1, dim)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, 1 or N, dim / heads)
            for x in (query, self.k(self.norm_k(tokens)), self.v(self.norm_v(tokens)))
        )
        pooled = F.scaled_dot_product_attention(query, key, value)
        return self.proj(pooled.flatten(1))  # type: ignore[no-any-return]


class ClipProjectorHead(nn.Module):
    """Attention pooling of the last two features, as trained jointly with text, and a linear layer (H and G).

    Args:
        widths: Channels of the backbone's features, at least two; the last two, at strides 16 and 32, count.
        num_classes: Length of the logits.
        hidden_dim: Channels of the tokens.
        embed_dim: Channels of the pooled vector; 768 is that of the text encoder.
        num_heads: Heads of the attention pooling; divides `hidden_dim`.

    Raises:
        ValueError: Fewer than two features, or `num_heads` does not divide `hidden_dim`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        hidden_dim: int = 1024,
        embed_dim: int = 768,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(
                f"ClipProjectorHead: the backbone gives {len(widths)} feature, expected the two at strides 16 and 32. "
                "Add stage 2 to its out_indices."
            )
        if hidden_dim % num_heads:
            raise ValueError(f"ClipProjectorHead: num_heads={num_heads} does not divide hidden_dim={hidden_dim}.")
        self.project3 = nn.Conv2d(widths[-2], hidden_dim, 1)
        self.project4 = nn.Conv2d(widths[-1], hidden_dim * 4, 1)
        self.pool = AttentionPool(hidden_dim, embed_dim, num_heads)
        self.fc_norm = LayerNorm(embed_dim)
        self.fc = nn.Linear(embed_dim, num_classes)
        init_weights(self)

    def tokens(self, features: Sequence[Tensor]) -> Tensor:
        """Map features to the tokens that are pooled, at the stride of the finer one: `(B, hidden_dim, 2 h, 2 w)`.

        Raises:
            ValueError: The last two features differ by another factor than 2, so the image is not divisible by 32.
        """
        fine, coarse = features[-2], features[-1]
        if fine.shape[2] != 2 * coarse.shape[2] or fine.shape[3] != 2 * coarse.shape[3]:
            raise ValueError(
                f"ClipProjectorHead: the features are {tuple(fine.shape[2:])} and {tuple(coarse.shape[2:])} pixels, "
                "expected the first to be twice the second. Use images whose height and width are divisible by 32."
            )
        return F.pixel_shuffle(self.project4(coarse), 2) + self.project3(fine)  # type: ignore[no-any-return]

    def pool_tokens(self, tokens: Tensor) -> Tensor:
        """Map what `tokens` gives to one vector per image, the input of the linear layer: `(B, embed_dim)`."""
        return self.fc_norm(self.pool(tokens.flatten(2).transpose(1, 2)))  # type: ignore[no-any-return]

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Map features to one vector per image, the input of the linear layer: `(B, embed_dim)`.

        Raises:
            ValueError: As of `tokens`.
        """
        return self.pool_tokens(self.tokens(features))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Map features to logits `(B, num_classes)`."""
        return self.fc(self.embed(features))  # type: ignore[no-any-return]
