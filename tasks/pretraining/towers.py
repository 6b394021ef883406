"""The two towers: images and texts to vectors of one space.

Shapes: B batch, H W image size, L tokens of a text, D length of an embedding.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage import Backbone, HeadFactory

# Makes a text tower from the length of its embeddings: a module that maps token ids `(B, L)` and lengths `(B,)` to
# `(B, D)`.
TextFactory = Callable[[int], nn.Module]

# As in CLIP: a larger factor makes training unstable.
MAX_SCALE = 100.0


class Towers(nn.Module):
    """A backbone with a head, and a text tower.

    The head is a classifier's, whose logits are the embedding: a classifier with the same head starts from these
    weights.

    Args:
        backbone: Gives the features.
        embed_dim: Length of the embeddings.
        head: Makes the image head from `(backbone.widths, embed_dim)`.
        text: Makes the text tower from `embed_dim`.

    Attributes:
        backbone: As given.
        head: The image head.
        text: The text tower.
        log_scale: Logarithm of the factor on cosine similarities, learnt.
        bias: What an objective adds to them, learnt; None where it adds nothing.

    Raises:
        ValueError: `embed_dim` is out of its range.
    """

    bias: nn.Parameter | None

    def __init__(self, backbone: Backbone, embed_dim: int, head: HeadFactory, text: TextFactory) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ValueError(f"Towers: embed_dim is {embed_dim}, expected at least 1.")
        self.embed_dim = embed_dim
        self.backbone = backbone
        self.head = head(backbone.widths, embed_dim)
        self.text = text(embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(0.0))
        self.register_parameter("bias", None)

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images `(B, 3, H, W)` to unit vectors `(B, D)`, as `encode_image`."""
        return self.encode_image(image)

    def encode_image(self, image: Tensor) -> Tensor:
        """Map normalised images `(B, 3, H, W)` to unit vectors `(B, D)`, float32."""
        return self.unit(self.embed_image(image))

    def encode_text(self, text: Tensor, length: Tensor) -> Tensor:
        """Map token ids `(B, L)` of `length` `(B,)` each to unit vectors `(B, D)`, float32."""
        return self.unit(self.embed_text(text, length))

    def embed_image(self, image: Tensor) -> Tensor:
        """Do as `encode_image`, but leave the vectors as long as they are."""
        return self.head(self.backbone(image)).float()  # type: ignore[no-any-return]

    def embed_text(self, text: Tensor, length: Tensor) -> Tensor:
        """Do as `encode_text`, but leave the vectors as long as they are."""
        # Rows that only fill up a batch have no tokens; an average over none would not be a number.
        return self.text(text, length.clamp(min=1)).float()  # type: ignore[no-any-return]

    @staticmethod
    def unit(x: Tensor) -> Tensor:
        """Scale vectors to length 1."""
        return F.normalize(x.float(), dim=-1)

    def scale(self) -> Tensor:
        """Return the factor on cosine similarities, scalar float32, at most 100."""
        log_scale = self.log_scale.float()
        # Above the maximum it still has its gradient, by which it can come back.
        return (log_scale - (log_scale - math.log(MAX_SCALE)).clamp(min=0).detach()).exp()

    @torch.no_grad()
    def start_scale(self, scale: float) -> None:
        """Set the factor on cosine similarities."""
        self.log_scale.fill_(math.log(scale))

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Bring the factor back to its maximum after a step beyond it, so that it does not wander off."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))
