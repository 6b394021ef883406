"""The InternImage backbone and the image classifier on top of it.

Shapes: B batch, H W image size in pixels, C_i channels of stage i.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internimage.backbone import Backbone
from internimage.config import DEEP_STAGE, NUM_STAGES, InternImageConfig
from internimage.heads import ConvHead
from internimage.init import init_weights
from internimage.layers import Block, Downsample, LayerNorm, Stem

# Maps (widths of the features, number of classes) to a module from the list of features to logits.
HeadFactory = Callable[[Sequence[int], int], nn.Module]


class Stage(nn.Module):
    """Downsample (but in the first stage), blocks, and where the config asks for it a norm; channels last.

    Attributes:
        blocks: The residual blocks.
        post_norms: Norms between blocks, keyed by the number of the block that each follows.
    """

    def __init__(
        self, index: int, config: InternImageConfig, drop_path_rates: Sequence[float], activation_checkpointing: bool
    ) -> None:
        super().__init__()
        width, groups = config.widths[index], config.groups[index]
        self.activation_checkpointing = activation_checkpointing
        self.downsample = Downsample(width // 2, config.norm) if index else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, groups, rate, config) for rate in drop_path_rates)
        post_norm_blocks = config.post_norm_blocks if index == DEEP_STAGE else ()
        self.post_norms = nn.ModuleDict({str(block): LayerNorm(width) for block in post_norm_blocks})
        self.norm = LayerNorm(width) if config.has_stage_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for number, block in enumerate(self.blocks):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if str(number) in self.post_norms:
                x = self.post_norms[str(number)](x)
        return self.norm(x)  # type: ignore[no-any-return]


class InternImage(Backbone):
    """Convolutional backbone of four stages whose core is DCNv3, at strides 4, 8, 16 and 32.

    Images of any size work: a stage at stride s gives `ceil(H / s)` by `ceil(W / s)`. Features are `(B, C_i, h, w)` in
    channels_last memory, since everything inside is `(B, h, w, C_i)`.

    Args:
        config: Shape and options.
        drop_path_rate: Stochastic depth of the last block, 0 to below 1; it grows linearly from 0 at the first.
        out_indices: Stages whose features are returned, ascending, from 0 to 3. Stages past the last one do not run.
        activation_checkpointing: Keep only the input of each block for the backward pass and compute the block again
            there: less memory, about a third more time.

    Attributes:
        config: As given.
        stem: Image to the input of stage 0.
        stages: The four stages; each begins with the downsample that leads to it.

    Raises:
        ValueError: An argument is out of its range, or `activation_checkpointing` meets batch norms.
    """

    def __init__(
        self,
        config: InternImageConfig,
        *,
        drop_path_rate: float = 0.0,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"InternImage: drop_path_rate is {drop_path_rate}, expected 0 <= rate < 1.")
        indices = tuple(out_indices)
        if not indices or list(indices) != sorted(set(indices)) or not set(indices) <= set(range(NUM_STAGES)):
            raise ValueError(f"InternImage: out_indices is {indices}, expected some of 0, 1, 2, 3 in ascending order.")
        if activation_checkpointing and config.norm == "BN":
            raise ValueError(
                "InternImage: activation_checkpointing runs each block twice, which would update the running "
                "statistics of norm='BN' twice a step. Use norm='LN', or turn activation_checkpointing off."
            )
        self.config = config
        self.out_indices = indices
        self.widths = tuple(config.widths[index] for index in indices)
        self.strides = tuple(4 * 2**index for index in indices)
        # Plain arithmetic, not torch.linspace: it has to work while the model is built on the meta device.
        num_blocks = sum(config.depths)
        rates = [drop_path_rate * block / max(num_blocks - 1, 1) for block in range(num_blocks)]
        starts = [sum(config.depths[:index]) for index in range(NUM_STAGES)]
        self.stem = Stem(config)
        self.stages = nn.ModuleList(
            Stage(index, config, rates[start : start + depth], activation_checkpointing)
            for index, (start, depth) in enumerate(zip(starts, config.depths, strict=True))
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Start all parameters and buffers afresh, as the authors do. For models that `to_empty` has allocated."""
        init_weights(self)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map normalised images `(B, 3, H, W)` to one feature per entry of `out_indices`, finest first."""
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape[2:]:
            raise ValueError(
                f"InternImage: image has shape {tuple(image.shape)}, expected (B, 3, H, W) with H and W at least 1."
            )
        x = self.stem(image)  # (B, H / 4, W / 4, C_0)
        features = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.out_indices:
                features.append(x.permute(0, 3, 1, 2))
            if index == self.out_indices[-1]:
                break
        return features

    def layer_groups(self) -> list[list[str]]:
        """Return parameter names per depth: the stem, then one group per block, input to output.

        The norm of a stage and the downsample after it belong to the first block of the next stage, a norm between
        blocks to the block before it, and the last stage's norm to the last block.
        """
        groups = [_names(self.stem, "stem")]
        norm: list[str] = []
        for index, stage in enumerate(self.stages):
            assert isinstance(stage, Stage)
            prefix = f"stages.{index}"
            for number, block in enumerate(stage.blocks):
                group = _names(block, f"{prefix}.blocks.{number}")
                if str(number) in stage.post_norms:
                    group += _names(stage.post_norms[str(number)], f"{prefix}.post_norms.{number}")
                groups.append(group)
            groups[-len(stage.blocks)] += norm + _names(stage.downsample, f"{prefix}.downsample")
            norm = _names(stage.norm, f"{prefix}.norm")
        groups[-1] += norm
        return groups


class Classifier(nn.Module):
    """A backbone and a head that turns its features into class logits.

    Args:
        backbone: Any backbone.
        num_classes: Length of the logits.
        head: Makes the head from `(backbone.widths, num_classes)`. T to XL use `ConvHead`, H and G `ClipProjectorHead`.

    Attributes:
        backbone: As given.
        head: The head.
    """

    def __init__(self, backbone: Backbone, num_classes: int, head: HeadFactory = ConvHead) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"Classifier: num_classes is {num_classes}, expected at least 1.")
        self.backbone = backbone
        self.head = head(backbone.widths, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map normalised images `(B, 3, H, W)` to logits `(B, num_classes)`."""
        return self.head(self.backbone(image))  # type: ignore[no-any-return]


def _names(module: nn.Module, prefix: str) -> list[str]:
    return [f"{prefix}.{name}" for name, _ in module.named_parameters()]
