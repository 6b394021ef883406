"""Names of tensors in the authors' two-stage detectors and in ours: a one-to-one map, both directions.

The differences: their convolutions carry a wrapper's name, batch norms stand beside their convolution, and only a
cascade numbers its heads. The map covers every option, whether a detector uses it or not.
"""

from collections.abc import Iterator, Mapping
from functools import cache

from internimage import InternImageConfig
from internimage import keys as backbone_names

_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Most that the authors' configs use.
_NUM_LEVELS = 4
_NUM_CONVS = 4
_NUM_FCS = 2


def rcnn_official_to_ours(key: str, config: InternImageConfig, *, num_stages: int) -> str:
    """Map a key of the authors' Mask R-CNN or Cascade R-CNN to ours.

    Args:
        key: For example `neck.fpn_convs.0.conv.weight` or `roi_head.bbox_head.0.fc_cls.bias`.
        config: Of the backbone; depths, norm and post_norm_blocks matter.
        num_stages: 1 for Mask R-CNN, 3 for a cascade.

    Returns:
        The key in `RCNN.state_dict()`.

    Raises:
        KeyError: No tensor of such a detector has this key.
    """
    if key.startswith("backbone."):
        return backbone_names.official_to_ours(key, config)
    if (ours := _rcnn_keys(num_stages).get(key)) is not None:
        return ours
    raise KeyError(f"rcnn_official_to_ours: the authors' detector of {num_stages} stages has no tensor {key!r}.")


def rcnn_ours_to_official(key: str, config: InternImageConfig, *, num_stages: int) -> str:
    """Map a key of our `RCNN` to the authors'; the inverse of `rcnn_official_to_ours`.

    Args:
        key: For example `neck.layer_blocks.0.0.weight`.
        config: Of the backbone; depths, norm and post_norm_blocks matter.
        num_stages: 1 for Mask R-CNN, 3 for a cascade.

    Raises:
        KeyError: No tensor of such a detector has this key.
    """
    if key.startswith("backbone."):
        return backbone_names.ours_to_official(key, config, dense=True)
    if (official := _inverse_rcnn_keys(num_stages).get(key)) is not None:
        return official
    raise KeyError(f"rcnn_ours_to_official: an RCNN of {num_stages} stages has no tensor {key!r}.")


@cache
def _rcnn_keys(num_stages: int) -> Mapping[str, str]:
    return dict(_rcnn(num_stages))


@cache
def _inverse_rcnn_keys(num_stages: int) -> Mapping[str, str]:
    return {ours: official for official, ours in _rcnn(num_stages)}


def _tensors(official: str, ours: str, names: tuple[str, ...] = _AFFINE) -> Iterator[tuple[str, str]]:
    for name in names:
        yield f"{official}.{name}", f"{ours}.{name}"


def _rcnn(num_stages: int) -> Iterator[tuple[str, str]]:
    for level in range(_NUM_LEVELS):
        yield from _tensors(f"neck.lateral_convs.{level}.conv", f"neck.inner_blocks.{level}.0")
        yield from _tensors(f"neck.fpn_convs.{level}.conv", f"neck.layer_blocks.{level}.0")
    for official, ours in (("rpn_conv", "conv"), ("rpn_cls", "objectness"), ("rpn_reg", "deltas")):
        yield from _tensors(f"rpn_head.{official}", f"rpn.{ours}")
    for stage in range(num_stages):
        number = f".{stage}" if num_stages > 1 else ""
        yield from _box_head(f"roi_head.bbox_head{number}", f"roi.box_heads.{stage}")
        yield from _mask_head(f"roi_head.mask_head{number}", f"roi.mask_heads.{stage}")


def _box_head(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for conv in range(_NUM_CONVS):
        yield from _tensors(f"{official}.shared_convs.{conv}.conv", f"{ours}.convs.{conv}", ("weight",))
        yield from _tensors(f"{official}.shared_convs.{conv}.bn", f"{ours}.norms.{conv}", _AFFINE + _STATISTICS)
    for fc in range(_NUM_FCS):
        yield from _tensors(f"{official}.shared_fcs.{fc}", f"{ours}.fcs.{fc}")
    yield from _tensors(f"{official}.fc_cls", f"{ours}.classes")
    yield from _tensors(f"{official}.fc_reg", f"{ours}.deltas")


def _mask_head(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for conv in range(_NUM_CONVS):
        yield from _tensors(f"{official}.convs.{conv}.conv", f"{ours}.convs.{conv}")
    yield from _tensors(f"{official}.upsample", f"{ours}.upsample")
    yield from _tensors(f"{official}.conv_logits", f"{ours}.classes")
