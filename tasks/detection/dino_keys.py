"""Names of tensors in the authors' DINO and CB-DINO and in ours: a one-to-one map, both directions.

The differences: their convolutions and attentions carry a wrapper's name, everything behind the neck hangs below one
head, and the pieces that join the two backbones of a composite are spread over three places. The map covers both forms
of the feed-forward networks, whether a detector uses them or not.
"""

from collections.abc import Iterator, Mapping
from functools import cache

from internimage import InternImageConfig
from internimage import keys as backbone_names

_AFFINE = ("weight", "bias")
# Levels of the backbone that the authors' configs use, layers and parts of the feed-forward networks of G.
_NUM_FEATURES, _NUM_LAYERS, _NUM_CHUNKS, _NUM_STAGES = 3, 6, 4, 4


def dino_official_to_ours(key: str, config: InternImageConfig, *, composite: bool = False) -> str:
    """Map a key of the authors' DINO to ours.

    Args:
        key: For example `neck.convs.0.gn.weight` or `bbox_head.transformer.level_embeds`.
        config: Of the backbone, or of each of two; depths, norm and post_norm_blocks matter.
        composite: The detector is a CB-DINO.

    Returns:
        The key in `DINO.state_dict()` or `CompositeDINO.state_dict()`.

    Raises:
        KeyError: No tensor of such a detector has this key.
    """
    if (ours := _keys(config, composite).get(key)) is None:
        raise KeyError(f"dino_official_to_ours: the authors' {_name(composite)} has no tensor {key!r}.")
    return ours


def dino_ours_to_official(key: str, config: InternImageConfig, *, composite: bool = False) -> str:
    """Map a key of our `DINO` or `CompositeDINO` to the authors'; the inverse of `dino_official_to_ours`.

    Raises:
        KeyError: No tensor of such a detector has this key.
    """
    if (official := _inverse_keys(config, composite).get(key)) is None:
        raise KeyError(f"dino_ours_to_official: {_name(composite)} has no tensor {key!r}.")
    return official


def _name(composite: bool) -> str:
    return "CB-DINO" if composite else "DINO"


@cache
def _keys(config: InternImageConfig, composite: bool) -> Mapping[str, str]:
    backbone = _composite(config) if composite else _prefixed(config, "backbone", "backbone")
    return {**dict(backbone), **dict(_neck("neck.0" if composite else "neck")), **dict(_head())}


@cache
def _inverse_keys(config: InternImageConfig, composite: bool) -> Mapping[str, str]:
    return {ours: official for official, ours in _keys(config, composite).items()}


def _tensors(official: str, ours: str, names: tuple[str, ...] = _AFFINE) -> Iterator[tuple[str, str]]:
    for name in names:
        yield f"{official}.{name}", f"{ours}.{name}"


def _prefixed(config: InternImageConfig, official: str, ours: str) -> Iterator[tuple[str, str]]:
    for theirs, name in backbone_names.backbone_keys(config).items():
        yield f"{official}.{theirs}", f"{ours}.{name}"


def _composite(config: InternImageConfig) -> Iterator[tuple[str, str]]:
    yield from _prefixed(config, "backbone.cb_modules.0", "backbone.assist")
    for official, ours in _prefixed(config, "backbone.cb_modules.1", "backbone.lead"):
        # The lead has no stem, and its downsamples stand inside what joins the two.
        if ".stem." not in ours:
            yield official, ours.replace(".downsample.", ".downsample.downsample.")
    for stage in range(_NUM_STAGES):
        junction = f"backbone.lead.stages.{stage}.downsample"
        yield f"backbone.cb_modules.1.gamma{stage}", f"{junction}.gamma"
        for number in range(_NUM_STAGES - stage - 1):
            yield from _tensors(f"backbone.cb_linears.{stage}.{number + 1}", f"{junction}.linears.{number}")


def _neck(official: str) -> Iterator[tuple[str, str]]:
    for level in range(_NUM_FEATURES + 1):
        conv = f"{official}.convs.{level}" if level < _NUM_FEATURES else f"{official}.extra_convs.0"
        yield f"{conv}.conv.weight", f"neck.convs.{level}.weight"
        yield from _tensors(f"{conv}.gn", f"neck.norms.{level}")


def _head() -> Iterator[tuple[str, str]]:
    head, transformer = "bbox_head", "bbox_head.transformer"
    yield f"{transformer}.level_embeds", "transformer.level_embeds"
    yield f"{transformer}.query_embed.weight", "transformer.query.weight"
    yield f"{head}.label_embedding.weight", "denoising.embedding.weight"
    yield from _tensors(f"{transformer}.enc_output", "transformer.proposal")
    yield from _tensors(f"{transformer}.enc_output_norm", "transformer.proposal_norm")
    yield from _tensors(f"{transformer}.decoder.norm", "transformer.norm")
    for linear in (0, 2):
        yield from _tensors(f"{transformer}.decoder.ref_point_head.{linear}", f"transformer.position.{linear}")
    for layer in range(_NUM_LAYERS):
        yield from _encoder_layer(f"{transformer}.encoder.layers.{layer}", f"transformer.encoder.{layer}")
        yield from _decoder_layer(f"{transformer}.decoder.layers.{layer}", f"transformer.decoder.{layer}")
    for layer in range(_NUM_LAYERS + 1):
        yield from _tensors(f"{head}.cls_branches.{layer}", f"transformer.classes.{layer}")
        for linear in (0, 2, 4):
            yield from _tensors(f"{head}.reg_branches.{layer}.{linear}", f"transformer.boxes.{layer}.{linear}")


def _encoder_layer(official: str, ours: str) -> Iterator[tuple[str, str]]:
    yield from _attention(f"{official}.attentions.0", f"{ours}.attention")
    yield from _ffn(f"{official}.ffns.0", f"{ours}.ffn")
    for number in range(2):
        yield from _tensors(f"{official}.norms.{number}", f"{ours}.norms.{number}")


def _decoder_layer(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        yield f"{official}.attentions.0.attn.{name}", f"{ours}.self_attention.{name}"
    yield from _attention(f"{official}.attentions.1", f"{ours}.attention")
    yield from _ffn(f"{official}.ffns.0", f"{ours}.ffn")
    for number in range(3):
        yield from _tensors(f"{official}.norms.{number}", f"{ours}.norms.{number}")


def _attention(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        yield from _tensors(f"{official}.{name}", f"{ours}.{name}")


def _ffn(official: str, ours: str) -> Iterator[tuple[str, str]]:
    yield from _tensors(f"{official}.layers.0.0", f"{ours}.fc1")
    yield from _tensors(f"{official}.layers.1", f"{ours}.fc2")
    for chunk in range(_NUM_CHUNKS):
        yield from _tensors(f"{official}.fc1_{chunk}", f"{ours}.fc1.{chunk}")
        yield f"{official}.fc2_{chunk}.weight", f"{ours}.fc2.{chunk}.weight"
    yield f"{official}.fc2_bias", f"{ours}.bias"
