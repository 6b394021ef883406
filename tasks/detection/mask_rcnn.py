"""Two-stage detectors: backbone, feature pyramid, proposals, RoI heads; and Mask R-CNN (arXiv:1703.06870).

torchvision's Mask R-CNN differs in the anchors, the pooling, the coding of boxes, the matching and the losses, so that
it cannot give the authors' numbers with their weights. The parts that agree are torchvision's.

Shapes: B batch, H W size of the padded image.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from datamodules.batch import DetectionTarget
from internimage import Backbone
from tasks.detection.matching import MaxIoUMatcher
from tasks.detection.postprocess import Detections
from tasks.detection.roi_heads import BoxStage, RoIHeads
from tasks.detection.rpn import RPN
from tasks.layers import FPN


class RCNN(nn.Module):
    """A two-stage detector of given parts.

    Args:
        backbone: Any backbone.
        rpn: On all levels of the pyramid.
        roi: On the levels that the backbone has.
        channels: Of the pyramid.

    Attributes:
        neck: The pyramid: a level for each feature of the backbone and one coarser.
    """

    def __init__(self, backbone: Backbone, rpn: RPN, roi: RoIHeads, *, channels: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = FPN(backbone.widths, channels)
        self.rpn = rpn
        self.roi = roi

    def forward(
        self,
        image: Tensor,
        sizes: Sequence[tuple[int, int]],
        target: Sequence[DetectionTarget] | None = None,
    ) -> dict[str, Tensor] | list[Detections]:
        """Return the weighted losses, whose sum is the total, or without a target the detections of each image.

        Args:
            image: `(B, 3, H, W)`, normalised, zero where padded.
            sizes: (height, width) of each image in the padded one.
            target: Boxes, labels and masks of each image.

        Raises:
            ValueError: Masks are trained and a target has none.
        """
        if target is not None and self.roi.mask_heads and any("masks" not in one for one in target):
            raise ValueError(
                f"{type(self).__name__}: a target has no `masks`. Load them, or build the detector without masks."
            )
        pyramid = self.neck(self.backbone(image))
        proposals, losses = self.rpn(pyramid, sizes, target)
        levels = pyramid[: len(self.roi.strides)]
        if target is None:
            found: list[Detections] = self.roi.predict(levels, proposals, sizes)
            return found
        losses |= self.roi.losses(levels, proposals, sizes, target)
        return dict(losses)


class MaskRCNN(RCNN):
    """Mask R-CNN as the authors train it on InternImage-T, S and B.

    Args:
        backbone: Any backbone.
        num_classes: Length of the class logits without the background.
        masks: Predict masks; without them it is Faster R-CNN.
        channels: Of the pyramid and of everything that is pooled from it.
        hidden_dim: Width of the box head's linear layers.
        rpn_samples: Anchors per image in the loss.
        roi_samples: Proposals per image in the loss.
        score: Smallest score of a detection.
        nms: IoU of non-maximum suppression, class by class.
        limit: Detections per image.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        masks: bool = True,
        channels: int = 256,
        hidden_dim: int = 1024,
        rpn_samples: int = 256,
        roi_samples: int = 512,
        score: float = 0.05,
        nms: float = 0.5,
        limit: int = 100,
    ) -> None:
        strides = backbone.strides
        super().__init__(
            backbone,
            RPN((*strides, 2 * strides[-1]), channels, num_samples=rpn_samples),
            RoIHeads(
                num_classes,
                strides,
                [BoxStage(MaxIoUMatcher(0.5, 0.5, low_quality=0.5))],
                masks=masks,
                channels=channels,
                hidden_dim=hidden_dim,
                num_samples=roi_samples,
                score=score,
                nms=nms,
                limit=limit,
            ),
            channels=channels,
        )
