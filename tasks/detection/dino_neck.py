"""The neck of DINO: every level of the backbone at the same width, and one coarser level."""

from collections.abc import Sequence

from torch import Tensor, nn

NUM_NORM_GROUPS = 32


class ChannelMapper(nn.Module):
    """A 1x1 convolution and a group norm for each feature, and a 3x3 one of stride 2 on the last feature.

    Args:
        widths: Channels of the features, finest first.
        channels: Channels of every output, divisible by 32.
    """

    def __init__(self, widths: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        if channels % NUM_NORM_GROUPS:
            raise ValueError(f"ChannelMapper: channels is {channels}, expected a multiple of {NUM_NORM_GROUPS}.")
        convs = [nn.Conv2d(width, channels, 1, bias=False) for width in widths]
        convs.append(nn.Conv2d(widths[-1], channels, 3, stride=2, padding=1, bias=False))
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.GroupNorm(NUM_NORM_GROUPS, channels) for _ in convs)

        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the convolutions afresh; the norms start themselves."""
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Map `len(widths)` features `(B, C_i, h_i, w_i)` to one map more, all of `channels`."""
        inputs = [*features, features[-1]]
        return [norm(conv(x)) for x, conv, norm in zip(inputs, self.convs, self.norms, strict=True)]
