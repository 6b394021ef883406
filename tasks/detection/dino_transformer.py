"""DINO's transformer: from the pyramid to the classes and boxes of every decoder layer.

Shapes: B batch, L levels, S positions of all levels, Q queries, C channels. Boxes are (cx, cy, w, h) over the size of
the unpadded image, float32 whatever the precision of the network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tasks.attention import DeformableAttention, EncoderLayer, SelfAttention
from tasks.detection.dino_layers import DecoderLayer, inverse_sigmoid, mlp, sine_code

# Wavelengths of the position codes reach 2 pi times this.
IMAGE_TEMPERATURE, BOX_TEMPERATURE = 20.0, 10000.0
# Width and height of a proposal at the finest level; they double from level to level.
PROPOSAL_SIZE = 0.05
# A position nearer to the border than this proposes nothing.
PROPOSAL_MARGIN = 0.01
# Probability of each class at the start.
PRIOR = 0.01


class Prediction(NamedTuple):
    """Class logits `(B, Q, num_classes)` and boxes `(B, Q, 4)` in [0, 1]."""

    logits: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Memory:
    """What the encoder made of the images.

    Attributes:
        tokens: `(B, S, C)`, the levels one after another.
        padding: `(B, S)` bool, True outside the image.
        shapes: (height, width) of each level.
        ratios: `(B, L, 2)`, share of the width and of the height of each level that the image covers.
    """

    tokens: Tensor
    padding: Tensor
    shapes: tuple[tuple[int, int], ...]
    ratios: Tensor


@dataclass(frozen=True)
class Proposals:
    """The positions whose best class scores highest.

    Attributes:
        index: `(B, Q)`, in the positions of the memory.
        prediction: Their classes and boxes.
        logits: `(B, Q, 4)`, the boxes before the sigmoid.
    """

    index: Tensor
    prediction: Prediction
    logits: Tensor


class DinoTransformer(nn.Module):
    """Deformable encoder, two-stage proposals, and decoder with iterative refinement and look-forward-twice.

    Args:
        num_classes: Length of the class logits.
        num_levels: Levels of the pyramid.
        num_queries: Proposals that the decoder refines.
        dim: Channels.
        num_heads: Heads of every attention; divides `dim`.
        hidden_dim: Hidden units of the feed-forward networks.
        num_layers: Layers of the encoder, and of the decoder.
        ffn_chunks: Compute the feed-forward networks in so many parts (see `ChunkedFFN`).
        activation_checkpointing: Keep only the input of each layer for the backward pass.

    Attributes:
        classes: To class logits, one for each decoder layer and the last for the proposals.
        boxes: To box refinements, likewise.
    """

    def __init__(
        self,
        num_classes: int,
        num_levels: int,
        *,
        num_queries: int = 900,
        dim: int = 256,
        num_heads: int = 8,
        hidden_dim: int = 2048,
        num_layers: int = 6,
        ffn_chunks: int = 1,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.num_queries, self.dim = num_queries, dim
        self.activation_checkpointing = activation_checkpointing
        options = (dim, num_heads, num_levels, hidden_dim, ffn_chunks)
        self.level_embeds = nn.Parameter(torch.empty(num_levels, dim))
        self.encoder = nn.ModuleList(EncoderLayer(*options) for _ in range(num_layers))
        self.proposal = nn.Linear(dim, dim)
        self.proposal_norm = nn.LayerNorm(dim)
        self.query = nn.Embedding(num_queries, dim)
        self.position = mlp(2 * dim, dim, dim)
        self.decoder = nn.ModuleList(DecoderLayer(*options) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.classes = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(num_layers + 1))
        self.boxes = nn.ModuleList(mlp(dim, dim, dim, 4) for _ in range(num_layers + 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start all layers afresh: rare classes, boxes that stay where they are proposed."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                layer.reset_parameters()
        for part in (self.encoder, self.decoder, self.position, self.proposal):
            for parameter in part.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        for layer in self.modules():
            if isinstance(layer, DeformableAttention | SelfAttention):
                layer.reset_parameters()
        nn.init.normal_(self.level_embeds)
        nn.init.normal_(self.query.weight)
        for to_classes, to_boxes in zip(self.classes, self.boxes, strict=True):
            assert isinstance(to_classes, nn.Linear)
            assert isinstance(to_boxes, nn.Sequential)
            nn.init.constant_(to_classes.bias, math.log(PRIOR / (1 - PRIOR)))
            for parameter in to_boxes[-1].parameters():
                nn.init.zeros_(parameter)

    def encode(self, levels: Sequence[Tensor], sizes: Sequence[tuple[int, int]], image_size: Sequence[int]) -> Memory:
        """Run the encoder.

        Args:
            levels: `(B, C, h_i, w_i)`, finest first.
            sizes: (height, width) of each image without padding, in pixels.
            image_size: (height, width) of the padded images.
        """
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        masks = _padding_masks(shapes, sizes, image_size, levels[0].device)
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
        covered = torch.stack([_covered(mask) for mask in masks], 1)  # (B, L, 2)
        ratios = covered / torch.tensor([(width, height) for height, width in shapes], device=covered.device)
        positions, references = [], []
        for number, mask in enumerate(masks):
            code = _position_code(mask, self.dim // 2).flatten(1, 2).to(tokens.dtype)
            positions.append(code + self.level_embeds[number])
            references.append(_centres(mask) / covered[:, number, None])
        # Centres over the unpadded image, for each level then over its padded map.
        reference = torch.cat(references, 1)[:, :, None] * ratios[:, None]
        position = torch.cat(positions, 1)
        padding = torch.cat([mask.flatten(1) for mask in masks], 1)
        for layer in self.encoder:
            tokens = self._run(layer, tokens, position, reference, padding, shapes)
        return Memory(tokens, padding, shapes, ratios)

    def propose(self, memory: Memory) -> Proposals:
        """Return the best `num_queries` positions of the memory.

        Raises:
            ValueError: There are fewer positions.
        """
        num_positions = memory.tokens.shape[1]
        if num_positions < self.num_queries:
            raise ValueError(
                f"DINO: the image has {num_positions} positions, expected at least num_queries={self.num_queries}. "
                "Use larger images or fewer queries."
            )
        anchors = []
        masks = torch.split(memory.padding, [height * width for height, width in memory.shapes], 1)
        for number, (flat, shape) in enumerate(zip(masks, memory.shapes, strict=True)):
            mask = flat.view(-1, *shape)
            centre = _centres(mask) / _covered(mask)[:, None]
            anchors.append(torch.cat([centre, torch.full_like(centre, PROPOSAL_SIZE * 2**number)], -1))
        anchor = torch.cat(anchors, 1)
        inside = ((anchor > PROPOSAL_MARGIN) & (anchor < 1 - PROPOSAL_MARGIN)).all(-1) & ~memory.padding
        outside = ~inside[..., None]
        anchor = (anchor / (1 - anchor)).log().masked_fill(outside, math.inf)
        tokens = self.proposal_norm(self.proposal(memory.tokens.masked_fill(outside, 0)))
        logits = self.classes[-1](tokens)
        boxes = self.boxes[-1](tokens).float() + anchor
        index = highest(logits.amax(-1), self.num_queries)
        logits = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return Proposals(index, Prediction(logits, boxes.sigmoid()), boxes)

    def content(self, memory: Memory) -> Tensor:
        """Return what the queries start from beside their boxes, equal for all images: `(B, Q, C)`."""
        weight: Tensor = self.query.weight
        return weight.expand(len(memory.tokens), -1, -1)

    def decode(
        self, memory: Memory, content: Tensor, boxes: Tensor, hidden: Tensor | None = None
    ) -> tuple[list[Prediction], list[Tensor]]:
        """Refine queries layer by layer.

        Args:
            memory: Of the encoder.
            content: `(B, Q, C)`.
            boxes: `(B, Q, 4)` to start from, in [0, 1].
            hidden: `(Q, Q)` bool, True where a query (row) must not see another (column).

        Returns:
            The predictions of each layer, and the references: `boxes` and then what each layer refined them to.
        """
        predictions, references = [], [boxes]
        scale = memory.ratios.repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        x = content
        for layer, to_classes, to_boxes in zip(self.decoder, self.classes[:-1], self.boxes[:-1], strict=True):
            reference = boxes[:, :, None] * scale
            # y before x, as in the codes of the image; but over the padded image, so that padding matters a little.
            code = sine_code(reference[:, :, 0, [1, 0, 2, 3]], self.dim // 2, BOX_TEMPERATURE).flatten(-2)
            position = self.position(code.to(content.dtype))
            x = self._run(layer, x, position, hidden, memory.tokens, reference, memory.padding, memory.shapes)
            normed = self.norm(x)
            # These boxes keep their gradient, so that a layer also learns from the loss of the next one.
            refined = (to_boxes(normed).float() + inverse_sigmoid(references[-1])).sigmoid()
            predictions.append(Prediction(to_classes(normed), refined))
            references.append((to_boxes(x).float() + inverse_sigmoid(boxes)).sigmoid())
            boxes = references[-1].detach()
        return predictions, references

    def _run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return layer(*inputs)  # type: ignore[no-any-return]


def highest(scores: Tensor, number: int) -> Tensor:
    """Return the positions of the highest of `scores` `(B, S)`, best first: `(B, number)`."""
    return scores.topk(number, 1).indices


def _padding_masks(
    shapes: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]], image_size: Sequence[int], device: torch.device
) -> list[Tensor]:
    """For each level `(B, h, w)` bool, True where the nearest pixel is padding."""
    mask = torch.ones(1, len(sizes), *image_size, device=device)
    for image, (height, width) in zip(mask[0], sizes, strict=True):
        image[:height, :width] = 0
    return [F.interpolate(mask, shape)[0].bool() for shape in shapes]


def _covered(mask: Tensor) -> Tensor:
    """Columns and rows of a map that the image covers: `(B, h, w)` bool to `(B, 2)` float32."""
    return torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], -1).float()


def _centres(mask: Tensor) -> Tensor:
    """(x, y) of the pixel centres of a map `(B, h, w)`, row by row: `(h * w, 2)`."""
    y, x = (torch.arange(length, device=mask.device) + 0.5 for length in mask.shape[1:])
    return torch.cartesian_prod(y, x).flip(-1)


def _position_code(mask: Tensor, channels: int) -> Tensor:
    """Code the row and the column over the covered ones: `(B, h, w)` bool to `(B, h, w, 2 * channels)`."""
    codes = []
    for axis in (1, 2):
        count = (~mask).cumsum(axis, dtype=torch.float32)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        codes.append(sine_code(count / (last + 1e-6), channels, IMAGE_TEMPERATURE))
    return torch.cat(codes, -1)
