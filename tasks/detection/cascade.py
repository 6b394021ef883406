"""Cascade R-CNN (arXiv:1712.00726): three stages of boxes, each trained on the boxes of the stage before it."""

from internimage import Backbone
from tasks.detection.boxes import DeltaCoder
from tasks.detection.losses import BoxLoss, decoded_giou, delta_smooth_l1, proposal_smooth_l1
from tasks.detection.mask_rcnn import RCNN
from tasks.detection.matching import MaxIoUMatcher
from tasks.detection.roi_heads import BoxStage, RoIHeads
from tasks.detection.rpn import RPN, ProposalLimits

# A later stage meets better boxes: it asks for more overlap, sees smaller deltas, and counts less.
STAGES = (
    BoxStage(MaxIoUMatcher(0.5, 0.5), DeltaCoder((0.1, 0.1, 0.2, 0.2)), 1.0),
    BoxStage(MaxIoUMatcher(0.6, 0.6), DeltaCoder((0.05, 0.05, 0.1, 0.1)), 0.5),
    BoxStage(MaxIoUMatcher(0.7, 0.7), DeltaCoder((0.033, 0.033, 0.067, 0.067)), 0.25),
)


class CascadeRCNN(RCNN):
    """Cascade R-CNN with light box heads and without masks, the authors' on InternImage-XL for CrowdHuman.

    Args:
        backbone: Any backbone.
        num_classes: Length of the class logits without the background.
        masks: Predict masks, in every stage.
        box_loss: On matched proposals.
        num_convs: Convolutions of a box head, each with synchronised batch norm.
        num_fcs: Linear layers of a box head.
        channels: Of the pyramid and of everything that is pooled from it.
        hidden_dim: Width of a box head's linear layers.
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
        masks: bool = False,
        box_loss: BoxLoss = delta_smooth_l1,
        num_convs: int = 0,
        num_fcs: int = 2,
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
            RPN(
                (*strides, 2 * strides[-1]),
                channels,
                train_limits=ProposalLimits(per_level=2000, per_image=2000),
                box_loss=proposal_smooth_l1,
                inside_only=True,
                num_samples=rpn_samples,
            ),
            RoIHeads(
                num_classes,
                strides,
                STAGES,
                box_loss=box_loss,
                masks=masks,
                num_convs=num_convs,
                num_fcs=num_fcs,
                channels=channels,
                hidden_dim=hidden_dim,
                num_samples=roi_samples,
                score=score,
                nms=nms,
                limit=limit,
            ),
            channels=channels,
        )


class CascadeMaskRCNN(CascadeRCNN):
    """Cascade Mask R-CNN as the authors train it on InternImage-L and XL: heavy box heads, GIoU loss.

    Args:
        backbone: Any backbone.
        num_classes: Length of the class logits without the background.
        channels: Of the pyramid and of everything that is pooled from it.
        hidden_dim: Width of a box head's linear layers.
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
        channels: int = 256,
        hidden_dim: int = 1024,
        rpn_samples: int = 256,
        roi_samples: int = 512,
        score: float = 0.05,
        nms: float = 0.5,
        limit: int = 100,
    ) -> None:
        super().__init__(
            backbone,
            num_classes,
            masks=True,
            box_loss=decoded_giou,
            num_convs=4,
            num_fcs=1,
            channels=channels,
            hidden_dim=hidden_dim,
            rpn_samples=rpn_samples,
            roi_samples=roi_samples,
            score=score,
            nms=nms,
            limit=limit,
        )
