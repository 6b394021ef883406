"""Names of tensors in the authors' checkpoints and in ours: a one-to-one map, both directions.

The differences: every norm of theirs is wrapped in a Sequential (index 1 where a permutation comes first), a level
owns the downsample that follows it where our stage owns the one that precedes it, inner post-norms are counted where
ours are named after the block that they follow, and their classifier keeps the backbone at its root.

The map covers every option of the given depths, whether the config uses it or not, so that a key which this model has
no place for (layer scale of a detector's T, say) still gets a name in the report of what was loaded.
"""

from collections.abc import Iterator, Mapping
from functools import cache

from internimage.config import DEEP_STAGE, NUM_STAGES, InternImageConfig

_AFFINE = ("weight", "bias")
_BATCH_NORM = (*_AFFINE, "running_mean", "running_var", "num_batches_tracked")


def official_to_ours(key: str, config: InternImageConfig) -> str:
    """Map a key of the authors' classifier, or a `backbone.` key of their detectors and segmentors, to ours.

    Args:
        key: For example `levels.0.blocks.1.norm1.0.weight`, `backbone.levels.0.blocks.1.norm1.0.weight`, `head.weight`.
        config: Of the backbone; depths, norm and post_norm_blocks matter.

    Returns:
        The key in `Classifier.state_dict()`, for example `backbone.stages.0.blocks.1.norm1.weight` or `head.fc.weight`;
        for a bare backbone take off `backbone.`.

    Raises:
        KeyError: No tensor of such a model has this key.
    """
    backbone = backbone_keys(config)
    if (ours := backbone.get(key.removeprefix("backbone."))) is not None:
        return f"backbone.{ours}"
    if (ours := head_keys().get(key)) is not None:
        return f"head.{ours}"
    raise KeyError(f"official_to_ours: the authors' InternImage of depths {config.depths} has no tensor {key!r}.")


def ours_to_official(key: str, config: InternImageConfig, *, dense: bool = False) -> str:
    """Map a key of our `Classifier` (`backbone.` and `head.`) to the authors'; the inverse of `official_to_ours`.

    Args:
        key: For example `backbone.stages.0.blocks.1.norm1.weight`.
        config: Of the backbone; depths, norm and post_norm_blocks matter.
        dense: Give the name in a detector or segmentor, where `backbone.` stays in front, not in a classifier.

    Raises:
        KeyError: No tensor of such a model has this key; with `dense`, any key of the classifier's head.
    """
    part, _, name = key.partition(".")
    if part == "backbone" and (official := _inverse_backbone_keys(config).get(name)) is not None:
        return f"backbone.{official}" if dense else official
    if part == "head" and not dense and (official := _inverse_head_keys().get(name)) is not None:
        return official
    raise KeyError(
        f"ours_to_official: InternImage of depths {config.depths} has no tensor {key!r}"
        f"{' outside its classification head' if dense else ''}. Expected `backbone.` or `head.` and a name in it."
    )


@cache
def backbone_keys(config: InternImageConfig) -> Mapping[str, str]:
    """Return the authors' key -> our key for every tensor of a backbone, both relative to the backbone."""
    return dict(_backbone(config))


@cache
def head_keys() -> Mapping[str, str]:
    """Return the authors' key -> our key, relative to `Classifier.head`, for both classification heads."""
    return dict(_head())


@cache
def _inverse_backbone_keys(config: InternImageConfig) -> Mapping[str, str]:
    return {ours: official for official, ours in backbone_keys(config).items()}


@cache
def _inverse_head_keys() -> Mapping[str, str]:
    return {ours: official for official, ours in head_keys().items()}


def _tensors(official: str, ours: str, names: tuple[str, ...] = _AFFINE) -> Iterator[tuple[str, str]]:
    for name in names:
        yield f"{official}.{name}", f"{ours}.{name}"


def _conv_norm(official: str, ours: str, config: InternImageConfig) -> Iterator[tuple[str, str]]:
    """Norm after a convolution: LN needs a permutation in front of it in the authors' channels-first code, BN none."""
    if config.norm == "BN":
        yield from _tensors(f"{official}.0", ours, _BATCH_NORM)
    else:
        yield from _tensors(f"{official}.1", ours)


def _backbone(config: InternImageConfig) -> Iterator[tuple[str, str]]:
    for number in (1, 2):
        yield from _tensors(f"patch_embed.conv{number}", f"stem.conv{number}")
        yield from _conv_norm(f"patch_embed.norm{number}", f"stem.norm{number}", config)
    for stage in range(NUM_STAGES):
        level = f"levels.{stage}"
        for block in range(config.depths[stage]):
            yield from _block(f"{level}.blocks.{block}", f"stages.{stage}.blocks.{block}", config)
        yield from _tensors(f"{level}.norm.0", f"stages.{stage}.norm")
        if stage + 1 < NUM_STAGES:
            downsample = f"stages.{stage + 1}.downsample"
            yield f"{level}.downsample.conv.weight", f"{downsample}.conv.weight"
            yield from _conv_norm(f"{level}.downsample.norm", f"{downsample}.norm", config)
    for position, block in enumerate(config.post_norm_blocks):
        yield from _tensors(f"levels.{DEEP_STAGE}.post_norms.{position}.0", f"stages.{DEEP_STAGE}.post_norms.{block}")


def _block(official: str, ours: str, config: InternImageConfig) -> Iterator[tuple[str, str]]:
    for number in (1, 2):
        yield from _tensors(f"{official}.norm{number}.0", f"{ours}.norm{number}")
        yield from _tensors(f"{official}.res_post_norm{number}.0", f"{ours}.res_norm{number}")
        yield f"{official}.gamma{number}", f"{ours}.scale{number}.weight"
        yield from _tensors(f"{official}.mlp.fc{number}", f"{ours}.mlp.fc{number}")
    for name in ("offset", "mask", "input_proj", "output_proj"):
        yield from _tensors(f"{official}.dcn.{name}", f"{ours}.dcn.{name}")
    yield from _tensors(f"{official}.dcn.dw_conv.0", f"{ours}.dcn.dw_conv")
    yield from _conv_norm(f"{official}.dcn.dw_conv.1", f"{ours}.dcn.dw_norm", config)
    for name in _AFFINE:
        yield f"{official}.dcn.center_feature_scale_proj_{name}", f"{ours}.dcn.center_feature_scale.{name}"


def _head() -> Iterator[tuple[str, str]]:
    yield from _tensors("head", "fc")
    yield "conv_head.0.weight", "conv.weight"
    yield from _tensors("conv_head.1.0", "norm", _BATCH_NORM)
    yield from _tensors("dcnv3_head_x3", "project3")
    yield from _tensors("dcnv3_head_x4.0", "project4")
    for name in ("q", "k", "v"):
        yield from _tensors(f"clip_projector.norm1_{name}.0", f"pool.norm_{name}")
        yield f"clip_projector.cross_dcn.{name}.weight", f"pool.{name}.weight"
        yield f"clip_projector.cross_dcn.{name}_bias", f"pool.{name}.bias"
    yield from _tensors("clip_projector.cross_dcn.proj", "pool.proj")
    yield from _tensors("fc_norm.0", "fc_norm")
