"""What the segmentors with a score for each class and pixel have in common.

Shapes: B batch, K classes, H W size of the image.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from internimage import Backbone
from tasks.segmentation.layers import resize
from tasks.segmentation.losses import pixel_cross_entropy


class PixelSegmentor(nn.Module):
    """A backbone and a head that scores every class at every pixel, trained with cross entropy.

    Args:
        backbone: Any backbone.
        head: Maps the features, finest first, to logits `(B, K, h, w)` at the size of the finest.
        valid_only: See `pixel_cross_entropy`.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, *, valid_only: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.valid_only = valid_only

    def forward(self, image: Tensor, target: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Return the weighted losses, whose sum is the total, or without a target the logits of the finest feature.

        Args:
            image: `(B, 3, H, W)`, normalised.
            target: `(B, H, W)` int64, class numbers in [0, K), 255 where ignored.

        Returns:
            Losses by name, or `(B, K, ceil(H / s), ceil(W / s))` for the backbone's finest stride s.

        Raises:
            ValueError: Image and target differ in size.
        """
        if target is None:
            logits: Tensor = self.head(self.backbone(image))
            return logits
        if target.shape != (expected := (len(image), *image.shape[-2:])):
            raise ValueError(
                f"{type(self).__name__}: the target has shape {tuple(target.shape)}, expected {expected}, one class "
                f"number for each pixel of the image {tuple(image.shape)}. Crop and resize both alike."
            )
        return self.losses(self.backbone(image), target)

    def losses(self, features: Sequence[Tensor], target: Tensor) -> dict[str, Tensor]:
        """Return the weighted losses of the features; a segmentor with more heads adds theirs."""
        return {"cross_entropy": pixel_cross_entropy(self.head(features), target, valid_only=self.valid_only)}

    def scores(self, image: Tensor) -> Tensor:
        """Map `(B, 3, H, W)` to the logits at every pixel `(B, K, H, W)`, float32.

        These are what `tasks.segmentation.inference` averages over windows, resizes and turns into probabilities: in
        this order, which is the authors'.
        """
        logits: Tensor = self.head(self.backbone(image))
        return resize(logits.float(), image.shape[-2:])
