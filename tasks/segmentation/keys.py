"""Names of tensors in the authors' UPerNet and SegFormer and in ours: a one-to-one map, both directions.

The differences: their convolutions stand beside their batch norm in a wrapper, and blocks have other names. The map
covers both heads, whichever a segmentor has.
"""

from collections.abc import Iterator, Mapping
from functools import cache

from torch import Tensor

from internimage import InternImageConfig
from internimage import keys as backbone_names
from tasks.segmentation.upernet import POOL_SIDES

_AFFINE = ("weight", "bias")
_BATCH_NORM = (*_AFFINE, "running_mean", "running_var", "num_batches_tracked")
_NUM_LEVELS = 4
_CLASSIFIER = "decode_head.conv_seg"


def segmentor_official_to_ours(key: str, config: InternImageConfig) -> str:
    """Map a key of the authors' UPerNet or SegFormer to ours.

    Args:
        key: For example `decode_head.psp_modules.0.1.conv.weight` or `auxiliary_head.conv_seg.bias`.
        config: Of the backbone; depths, norm and post_norm_blocks matter.

    Returns:
        The key in `PixelSegmentor.state_dict()`.

    Raises:
        KeyError: No tensor of such a segmentor has this key.
    """
    if key.startswith("backbone."):
        return backbone_names.official_to_ours(key, config)
    if (ours := _segmentor_keys().get(key)) is not None:
        return ours
    raise KeyError(f"segmentor_official_to_ours: the authors' UPerNet and SegFormer have no tensor {key!r}.")


def segmentor_ours_to_official(key: str, config: InternImageConfig) -> str:
    """Map a key of our `UPerNet` or `SegFormer` to the authors'; the inverse of `segmentor_official_to_ours`.

    Args:
        key: For example `head.pooling.branches.0.conv.weight`.
        config: Of the backbone; depths, norm and post_norm_blocks matter.

    Raises:
        KeyError: No tensor of such a segmentor has this key.
    """
    if key.startswith("backbone."):
        return backbone_names.ours_to_official(key, config, dense=True)
    if (official := _inverse_segmentor_keys().get(key)) is not None:
        return official
    raise KeyError(f"segmentor_ours_to_official: UPerNet and SegFormer have no tensor {key!r}.")


def num_segmentor_classes(tensors: Mapping[str, Tensor]) -> int:
    """Count the classes that the authors' UPerNet or SegFormer scores.

    Some of their configs state another number than the data set has, so the weights decide.

    Args:
        tensors: By the authors' keys.

    Raises:
        KeyError: It has no such classifier.
    """
    key = f"{_CLASSIFIER}.weight"
    if key not in tensors:
        raise KeyError(f"num_segmentor_classes: no tensor {key!r}, so this is neither UPerNet nor SegFormer.")
    return tensors[key].shape[0]


@cache
def _segmentor_keys() -> Mapping[str, str]:
    return dict(_segmentor())


@cache
def _inverse_segmentor_keys() -> Mapping[str, str]:
    return {ours: official for official, ours in _segmentor()}


def _tensors(official: str, ours: str, names: tuple[str, ...] = _AFFINE) -> Iterator[tuple[str, str]]:
    for name in names:
        yield f"{official}.{name}", f"{ours}.{name}"


def _conv_norm(official: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{official}.conv.weight", f"{ours}.conv.weight"
    yield from _tensors(f"{official}.bn", f"{ours}.norm", _BATCH_NORM)


def _segmentor() -> Iterator[tuple[str, str]]:
    yield from _tensors(_CLASSIFIER, "head.classifier")
    yield from _tensors("auxiliary_head.conv_seg", "auxiliary.classifier")
    yield from _conv_norm("auxiliary_head.convs.0", "auxiliary.conv")
    yield from _upernet("decode_head", "head")
    yield from _segformer("decode_head", "head")


def _upernet(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for branch in range(len(POOL_SIDES)):
        yield from _conv_norm(f"{official}.psp_modules.{branch}.1", f"{ours}.pooling.branches.{branch}")
    yield from _conv_norm(f"{official}.bottleneck", f"{ours}.pooling.fuse")
    for level in range(_NUM_LEVELS - 1):
        yield from _conv_norm(f"{official}.lateral_convs.{level}", f"{ours}.laterals.{level}")
        yield from _conv_norm(f"{official}.fpn_convs.{level}", f"{ours}.outputs.{level}")
    yield from _conv_norm(f"{official}.fpn_bottleneck", f"{ours}.fuse_outputs")


def _segformer(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for level in range(_NUM_LEVELS):
        yield from _conv_norm(f"{official}.convs.{level}", f"{ours}.levels.{level}")
    yield from _conv_norm(f"{official}.fusion_conv", f"{ours}.fuse")
