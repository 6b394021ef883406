"""Mask2Former: a fixed set of queries, each a mask and its class, for semantic, instance and panoptic segmentation.

Shapes: B batch, Q queries, K classes, H W size of the image, h w size of the finest feature.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import Mask2FormerConfig

from datamodules.batch import MaskTarget
from internimage import Backbone
from tasks.segmentation.mask2former_inference import semantic_scores
from tasks.segmentation.mask2former_layers import NORM_GROUPS, STRIDES, MaskDecoder, MaskPrediction, PixelDecoder
from tasks.segmentation.mask2former_losses import MaskLosses, masks_of_classes


class Mask2Former(nn.Module):
    """Mask2Former (arXiv:2112.01527) with the authors' settings.

    Their Cityscapes, Mapillary, NYU Depth and Pascal Context models have the sizes given here; those for ADE20K and
    COCO-Stuff have num_queries=200, dim=1024, num_heads=32, encoder_hidden_dim=4096 and hidden_dim=4096.

    The backbone may run in any precision. Predictions and losses are float32.

    Args:
        backbone: Gives features at strides 4, 8, 16 and 32.
        num_classes: K.
        num_queries: Masks that are looked for. Of more than that in an image, the rest is not learned.
        dim: Channels, divisible by 32 and by `num_heads`.
        num_heads: Of every attention.
        encoder_hidden_dim: Hidden units of the encoder's feed-forward networks.
        hidden_dim: Those of the decoder's.
        encoder_layers: Of deformable attention over the pixels.
        decoder_layers: Of masked attention of the queries.
        num_points: Points of each mask where the losses compare it.

    Attributes:
        pixel_decoder: From the features to encoded levels and mask features.
        decoder: From these to classes and masks.
        losses: From the predictions of all layers and targets to losses.

    Raises:
        ValueError: The backbone has other strides, or `dim` does not divide.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_queries: int = 100,
        dim: int = 256,
        num_heads: int = 8,
        encoder_hidden_dim: int = 1024,
        hidden_dim: int = 2048,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
        num_points: int = 12544,
    ) -> None:
        super().__init__()
        if tuple(backbone.strides) != STRIDES:
            raise ValueError(
                f"Mask2Former: the backbone gives features at strides {tuple(backbone.strides)}, expected {STRIDES}. "
                "Of InternImage, leave out_indices at (0, 1, 2, 3)."
            )
        if dim % num_heads or dim % NORM_GROUPS:
            raise ValueError(
                f"Mask2Former: dim={dim}, expected a multiple of num_heads={num_heads} and of {NORM_GROUPS}."
            )
        config = Mask2FormerConfig(
            feature_size=dim,
            mask_feature_size=dim,
            hidden_dim=dim,
            num_attention_heads=num_heads,
            encoder_feedforward_dim=encoder_hidden_dim,
            dim_feedforward=hidden_dim,
            # Ours replaces it.
            encoder_layers=0,
            # transformers counts the prediction before the first layer.
            decoder_layers=decoder_layers + 1,
            num_queries=num_queries,
        )
        self.num_classes = num_classes
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(config, backbone.widths, encoder_layers)
        self.decoder = MaskDecoder(config, num_classes)
        self.losses = MaskLosses(num_classes, num_points)

    def forward(
        self, image: Tensor, target: Tensor | Sequence[MaskTarget] | None = None
    ) -> dict[str, Tensor] | MaskPrediction:
        """Return the weighted losses, whose sum is the total, or without a target the prediction of the last layer.

        Args:
            image: `(B, 3, H, W)`, normalised.
            target: A map of classes `(B, H, W)` int64, numbers in [0, K) and 255 where ignored, of which each class
                present becomes one mask; or the labels and masks of each image.

        Raises:
            ValueError: Image and target differ in size or number, or a label is not in [0, K).
        """
        if target is None:
            return self.layers(self.backbone(image))[-1]
        targets = masks_of_classes(target) if isinstance(target, Tensor) else target
        sizes = [tuple(one["masks"].shape[-2:]) for one in targets]
        if sizes != [tuple(image.shape[-2:])] * len(image):
            raise ValueError(
                f"Mask2Former: the targets have {sizes} pixels, expected those of the image {tuple(image.shape)}. Crop "
                "and resize both alike."
            )
        return self.losses(self.layers(self.backbone(image)), targets)

    def layers(self, features: Sequence[Tensor]) -> list[MaskPrediction]:
        """Return the prediction of the queries as they start and after each decoder layer.

        Args:
            features: Of the backbone, finest first.
        """
        # Float32 under autocast, whatever the backbone gives.
        dtype = self.pixel_decoder.level_embed.dtype
        pixels = self.pixel_decoder([feature.to(dtype) for feature in features])
        return self.decoder.predict(pixels.multi_scale_features, pixels.mask_features)

    def scores(self, image: Tensor) -> Tensor:
        """Map `(B, 3, H, W)` to scores `(B, K, H, W)`, float32, positive; see `semantic_scores`."""
        return semantic_scores(self.layers(self.backbone(image))[-1], image.shape[-2:])
