"""DINO: a detector of a fixed set of queries, without anchors or non-maximum suppression (arXiv:2203.03605).

Shapes: B batch, H W size of the padded image, Q queries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, clip_boxes_to_image

from datamodules.batch import DetectionTarget
from internimage import Backbone
from tasks.detection.dino_denoising import Denoising
from tasks.detection.dino_losses import Truth, dino_losses
from tasks.detection.dino_neck import ChannelMapper
from tasks.detection.dino_transformer import DinoTransformer, Prediction
from tasks.detection.postprocess import Detections


class DINO(nn.Module):
    """DINO with the authors' settings: two-stage queries, contrastive denoising, look-forward-twice.

    Args:
        backbone: The authors use features at strides 8, 16 and 32 (`out_indices=(1, 2, 3)`).
        num_classes: Length of the class logits.
        num_queries: Objects that are looked for.
        denoising_queries: See `Denoising`: 100 for the authors' T and L, 1000 for H and G.
        label_noise: See `Denoising`.
        box_noise: See `Denoising`. The authors' 1.0 is more than the 0.4 of the paper.
        dim: Channels of neck and transformer, divisible by 32.
        hidden_dim: Hidden units of the feed-forward networks.
        num_layers: Layers of the encoder, and of the decoder.
        ffn_chunks: Compute the feed-forward networks in so many parts; 4 for the tensors of the released G.
        activation_checkpointing: Keep only the input of each transformer layer for the backward pass.
        limit: Detections per image: 100 for the authors' T, 300 for the larger ones.

    Attributes:
        neck: From the backbone to a pyramid of one level more.
        transformer: From the pyramid to classes and boxes.
        denoising: Makes additional queries in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_queries: int = 900,
        denoising_queries: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        dim: int = 256,
        hidden_dim: int = 2048,
        num_layers: int = 6,
        ffn_chunks: int = 1,
        activation_checkpointing: bool = False,
        limit: int = 300,
    ) -> None:
        super().__init__()
        self.limit = limit
        self.backbone = backbone
        self.neck = ChannelMapper(backbone.widths, dim)
        self.transformer = DinoTransformer(
            num_classes,
            len(backbone.widths) + 1,
            num_queries=num_queries,
            dim=dim,
            hidden_dim=hidden_dim,
            num_layers=num_layers,
            ffn_chunks=ffn_chunks,
            activation_checkpointing=activation_checkpointing,
        )
        self.denoising = Denoising(
            num_classes, dim, num_queries=denoising_queries, label_noise=label_noise, box_noise=box_noise
        )

    def forward(
        self, image: Tensor, sizes: Sequence[tuple[int, int]], target: Sequence[DetectionTarget] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Return the weighted losses, whose sum is the total, or without a target the detections of each image.

        Args:
            image: `(B, 3, H, W)`, normalised, zero where padded.
            sizes: (height, width) of each image in the padded one.
            target: Boxes and labels of each image.

        Raises:
            ValueError: The image is too small for the number of queries.
        """
        image_size = image.shape[-2:]
        if target is None:
            return self._detect(self.backbone(image), sizes, image_size)
        truth = [Truth.from_target(one, size) for one, size in zip(target, sizes, strict=True)]
        return self._losses(image, sizes, truth)

    def _losses(self, image: Tensor, sizes: Sequence[tuple[int, int]], truth: Sequence[Truth]) -> dict[str, Tensor]:
        proposals, layers, num_groups = self._predict(self.backbone(image), sizes, image.shape[-2:], truth)
        return dino_losses(proposals, layers, num_groups, truth)

    def _predict(
        self,
        features: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        image_size: Sequence[int],
        truth: Sequence[Truth],
    ) -> tuple[Prediction, list[Prediction], int]:
        """Return the proposals, each layer's predictions with the denoising queries first, and the number of groups."""
        memory = self.transformer.encode(self.neck(features), sizes, image_size)
        proposals = self.transformer.propose(memory)
        noised = self.denoising(truth, self.transformer.num_queries)
        content = torch.cat([noised.content, self.transformer.content(memory)], 1)
        boxes = torch.cat([noised.boxes, proposals.logits.detach()], 1).sigmoid()
        layers, _ = self.transformer.decode(memory, content, boxes, noised.hidden)
        return proposals.prediction, layers, noised.num_groups

    def _detect(
        self, features: Sequence[Tensor], sizes: Sequence[tuple[int, int]], image_size: Sequence[int]
    ) -> list[Detections]:
        """Return the `limit` best pairs of query and class of each image."""
        memory = self.transformer.encode(self.neck(features), sizes, image_size)
        proposals = self.transformer.propose(memory)
        boxes = proposals.prediction.boxes.detach()
        layers, _ = self.transformer.decode(memory, self.transformer.content(memory), boxes)
        return best(layers[-1], sizes, self.limit)


def best(prediction: Prediction, sizes: Sequence[tuple[int, int]], limit: int) -> list[Detections]:
    """Return at most `limit` pairs of query and class of each image, best first, boxes clipped to the image."""
    num_classes = prediction.logits.shape[-1]
    scores = prediction.logits.float().sigmoid().flatten(1)
    values, index = scores.topk(min(limit, scores.shape[1]))
    found = []
    for boxes, score, flat, (height, width) in zip(prediction.boxes, values, index, sizes, strict=True):
        scale = boxes.new_tensor([width, height] * 2)
        pixels = box_convert(boxes[flat // num_classes], "cxcywh", "xyxy") * scale
        pixels = clip_boxes_to_image(pixels, (height, width))
        found.append(Detections(boxes=pixels, scores=score, labels=flat % num_classes))
    return found
