"""What a task may assume of its backbone."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """An image encoder with features at several scales; any network may take part by implementing this.

    Attributes:
        widths: Channels of each feature, finest first.
        strides: Input pixels per feature pixel, finest first.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map `(B, 3, H, W)` to features `(B, widths[i], ceil(H / strides[i]), ceil(W / strides[i]))`, finest first."""
        raise NotImplementedError

    def layer_groups(self) -> list[list[str]]:
        """Return the names of all parameters, each once, grouped by depth from input to output.

        Layer-wise learning-rate decay gives each group one rate, and freezing takes groups from the front. Names are
        relative to the backbone, as in `named_parameters()`.
        """
        raise NotImplementedError
