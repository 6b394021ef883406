"""What decides the parameters of an InternImage, and the stacking rules of its paper (arXiv:2211.05778)."""

from dataclasses import dataclass
from typing import Literal

NUM_STAGES = 4

# The stage whose inner post-norms keep the deep models stable (`post_norm_blocks`).
DEEP_STAGE = 2

Norm = Literal["LN", "BN"]
Activation = Literal["GELU", "ReLU"]


@dataclass(frozen=True, kw_only=True)
class InternImageConfig:
    """Shape and options of an InternImage backbone; immutable and hashable.

    Attributes:
        channels: Width C1 of stage 1; stage i is `channels * 2 ** i` wide, i from 0. Even.
        depths: Blocks per stage, four of them.
        groups: DCNv3 groups per stage; each divides the width of its stage.
        mlp_ratio: Hidden width of the MLP over the width of its stage.
        layer_scale: Start value of a learned factor per channel on each residual branch, or None for no such factor.
        offset_scale: Multiplies the sampling grid and the learned offsets of DCNv3.
        post_norm: Normalise after the DCNv3 and the MLP, not before.
        res_post_norm: Normalise before and after, each with its own norm. Excludes `post_norm` and `layer_scale`.
        post_norm_blocks: Blocks of the third stage (index 2) that an additional norm follows, ascending.
        center_feature_scale: Blend the DCNv3 output with its projected input by a learned gate per group.
        remove_center: Sample the neighbours only, not the central point.
        kernel_size: Points per axis of the DCNv3 grid, odd.
        dw_kernel_size: Kernel of the depthwise convolution that feeds offsets and masks, odd.
        norm: Norm of the stem, the downsamples and the depthwise convolutions; blocks and stages use LN in any case.
        activation: Activation of the stem, the depthwise convolutions and the MLPs.
        strict: Refuse a shape that breaks the stacking rules. Turn it off to build one on purpose, as InternImage-G is.

    Raises:
        ValueError: A value is out of its range, two options exclude each other, or (`strict`) the shape breaks the
            stacking rules G_i = C_i / C' with one C' for all stages, L1 = L2 = L4, and L1 <= L3.
    """

    channels: int
    depths: tuple[int, int, int, int]
    groups: tuple[int, int, int, int]
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    offset_scale: float = 1.0
    post_norm: bool = False
    res_post_norm: bool = False
    post_norm_blocks: tuple[int, ...] = ()
    center_feature_scale: bool = False
    remove_center: bool = False
    kernel_size: int = 3
    dw_kernel_size: int = 3
    norm: Norm = "LN"
    activation: Activation = "GELU"
    strict: bool = True

    def __post_init__(self) -> None:
        self._check_shape()
        self._check_options()
        if self.strict and (broken := self.broken_rules()):
            raise ValueError(
                f"InternImageConfig: {'; '.join(broken)}. Follow the stacking rules (internimage.scaling.stacked "
                "builds such a config from four numbers), or pass strict=False to build this shape on purpose."
            )

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels per stage."""
        return (self.channels, 2 * self.channels, 4 * self.channels, 8 * self.channels)

    @property
    def has_stage_norm(self) -> bool:
        """Whether each stage ends in a norm."""
        return not self.post_norm or self.center_feature_scale

    def broken_rules(self) -> list[str]:
        """Name the stacking rules that this shape breaks, with the values that break them."""
        broken = []
        per_group = [width // groups for width, groups in zip(self.widths, self.groups, strict=True)]
        if len(set(per_group)) > 1:
            broken.append(f"channels per group are {per_group}, expected the same in every stage")
        first, second, third, last = self.depths
        if not first == second == last:
            broken.append(f"depths are {self.depths}, expected the same in stages 1, 2 and 4")
        if first > third:
            broken.append(f"depths are {self.depths}, expected stage 3 to be at least as deep as stage 1")
        return broken

    def _check_shape(self) -> None:
        for name, values in (("depths", self.depths), ("groups", self.groups)):
            if len(values) != NUM_STAGES or min(values) < 1:
                raise ValueError(f"InternImageConfig: {name} is {values}, expected {NUM_STAGES} positive numbers.")
        if self.channels < 2 or self.channels % 2:
            raise ValueError(
                f"InternImageConfig: channels is {self.channels}, expected a positive even number (the stem halves it)."
            )
        for stage, (width, groups) in enumerate(zip(self.widths, self.groups, strict=True)):
            if width % groups:
                raise ValueError(
                    f"InternImageConfig: stage {stage} is {width} channels wide, which groups[{stage}]={groups} does "
                    "not divide."
                )
        for name, size in (("kernel_size", self.kernel_size), ("dw_kernel_size", self.dw_kernel_size)):
            if size < 1 or size % 2 == 0:
                raise ValueError(f"InternImageConfig: {name} is {size}, expected a positive odd number.")
        blocks = self.post_norm_blocks
        if list(blocks) != sorted(set(blocks)) or any(not 0 <= block < self.depths[DEEP_STAGE] for block in blocks):
            raise ValueError(
                f"InternImageConfig: post_norm_blocks is {blocks}, expected ascending block numbers of stage "
                f"{DEEP_STAGE}, 0 to {self.depths[DEEP_STAGE] - 1}."
            )

    def _check_options(self) -> None:
        if self.norm not in ("LN", "BN"):
            raise ValueError(f"InternImageConfig: norm is {self.norm!r}, expected 'LN' or 'BN'.")
        if self.activation not in ("GELU", "ReLU"):
            raise ValueError(f"InternImageConfig: activation is {self.activation!r}, expected 'GELU' or 'ReLU'.")
        for name, value in (("mlp_ratio", self.mlp_ratio), ("offset_scale", self.offset_scale)):
            if value <= 0:
                raise ValueError(f"InternImageConfig: {name} is {value}, expected a positive number.")
        if self.layer_scale is not None and self.layer_scale <= 0:
            raise ValueError(
                f"InternImageConfig: layer_scale is {self.layer_scale}, expected a positive number or None."
            )
        if self.res_post_norm and (self.post_norm or self.layer_scale is not None):
            raise ValueError(
                f"InternImageConfig: res_post_norm excludes post_norm (now {self.post_norm}) and layer_scale (now "
                f"{self.layer_scale}): the authors define no such block. Turn off one of them."
            )
        if self.remove_center and self.kernel_size == 1:
            raise ValueError("InternImageConfig: remove_center leaves no point of kernel_size 1. Use 3 or more.")
