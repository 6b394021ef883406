"""The layers of InternImage (arXiv:2211.05778), channels last throughout.

Shapes: B batch, H W size of the feature map, C channels, G groups, D = C / G, K points per group and pixel.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

import ops
from internimage.config import Activation, InternImageConfig, Norm

if not hasattr(ops, "dcnv3"):
    raise ImportError(
        f"internimage: `import ops` found {ops.__file__}, not the `ops` package of this project, which has `dcnv3`. "
        "Another distribution has that name (PyPI's `ops` is Juju's library): uninstall it or use a fresh environment."
    )

# The authors' value for every layer norm; PyTorch's default is 1e-5.
LAYER_NORM_EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis with the authors' epsilon."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=LAYER_NORM_EPS)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` on `(B, H, W, C)`. The permutations are views that the library takes as channels_last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Linear(nn.Linear):
    """`nn.Linear` on `(B, H, W, C)`; in float32 on a CPU a 1x1 convolution of the same numbers.

    oneDNN's convolution uses AVX-512 wherever it exists. MKL's matrix product, which `nn.Linear` runs, does not on CPUs
    of AMD and takes twice as long there. torch chooses oneDNN for such a convolution when it has more than one thread.
    Compiled and exported graphs get the plain linear.
    """

    def forward(self, x: Tensor) -> Tensor:
        # First, since the compiler cannot trace the questions after it.
        if (
            not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and x.dtype == torch.float32
            and torch.get_num_threads() > 1
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
            and not torch.is_autocast_enabled("cpu")
        ):
            kernel = self.weight[:, :, None, None]
            return F.conv2d(x.permute(0, 3, 1, 2), kernel, self.bias).permute(0, 2, 3, 1)
        return super().forward(x)


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` on `(B, H, W, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def conv_norm(norm: Norm, channels: int) -> nn.Module:
    """Return the norm that follows a convolution."""
    return BatchNorm2d(channels) if norm == "BN" else LayerNorm(channels)


def activation_layer(activation: Activation) -> nn.Module:
    """Return the activation; GELU is the exact one."""
    return nn.ReLU() if activation == "ReLU" else nn.GELU()


class Stem(nn.Module):
    """Two strided convolutions: image `(B, 3, H, W)` to `(B, ceil(H / 4), ceil(W / 4), C1)`."""

    def __init__(self, config: InternImageConfig) -> None:
        super().__init__()
        half = config.channels // 2
        self.conv1 = Conv2d(3, half, 3, stride=2, padding=1)
        self.norm1 = conv_norm(config.norm, half)
        self.act = activation_layer(config.activation)
        self.conv2 = Conv2d(half, config.channels, 3, stride=2, padding=1)
        self.norm2 = conv_norm(config.norm, config.channels)

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 2, 3, 1).contiguous()  # (B, H, W, 3)
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halve the size and double the channels: `(B, H, W, C)` to `(B, ceil(H / 2), ceil(W / 2), 2 C)`."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv = Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = conv_norm(norm, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every factor to the start value."""
        nn.init.constant_(self.weight, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class DCNv3(nn.Module):
    """Deformable convolution v3 with its projections; keeps `(B, H, W, C)`.

    A depthwise convolution of the input predicts, for each group, where to sample the projected input (offsets in
    pixels) and how to weight the samples (softmax over the K points).
    """

    def __init__(self, channels: int, groups: int, config: InternImageConfig) -> None:
        super().__init__()
        self.groups = groups
        self.kernel_size = config.kernel_size
        self.offset_scale = config.offset_scale
        self.remove_center = config.remove_center
        points = groups * (config.kernel_size**2 - config.remove_center)
        self.dw_conv = Conv2d(
            channels, channels, config.dw_kernel_size, padding=config.dw_kernel_size // 2, groups=channels
        )
        self.dw_norm = conv_norm(config.norm, channels)
        self.act = activation_layer(config.activation)
        self.offset = Linear(channels, points * 2)
        self.mask = Linear(channels, points)
        self.input_proj = Linear(channels, channels)
        self.output_proj = Linear(channels, channels)
        self.center_feature_scale = Linear(channels, groups) if config.center_feature_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a plain average over the grid: zero offsets, equal weights, gates at one half."""
        for layer in (self.offset, self.mask, self.center_feature_scale):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        value = self.input_proj(x)
        guide = self.act(self.dw_norm(self.dw_conv(x)))
        y = ops.dcnv3(
            value,
            self.offset(guide),
            self.mask(guide),
            groups=self.groups,
            kernel_size=self.kernel_size,
            padding=self.kernel_size // 2,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
            softmax=True,
        )
        if self.center_feature_scale is not None:
            gate = F.sigmoid(self.center_feature_scale(guide)).unsqueeze(-1)  # (B, H, W, G, 1)
            by_group = value.unflatten(-1, (self.groups, -1))
            y = torch.lerp(y.view_as(by_group), by_group, gate).flatten(-2)
        return self.output_proj(y)  # type: ignore[no-any-return]


class Mlp(nn.Sequential):
    """Linear, activation, linear on the last axis."""

    def __init__(self, channels: int, hidden: int, activation: Activation) -> None:
        super().__init__(
            OrderedDict(fc1=Linear(channels, hidden), act=activation_layer(activation), fc2=Linear(hidden, channels))
        )


class Block(nn.Module):
    """DCNv3 and MLP, each a residual branch; keeps `(B, H, W, C)`.

    A branch is x + drop_path(scale * f), where f = layer(norm(x)), or norm(layer(x)) with `post_norm`, or
    res_norm(layer(norm(x))) with `res_post_norm`.
    """

    def __init__(self, channels: int, groups: int, drop_path_rate: float, config: InternImageConfig) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.norm1 = LayerNorm(channels)
        self.dcn = DCNv3(channels, groups, config)
        self.norm2 = LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * config.mlp_ratio), config.activation)
        self.res_norm1 = LayerNorm(channels) if config.res_post_norm else nn.Identity()
        self.res_norm2 = LayerNorm(channels) if config.res_post_norm else nn.Identity()
        start = config.layer_scale
        self.scale1 = nn.Identity() if start is None else LayerScale(channels, start)
        self.scale2 = nn.Identity() if start is None else LayerScale(channels, start)
        self.drop_path = StochasticDepth(drop_path_rate, "row") if drop_path_rate else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.drop_path(self.scale1(self.norm1(self.dcn(x))))
            return x + self.drop_path(self.scale2(self.norm2(self.mlp(x))))  # type: ignore[no-any-return]
        x = x + self.drop_path(self.scale1(self.res_norm1(self.dcn(self.norm1(x)))))
        return x + self.drop_path(self.scale2(self.res_norm2(self.mlp(self.norm2(x)))))  # type: ignore[no-any-return]
