"""Published and own weights into a segmentor, with a report of every key, and back to the authors' format."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from internimage import InternImage, InternImageConfig
from internimage.checkpoints import CheckpointError, Report
from internimage.dense import (
    DenseHead,
    Kind,
    Namer,
    backbone_names,
    check_head,
    check_same,
    fit_dense,
    offer_named,
    official_weights,
    or_same,
)
from internimage.hub import locate
from internimage.layouts import find_layout
from internimage.loading import Misfit, same_variant
from internimage.segmentors import Segmentor, find_segmentor, segmentor_of
from internimage.weight_files import read_weights, write_weights
from tasks.segmentation.keys import segmentor_ours_to_official
from tasks.segmentation.mask2former import Mask2Former
from tasks.segmentation.mask2former_keys import mask2former_ours_to_official
from tasks.segmentation.segformer import SegFormer
from tasks.segmentation.upernet import UPerNet

__all__ = ["CheckpointError", "Report", "export_segmentor", "load_segmentor", "official_segmentor_state_dict"]

# Layers with rows for classes, in the authors' names and in ours.
_CLASS_LAYERS = re.compile(
    r"((decode|auxiliary)_head\.conv_seg|decode_head\.cls_embed|(head|auxiliary)\.classifier|decoder\.class_predictor)"
    r"\.(weight|bias)$"
)
_AUXILIARY = re.compile(r"auxiliary(_head)?\.")


def load_segmentor(
    model: UPerNet | SegFormer | Mask2Former,
    source: str | Path,
    *,
    ema: bool | None = None,
    head: DenseHead = "load",
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Report:
    """Copy the weights of a file into a segmentor, or raise and leave it as it was.

    The file may be the authors' segmentor or a checkpoint of this project, of the same kind: head, queries and backbone
    must agree. A file without a segmentor, as a classifier's or a detector's, gives the backbone; the heads keep their
    values.

    Args:
        model: A segmentor on an `InternImage`. One on the meta device gets its memory here, on the CPU.
        source: A path, or `hub:NAME` to download a published file (see `internimage.hub.locate`).
        ema: `True` takes the averaged weights, `False` those as trained, `None` what the file gives as its main ones
            (see `internimage.weight_files.read_weights`).
        head: `load` takes every layer, so that the file must have as many classes as the model, whatever its data set
            has; `new` keeps the model's layers that depend on the classes, for classes of one's own.
        allow_missing: Patterns, as of file names, for keys of the model that may keep their values.
        allow_unexpected: Patterns for keys of the file that may be left out.

    Raises:
        CheckpointError: The file cannot be read, holds another segmentor or backbone, or does not cover the model
            exactly; or the model is no such segmentor.
    """
    config = _config(model)
    check_head(head)
    file = read_weights(locate(source), ema=ema)
    layout = find_layout(file)
    built = _describe(model)
    held = segmentor_of(layout, file)
    if held is not None:
        check_same(_SEGMENTOR, file, held, built, head)
    shape = same_variant(file, layout, config)

    name = _namer(built, config)
    if held is None:
        names = backbone_names(layout, config)
    else:
        rename = name if layout.naming == "ours" else str
        names = {rename(key): file_key for key, file_key in layout.model_keys().items()}
    offer = offer_named(file, layout, names)
    offer.adapt_center(config)
    return fit_dense(
        _SEGMENTOR,
        model,
        offer,
        name,
        built=built,
        shape=shape,
        config=config,
        head=head,
        backbone_only=held is None,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )


def official_segmentor_state_dict(model: UPerNet | SegFormer | Mask2Former) -> dict[str, Tensor]:
    """Return the weights of a segmentor under the authors' keys, without copying them.

    Args:
        model: As for `load_segmentor`.

    Raises:
        CheckpointError: A tensor has no counterpart in the authors' segmentors.
    """
    config = _config(model)
    return official_weights(_SEGMENTOR, model, _namer(_describe(model), config))


def export_segmentor(model: UPerNet | SegFormer | Mask2Former, path: str | Path) -> Path:
    """Write a segmentor in the authors' format; arguments and errors of `official_segmentor_state_dict`.

    Args:
        model: As there.
        path: Ends in `.pth` (a pickle with the entry `state_dict`) or `.safetensors` (plain).

    Returns:
        `path`.
    """
    return write_weights(path, official_segmentor_state_dict(model), container="state_dict")


def _config(model: UPerNet | SegFormer | Mask2Former) -> InternImageConfig:
    backbone = getattr(model, "backbone", None)
    if not isinstance(model, UPerNet | SegFormer | Mask2Former) or not isinstance(backbone, InternImage):
        raise CheckpointError(
            f"model is a {type(model).__name__} with {type(backbone).__name__} as backbone, expected a UPerNet, "
            "SegFormer or Mask2Former on an InternImage. Of a task, pass its `model`."
        )
    return backbone.config


def _describe(model: UPerNet | SegFormer | Mask2Former) -> Segmentor:
    described = find_segmentor({key: tensor.shape for key, tensor in model.state_dict().items()})
    assert described is not None
    return described


def _namer(segmentor: Segmentor, config: InternImageConfig) -> Namer:
    """Return the map from our keys to the authors'; a key that they have no counterpart of stays."""
    to_official = mask2former_ours_to_official if segmentor.family == "Mask2Former" else segmentor_ours_to_official
    return or_same(lambda key: to_official(key, config))


def _advise(misfit: Misfit) -> str | None:
    if misfit.all_keys(_CLASS_LAYERS.search):
        return "Say head='new' to keep the model's own class layers."
    if misfit.all_keys(_AUXILIARY.match):
        return (
            "Only one of them has an auxiliary head, which training alone uses. Build the model like the file, or say "
            "allow_missing=['auxiliary.*'] or allow_unexpected=['auxiliary_head.*', 'auxiliary.*']."
        )
    return None


_SEGMENTOR = Kind(noun="segmentor", class_layers=_CLASS_LAYERS, advise=_advise)
