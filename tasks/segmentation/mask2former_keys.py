"""Names of tensors in the authors' Mask2Former and in ours: a one-to-one map, both directions.

The differences: their convolutions and attentions carry a wrapper's name, and everything behind the backbone hangs
below one head. No tensor is cut or joined: our attentions keep the three projections in one, as theirs do.
"""

from collections.abc import Iterator, Mapping
from functools import cache

from torch import Tensor

from internimage import InternImageConfig
from internimage import keys as backbone_names
from tasks.segmentation.mask2former_layers import NUM_ENCODED

_AFFINE = ("weight", "bias")
_ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
_HEAD, _PIXELS, _DECODER = "decode_head", "decode_head.pixel_decoder", "decode_head.transformer_decoder"
_NUM_ENCODER_LAYERS, _NUM_DECODER_LAYERS = 6, 9


def mask2former_official_to_ours(key: str, config: InternImageConfig) -> str:
    """Map a key of the authors' Mask2Former to ours.

    Args:
        key: For example `decode_head.query_feat.weight`.
        config: Of the backbone; depths, norm and post_norm_blocks matter.

    Returns:
        The key in `Mask2Former.state_dict()`.

    Raises:
        KeyError: No tensor of such a segmentor has this key.
    """
    if key.startswith("backbone."):
        return backbone_names.official_to_ours(key, config)
    if (ours := _keys().get(key)) is not None:
        return ours
    raise KeyError(f"mask2former_official_to_ours: the authors' Mask2Former has no tensor {key!r}.")


def mask2former_ours_to_official(key: str, config: InternImageConfig) -> str:
    """Map a key of our `Mask2Former` to the authors'; the inverse of `mask2former_official_to_ours`.

    Args:
        key: For example `decoder.queries_features.weight`.
        config: Of the backbone; depths, norm and post_norm_blocks matter.

    Raises:
        KeyError: No tensor of such a segmentor has this key.
    """
    if key.startswith("backbone."):
        return backbone_names.ours_to_official(key, config, dense=True)
    if (official := _inverse_keys().get(key)) is not None:
        return official
    raise KeyError(f"mask2former_ours_to_official: Mask2Former has no tensor {key!r}.")


def to_ours(tensors: Mapping[str, Tensor], config: InternImageConfig) -> dict[str, Tensor]:
    """Return the authors' tensors under our keys; arguments and errors of `mask2former_official_to_ours`."""
    return {mask2former_official_to_ours(key, config): tensor for key, tensor in tensors.items()}


def to_official(tensors: Mapping[str, Tensor], config: InternImageConfig) -> dict[str, Tensor]:
    """Return our tensors under the authors' keys; arguments and errors of `mask2former_ours_to_official`."""
    return {mask2former_ours_to_official(key, config): tensor for key, tensor in tensors.items()}


def num_mask2former_classes(tensors: Mapping[str, Tensor]) -> int:
    """Count the classes that the authors' Mask2Former finds, "no object" not among them.

    Args:
        tensors: By the authors' keys.

    Raises:
        KeyError: It has no such classifier.
    """
    key = f"{_HEAD}.cls_embed.weight"
    if key not in tensors:
        raise KeyError(f"num_mask2former_classes: no tensor {key!r}, so this is not a Mask2Former.")
    return tensors[key].shape[0] - 1


@cache
def _keys() -> Mapping[str, str]:
    return dict(_segmentor())


@cache
def _inverse_keys() -> Mapping[str, str]:
    return {ours: official for official, ours in _segmentor()}


def _tensors(official: str, ours: str, names: tuple[str, ...] = _AFFINE) -> Iterator[tuple[str, str]]:
    for name in names:
        yield f"{official}.{name}", f"{ours}.{name}"


def _segmentor() -> Iterator[tuple[str, str]]:
    yield from _pixel_decoder()
    for layer in range(_NUM_ENCODER_LAYERS):
        yield from _encoder_layer(f"{_PIXELS}.encoder.layers.{layer}", f"pixel_decoder.encoder.layers.{layer}")
    for layer in range(_NUM_DECODER_LAYERS):
        yield from _decoder_layer(f"{_DECODER}.layers.{layer}", f"decoder.decoder.layers.{layer}")
    yield from _tensors(f"{_DECODER}.post_norm", "decoder.decoder.layernorm")
    for official, ours in (
        ("query_embed", "queries_embedder"),
        ("query_feat", "queries_features"),
        ("level_embed", "level_embed"),
    ):
        yield f"{_HEAD}.{official}.weight", f"decoder.{ours}.weight"
    yield from _tensors(f"{_HEAD}.cls_embed", "decoder.class_predictor")
    for layer in range(3):
        yield from _tensors(
            f"{_HEAD}.mask_embed.{2 * layer}", f"decoder.decoder.mask_predictor.mask_embedder.{layer}.0"
        )


def _pixel_decoder() -> Iterator[tuple[str, str]]:
    for level in range(NUM_ENCODED):
        yield from _tensors(f"{_PIXELS}.input_convs.{level}.conv", f"pixel_decoder.input_projections.{level}.0")
        yield from _tensors(f"{_PIXELS}.input_convs.{level}.gn", f"pixel_decoder.input_projections.{level}.1")
    yield f"{_PIXELS}.level_encoding.weight", "pixel_decoder.level_embed"
    for official, ours in (("lateral_convs", "adapter_1"), ("output_convs", "layer_1")):
        yield f"{_PIXELS}.{official}.0.conv.weight", f"pixel_decoder.{ours}.0.weight"
        yield from _tensors(f"{_PIXELS}.{official}.0.gn", f"pixel_decoder.{ours}.1")
    yield from _tensors(f"{_PIXELS}.mask_feature", "pixel_decoder.mask_projection")


def _encoder_layer(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        yield from _tensors(f"{official}.attentions.0.{name}", f"{ours}.attention.{name}")
    yield from _ffn(f"{official}.ffns.0", f"{ours}.ffn")
    for number in range(2):
        yield from _tensors(f"{official}.norms.{number}", f"{ours}.norms.{number}")


def _decoder_layer(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for number, name in enumerate(("cross_attn", "self_attn")):
        yield from _tensors(f"{official}.attentions.{number}.attn", f"{ours}.{name}", _ATTENTION)
    yield from _ffn(f"{official}.ffns.0", ours)
    for number, name in enumerate(("cross_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm")):
        yield from _tensors(f"{official}.norms.{number}", f"{ours}.{name}")


def _ffn(official: str, ours: str) -> Iterator[tuple[str, str]]:
    yield from _tensors(f"{official}.layers.0.0", f"{ours}.fc1")
    yield from _tensors(f"{official}.layers.1", f"{ours}.fc2")
