"""The released sizes of InternImage, and a tiny one for tests and debugging.

Each function builds a backbone with the settings of the released ImageNet classifier and random weights. Dense tasks
switch `layer_scale` (1.0 for T in the authors' detectors and segmentors) and raise `drop_path_rate`. Arguments:

- `drop_path_rate`: stochastic depth of the last block, 0 to below 1.
- `layer_scale`: start value of the learned factor per channel on each residual branch, or None for no factor. H takes
  None only: the authors define no layer scale beside its residual post-norm.
- `out_indices`: stages whose features are returned, ascending, from 0 to 3.
- `activation_checkpointing`: less memory in training, about a third more time.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from internimage.config import InternImageConfig
from internimage.model import InternImage

_FOUR_STAGES = (0, 1, 2, 3)

# What the released classifiers are, by size.
CONFIGS: Mapping[str, InternImageConfig] = MappingProxyType(
    {
        "T": InternImageConfig(channels=64, depths=(4, 4, 18, 4), groups=(4, 8, 16, 32)),
        "S": InternImageConfig(
            channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), layer_scale=1e-5, post_norm=True
        ),
        "B": InternImageConfig(
            channels=112, depths=(4, 4, 21, 4), groups=(7, 14, 28, 56), layer_scale=1e-5, post_norm=True
        ),
        "L": InternImageConfig(
            channels=160,
            depths=(5, 5, 22, 5),
            groups=(10, 20, 40, 80),
            layer_scale=1e-5,
            offset_scale=2.0,
            post_norm=True,
        ),
        "XL": InternImageConfig(
            channels=192,
            depths=(5, 5, 24, 5),
            groups=(12, 24, 48, 96),
            layer_scale=1e-5,
            offset_scale=2.0,
            post_norm=True,
        ),
        "H": InternImageConfig(
            channels=320,
            depths=(6, 6, 32, 6),
            groups=(10, 20, 40, 80),
            res_post_norm=True,
            post_norm_blocks=(5, 11, 17, 23, 29),
            center_feature_scale=True,
            dw_kernel_size=5,
        ),
        "G": InternImageConfig(
            channels=512,
            depths=(2, 2, 48, 4),
            groups=(16, 32, 64, 128),
            post_norm=True,
            post_norm_blocks=(5, 11, 17, 23, 29, 35, 41, 47),
            center_feature_scale=True,
            dw_kernel_size=5,
            strict=False,  # L1 = L2 = 2, L4 = 4: the authors left their rule here
        ),
    }
)


def internimage_t(
    *,
    drop_path_rate: float = 0.1,
    layer_scale: float | None = None,
    out_indices: tuple[int, ...] = _FOUR_STAGES,
    activation_checkpointing: bool = False,
) -> InternImage:
    """InternImage-T: 29 M parameters, widths 64 to 512, depths 4, 4, 18, 4."""
    return InternImage(
        replace(CONFIGS["T"], layer_scale=layer_scale),
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        activation_checkpointing=activation_checkpointing,
    )


def internimage_s(
    *,
    drop_path_rate: float = 0.4,
    layer_scale: float | None = 1e-5,
    out_indices: tuple[int, ...] = _FOUR_STAGES,
    activation_checkpointing: bool = False,
) -> InternImage:
    """InternImage-S: 49 M parameters, widths 80 to 640, depths 4, 4, 21, 4."""
    return InternImage(
        replace(CONFIGS["S"], layer_scale=layer_scale),
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        activation_checkpointing=activation_checkpointing,
    )


def internimage_b(
    *,
    drop_path_rate: float = 0.5,
    layer_scale: float | None = 1e-5,
    out_indices: tuple[int, ...] = _FOUR_STAGES,
    activation_checkpointing: bool = False,
) -> InternImage:
    """InternImage-B: 95 M parameters, widths 112 to 896, depths 4, 4, 21, 4."""
    return InternImage(
        replace(CONFIGS["B"], layer_scale=layer_scale),
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        activation_checkpointing=activation_checkpointing,
    )


def internimage_l(
    *,
    drop_path_rate: float = 0.1,
    layer_scale: float | None = 1e-5,
    out_indices: tuple[int, ...] = _FOUR_STAGES,
    activation_checkpointing: bool = False,
) -> InternImage:
    """InternImage-L: 219 M parameters, widths 160 to 1280, depths 5, 5, 22, 5, sampling grid of twice the radius."""
    return InternImage(
        replace(CONFIGS["L"], layer_scale=layer_scale),
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        activation_checkpointing=activation_checkpointing,
    )


def internimage_xl(
    *,
    drop_path_rate: float = 0.2,
    layer_scale: float | None = 1e-5,
    out_indices: tuple[int, ...] = _FOUR_STAGES,
    activation_checkpointing: bool = False,
) -> InternImage:
    """InternImage-XL: 329 M parameters, widths 192 to 1536, depths 5, 5, 24, 5, sampling grid of twice the radius."""
    return InternImage(
        replace(CONFIGS["XL"], layer_scale=layer_scale),
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        activation_checkpointing=activation_checkpointing,
    )


def internimage_h(
    *,
    drop_path_rate: float = 0.2,
    layer_scale: float | None = None,
    out_indices: tuple[int, ...] = _FOUR_STAGES,
    activation_checkpointing: bool = False,
) -> InternImage:
    """InternImage-H: 1.07 G parameters, widths 320 to 2560, depths 6, 6, 32, 6. Classifiers use ClipProjectorHead."""
    return InternImage(
        replace(CONFIGS["H"], layer_scale=layer_scale),
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        activation_checkpointing=activation_checkpointing,
    )


def internimage_g(
    *,
    drop_path_rate: float = 0.4,
    layer_scale: float | None = None,
    out_indices: tuple[int, ...] = _FOUR_STAGES,
    activation_checkpointing: bool = False,
) -> InternImage:
    """InternImage-G: 3.05 G parameters, widths 512 to 4096, depths 2, 2, 48, 4. Classifiers use ClipProjectorHead."""
    return InternImage(
        replace(CONFIGS["G"], layer_scale=layer_scale),
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        activation_checkpointing=activation_checkpointing,
    )


def internimage_debug(
    *,
    drop_path_rate: float = 0.0,
    layer_scale: float | None = None,
    out_indices: tuple[int, ...] = _FOUR_STAGES,
    activation_checkpointing: bool = False,
) -> InternImage:
    """Build a backbone of five blocks and 0.5 M parameters: every stage is there, and a test can afford it."""
    return InternImage(
        InternImageConfig(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), layer_scale=layer_scale),
        drop_path_rate=drop_path_rate,
        out_indices=out_indices,
        activation_checkpointing=activation_checkpointing,
    )
