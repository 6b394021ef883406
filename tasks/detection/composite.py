"""CB-InternImage: two backbones, of which the first assists the second at every stage (arXiv:2107.00420); with DINO.

Shapes: B batch, H W size of the padded image, C channels of a stage.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from internimage import Backbone, InternImage, internimage_h
from tasks.detection.dino import DINO
from tasks.detection.dino_losses import Truth, dino_losses
from tasks.detection.dino_transformer import Prediction

# Weight of the losses from the features of the assisting backbone; those of the lead count in full.
ASSIST_WEIGHT = 0.5


class Junction(nn.Module):
    """Where the assisting features join a stage of the lead: after its downsample, before its blocks.

    Args:
        downsample: Of the stage.
        widths: Channels of the stage and of all after it.
        half_gamma: See `CompositeInternImage`.
    """

    def __init__(self, downsample: nn.Module, widths: Sequence[int], half_gamma: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.linears = nn.ModuleList(nn.Conv2d(width, widths[0], 1) for width in widths[1:])
        self.gamma = nn.Parameter(torch.zeros(widths[0]))
        self.half_gamma = half_gamma

    def reset_parameters(self) -> None:
        """Start without assistance."""
        nn.init.zeros_(self.gamma)

    def forward(self, inputs: tuple[Tensor, Sequence[Tensor]]) -> Tensor:
        """Map the output of the stage before, channels last, and the assisting features from this stage on, NCHW."""
        x, assist = inputs
        x = self.downsample(x)
        total = assist[0]
        for linear, feature in zip(self.linears, assist[1:], strict=True):
            total = total + F.interpolate(linear(feature), total.shape[-2:])
        gamma: Tensor = self.gamma
        if self.half_gamma:
            # The value is rounded, the gradient is not: it would overflow in float16.
            gamma = gamma + (gamma.half().to(gamma.dtype) - gamma).detach()
        return x + gamma * total.permute(0, 2, 3, 1)  # type: ignore[no-any-return]


class CompositeInternImage(Backbone):
    """Two InternImages on one image, the first of which assists the second.

    The second starts from the first one's stem. Each of its stages takes its own input plus the features of the first
    from that stage on, projected, enlarged, summed and scaled by a learned factor per channel.

    Any batch and image size works. (The authors' code needs sizes divisible by 32.)

    Args:
        assist: The first backbone, all of whose stages are used.
        lead: The second, of the same config. It is taken over: it loses its stem, and its downsamples are wrapped.
        half_gamma: Round the learned factors to float16, as the authors' code does in any precision, so that released
            weights give its numbers.

    Raises:
        ValueError: The two have different widths.
    """

    def __init__(self, assist: InternImage, lead: InternImage, *, half_gamma: bool = True) -> None:
        super().__init__()
        if assist.config.widths != lead.config.widths:
            raise ValueError(
                f"CompositeInternImage: assist is {assist.config.widths} channels wide and lead {lead.config.widths}, "
                "expected two backbones of one config."
            )
        self.assist, self.lead = assist, lead
        self.widths, self.strides, self.out_indices = lead.widths, lead.strides, lead.out_indices
        lead.register_module("stem", nn.Identity())
        for number, stage in enumerate(lead.stages):
            assert isinstance(stage.downsample, nn.Module)
            stage.downsample = Junction(stage.downsample, lead.config.widths[number:], half_gamma)

    def streams(self, image: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Map normalised images `(B, 3, H, W)` to the features of the assist and those of the lead, finest first."""
        start = self.assist.stem(image)  # (B, H / 4, W / 4, C)
        x, assist = start, []
        for stage in self.assist.stages:
            x = stage(x)
            assist.append(x.permute(0, 3, 1, 2))
        x, lead = start, []
        for number, stage in enumerate(self.lead.stages):
            x = stage((x, assist[number:]))
            lead.append(x.permute(0, 3, 1, 2))
        return [assist[index] for index in self.out_indices], [lead[index] for index in self.out_indices]

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map normalised images `(B, 3, H, W)` to the features of the lead, finest first."""
        return self.streams(image)[1]

    def layer_groups(self) -> list[list[str]]:
        """Return parameter names per depth, each group of the assist together with that of the lead.

        What joins the two at a stage belongs to the stage's first block.
        """
        return [
            [*(f"assist.{name}" for name in assist), *(f"lead.{name}" for name in lead)]
            for assist, lead in zip(self.assist.layer_groups(), self.lead.layer_groups(), strict=True)
        ]


def cb_internimage_h(
    *,
    drop_path_rate: float = 0.5,
    out_indices: tuple[int, ...] = (1, 2, 3),
    activation_checkpointing: bool = False,
    half_gamma: bool = True,
) -> CompositeInternImage:
    """Build CB-InternImage-H: 2.15 G parameters."""
    assist, lead = (
        internimage_h(drop_path_rate=drop_path_rate, out_indices=out, activation_checkpointing=activation_checkpointing)
        for out in ((0, 1, 2, 3), out_indices)
    )
    return CompositeInternImage(assist, lead, half_gamma=half_gamma)


class CompositeDINO(DINO):
    """DINO on a composite backbone: it is trained on the features of both, and detects with those of the lead.

    The losses from the assist's features have half the weight, and each half of the doubled batch counts its own
    objects. The authors' code does this with one image per process only; here the batch may have any size.

    Args:
        backbone: The two backbones.
        num_classes: Length of the class logits.
        **options: Of `DINO`.
    """

    backbone: CompositeInternImage

    def _losses(self, image: Tensor, sizes: Sequence[tuple[int, int]], truth: Sequence[Truth]) -> dict[str, Tensor]:
        assist, lead = self.backbone.streams(image)
        features = [torch.cat(pair) for pair in zip(assist, lead, strict=True)]
        proposals, layers, groups = self._predict(features, [*sizes, *sizes], image.shape[-2:], [*truth, *truth])
        losses: dict[str, Tensor] = {}
        for number, (name, weight) in enumerate((("assist", ASSIST_WEIGHT), ("lead", 1.0))):
            half = slice(number * len(truth), (number + 1) * len(truth))
            of_half = dino_losses(_images(proposals, half), [_images(layer, half) for layer in layers], groups, truth)
            losses |= {f"{name}_{what}": weight * loss for what, loss in of_half.items()}
        return losses


def _images(prediction: Prediction, images: slice) -> Prediction:
    return Prediction(prediction.logits[images], prediction.boxes[images])
