"""Mask2Former's network (arXiv:2112.01527) on transformers' modules: pixel decoder and decoder of masked attention.

transformers' wiring is kept. Replaced are the parts that are slow or imprecise: attentions run on our operator and on
PyTorch's fused one, no layer makes the CPU wait for the GPU, and position codes are exact in any precision.

Shapes: B batch, Q queries, K classes, C channels, S positions of all levels, h w size of the finest feature.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskedAttentionDecoderLayer,
    Mask2FormerPixelDecoder,
    Mask2FormerSinePositionEmbedding,
    Mask2FormerTransformerModule,
)

from tasks.attention import DeformableAttention, EncoderLayer, SelfAttention

# Levels of the backbone: the coarser three are encoded, the finest becomes the size of the masks.
STRIDES = (4, 8, 16, 32)
NUM_ENCODED = 3
NORM_GROUPS = 32


class MaskPrediction(NamedTuple):
    """What one layer predicts, float32 whatever the precision of the network.

    Fields:
        classes: Logits `(B, Q, K + 1)`, the last for "no object".
        masks: Logits `(B, Q, h, w)`.
    """

    classes: Tensor
    masks: Tensor


class PositionCode(Mask2FormerSinePositionEmbedding):
    """Sine code of each pixel, computed in float32: bfloat16 cannot count the pixels of a row past 256."""

    def forward(
        self, shape: torch.Size, device: torch.device | str, dtype: torch.dtype, mask: Tensor | None = None
    ) -> Tensor:
        """Return `(B, C, *shape[2:])` of `dtype`."""
        return super().forward(shape, device, torch.float32, mask).to(dtype)


class DeformableEncoder(nn.Module):
    """Layers of deformable self-attention over all levels, called as transformers calls its encoder."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(dim, num_heads, NUM_ENCODED, hidden_dim, ffn_chunks=1) for _ in range(num_layers)
        )

    def forward(
        self,
        *,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_embeddings: Tensor,
        spatial_shapes_list: Sequence[tuple[int, int]],
        **_: Any,
    ) -> BaseModelOutput:
        """Encode `(B, S, C)`; the mask `(B, S)` is True where a position is to read as zero."""
        x = inputs_embeds
        reference = _centres(spatial_shapes_list, x.device)[None, :, None].expand(len(x), -1, NUM_ENCODED, -1)
        for layer in self.layers:
            x = layer(x, position_embeddings, reference, attention_mask, spatial_shapes_list)
        return BaseModelOutput(last_hidden_state=x)


class QueryAttention(SelfAttention):
    """Attention of queries to each other, called as transformers calls its own: the batch is the second axis."""

    def forward(self, hidden_states: Tensor, position_embeddings: Tensor, **_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        """Map queries `(Q, B, C)` to `(Q, B, C)`."""
        x = hidden_states.transpose(0, 1)
        query = x + position_embeddings.transpose(0, 1)
        return super().forward(query, query, x, need_weights=False)[0].transpose(0, 1), None


class MaskedAttention(SelfAttention):
    """Attention of queries to the pixels of a level, called as transformers calls its own: the batch is second."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        """Map queries `(Q, B, C)` to `(Q, B, C)`; the mask `(B * heads, Q, pixels)` is True where one sees nothing."""
        query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        return super().forward(query, key, value, attn_mask=attn_mask, need_weights=False)[0].transpose(0, 1), None


class PixelDecoder(Mask2FormerPixelDecoder):
    """From the backbone's features to three encoded levels, and to the features that masks are drawn on.

    Args:
        config: Sizes of the head.
        widths: Channels of the features at strides 4, 8, 16 and 32.
        num_layers: Of the encoder.
    """

    def __init__(self, config: Mask2FormerConfig, widths: Sequence[int], num_layers: int) -> None:
        assert config.encoder_layers == 0, "transformers' encoder would be built for nothing"
        super().__init__(config, list(widths))
        dim = config.feature_size
        self.position_embedding = PositionCode(dim // 2, normalize=True)
        heads, hidden_dim = config.num_attention_heads, config.encoder_feedforward_dim
        self.encoder = DeformableEncoder(dim, heads, hidden_dim, num_layers)  # type: ignore[assignment]
        self.level_embed = nn.Parameter(torch.empty(NUM_ENCODED, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start all layers afresh, as the authors do."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm | nn.GroupNorm | nn.Conv2d):
                layer.reset_parameters()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
                nn.init.kaiming_uniform_(layer.weight, a=1)
        for projection in self.input_projections:
            assert isinstance(projection, nn.Sequential)
            assert isinstance(projection[0], nn.Conv2d)
            nn.init.xavier_uniform_(projection[0].weight)
        _xavier_normal(self.encoder)
        for layer in self.modules():
            if isinstance(layer, DeformableAttention):
                layer.reset_parameters()
        nn.init.normal_(self.level_embed)


class MaskDecoder(Mask2FormerTransformerModule):
    """Queries that look at the pixels of the masks they have drawn so far, level after level.

    Args:
        config: Sizes of the head.
        num_classes: K.
    """

    def __init__(self, config: Mask2FormerConfig, num_classes: int) -> None:
        super().__init__(config.feature_size, config)
        dim, num_heads = config.hidden_dim, config.num_attention_heads
        self.position_embedder = PositionCode(dim // 2, normalize=True)
        self.class_predictor = nn.Linear(dim, num_classes + 1)
        for layer in self.decoder.layers:
            assert isinstance(layer, Mask2FormerMaskedAttentionDecoderLayer)
            layer.self_attn = QueryAttention(dim, num_heads)  # type: ignore[assignment]
            layer.cross_attn = MaskedAttention(dim, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start all layers afresh, as the authors do."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear | nn.LayerNorm | nn.Embedding):
                layer.reset_parameters()
        # After the linear layers in them, since their biases are zero.
        for layer in self.modules():
            if isinstance(layer, SelfAttention):
                layer.reset_parameters()
        _xavier_normal(self.decoder.layers)

    def predict(self, levels: Sequence[Tensor], mask_features: Tensor) -> list[MaskPrediction]:
        """Return the predictions of the queries as they start and after each layer.

        Args:
            levels: `(B, C, h_i, w_i)`, coarsest first.
            mask_features: `(B, C, h, w)`.
        """
        output = self(list(levels), mask_features)
        return [
            MaskPrediction(self.class_predictor(states.transpose(0, 1)).float(), masks.float())
            for states, masks in zip(output.intermediate_hidden_states, output.masks_queries_logits, strict=True)
        ]


def _xavier_normal(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_normal_(parameter)


def _centres(shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Centre (x, y) in [0, 1] of each pixel of all levels, row by row: `(S, 2)` float32."""
    points = []
    for height, width in shapes:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        points.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(points)
