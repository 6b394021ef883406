"""Published and own weights into a detector, with a report of every key, and back to the authors' format."""

import re
from collections.abc import Sequence
from dataclasses import replace
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
from internimage.detectors import Detector, detector_of, find_detector
from internimage.hub import locate
from internimage.layouts import Layout, find_layout
from internimage.loading import Misfit, Offer, same_variant
from internimage.weight_files import WeightFile, read_weights, write_weights
from tasks.detection.composite import CompositeInternImage
from tasks.detection.dino import DINO
from tasks.detection.dino_keys import dino_ours_to_official
from tasks.detection.ffn_parts import match_ffns
from tasks.detection.keys import rcnn_ours_to_official
from tasks.detection.mask_rcnn import RCNN

__all__ = ["CheckpointError", "Report", "export_detector", "load_detector", "official_detector_state_dict"]

# Layers with rows for classes, in the authors' names and in ours.
_CLASS_LAYERS = re.compile(
    r"(roi_head\.bbox_head(\.\d+)?\.fc_(cls|reg)|roi_head\.mask_head(\.\d+)?\.conv_logits|bbox_head\.cls_branches\.\d+"
    r"|bbox_head\.label_embedding|roi\.box_heads\.\d+\.(classes|deltas)|roi\.mask_heads\.\d+\.classes"
    r"|transformer\.classes\.\d+|denoising\.embedding)\.(weight|bias)$"
)
_MASK_HEADS = re.compile(r"roi_head\.mask_head\.|roi\.mask_heads\.")
# What joins two backbones, and the backbones themselves, in the authors' names.
_JUNCTIONS = re.compile(r"backbone\.(cb_linears\.|cb_modules\.1\.gamma\d$)")
_FIRST, _SECOND = "backbone.cb_modules.0.", "backbone.cb_modules.1."


def load_detector(
    model: RCNN | DINO,
    source: str | Path,
    *,
    ema: bool | None = None,
    head: DenseHead = "load",
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Report:
    """Copy the weights of a file into a detector, or raise and leave it as it was.

    The file may be the authors' detector or a checkpoint of this project, of the same kind: stages, layers and backbone
    must agree. The feed-forward networks of a DINO may be whole in one and in parts in the other. A file without a
    detector, as a classifier's, gives the backbone; neck and heads keep their values. A composite takes a file of one
    backbone, with or without DINO, into both.

    Args:
        model: A detector on an `InternImage`, or a DINO on a `CompositeInternImage`. One on the meta device gets its
            memory here, on the CPU.
        source: A path, or `hub:NAME` to download a published file (see `internimage.hub.locate`).
        ema: `True` takes the averaged weights, `False` those as trained, `None` what the file gives as its main ones
            (see `internimage.weight_files.read_weights`).
        head: `load` takes every layer, so that the file must have as many classes as the model; `new` keeps the
            model's layers that depend on the classes, for classes of one's own.
        allow_missing: Patterns, as of file names, for keys of the model that may keep their values.
        allow_unexpected: Patterns for keys of the file that may be left out.

    Raises:
        CheckpointError: The file cannot be read, holds another detector or backbone, or does not cover the model
            exactly; or the model is no such detector.
    """
    config = _config(model)
    check_head(head)
    file = read_weights(locate(source), ema=ema)
    layout = find_layout(file)
    built = _describe(model)
    held = detector_of(layout, file)
    if held is not None:
        check_same(_DETECTOR, file, held, built, head)
    shape = same_variant(file, layout, config)

    offer = _select(file, layout, held, built, config)
    offer.adapt_center(config)
    if held is not None:
        match_ffns(offer, held.ffn_parts, built.ffn_parts)
    one_backbone = built.num_backbones > layout.num_backbones
    return fit_dense(
        _DETECTOR,
        model,
        offer,
        _namer(built, config),
        built=built,
        shape=shape,
        config=config,
        head=head,
        backbone_only=held is None,
        why_missing=lambda key: "the file has one backbone" if one_backbone and _JUNCTIONS.match(key) else None,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )


def official_detector_state_dict(model: RCNN | DINO) -> dict[str, Tensor]:
    """Return the weights of a detector under the authors' keys, without copying them.

    Args:
        model: As for `load_detector`.

    Raises:
        CheckpointError: A tensor has no counterpart in the authors' detectors.
    """
    config = _config(model)
    return official_weights(_DETECTOR, model, _namer(_describe(model), config))


def export_detector(model: RCNN | DINO, path: str | Path) -> Path:
    """Write a detector in the authors' format; arguments and errors of `official_detector_state_dict`.

    Args:
        model: As there.
        path: Ends in `.pth` (a pickle with the entry `state_dict`) or `.safetensors` (plain).

    Returns:
        `path`.
    """
    return write_weights(path, official_detector_state_dict(model), container="state_dict")


def _config(model: RCNN | DINO) -> InternImageConfig:
    backbone = getattr(model, "backbone", None)
    if isinstance(model, DINO) and isinstance(backbone, CompositeInternImage):
        if backbone.assist.config != backbone.lead.config:
            raise CheckpointError("model has two backbones of different configs, expected one config.")
        return backbone.lead.config
    if not isinstance(model, RCNN | DINO) or not isinstance(backbone, InternImage):
        raise CheckpointError(
            f"model is a {type(model).__name__} with {type(backbone).__name__} as backbone, expected an RCNN or a DINO "
            "on an InternImage, or a DINO on a CompositeInternImage. Of a task, pass its `model`."
        )
    return backbone.config


def _describe(model: RCNN | DINO) -> Detector:
    num_backbones = 2 if isinstance(model.backbone, CompositeInternImage) else 1
    described = find_detector({key: tensor.shape for key, tensor in model.state_dict().items()}, num_backbones)
    assert described is not None
    return described


def _namer(detector: Detector, config: InternImageConfig) -> Namer:
    """Return the map from our keys to the authors'; a key that they have no counterpart of stays."""
    if detector.family == "DINO":
        return or_same(lambda key: dino_ours_to_official(key, config, composite=detector.num_backbones > 1))
    return or_same(lambda key: rcnn_ours_to_official(key, config, num_stages=detector.num_layers))


def _select(
    file: WeightFile, layout: Layout, held: Detector | None, built: Detector, config: InternImageConfig
) -> Offer:
    """Return what the model may take, and why the rest of the file is not used."""
    if held is not None or layout.num_backbones == built.num_backbones == 2:
        inside, source = layout.model_keys(), held or replace(built, num_backbones=2)
        if held is None:
            inside = {key: name for key, name in inside.items() if key.startswith("backbone.")}
        rename = _namer(source, config) if layout.naming == "ours" else str
        names = {rename(key): name for key, name in inside.items()}
    else:
        names = backbone_names(layout, config)
    second = _widen(names) if built.num_backbones > layout.num_backbones else []
    offer = offer_named(file, layout, names)
    offer.adapted.update(dict.fromkeys(second, "the file's only backbone, once more"))
    return offer


def _widen(names: dict[str, str]) -> list[str]:
    """Rename one backbone to the first of two, and name its tensors a second time; return those keys."""
    second = []
    for key in list(names):
        name = names.pop(key)
        part, _, rest = key.partition(".")
        if part == "backbone":
            names[f"{_FIRST}{rest}"] = name
            # The second starts from the stem of the first.
            if not rest.startswith("patch_embed."):
                names[f"{_SECOND}{rest}"] = name
                second.append(f"{_SECOND}{rest}")
        else:
            names[f"neck.0.{rest}" if part == "neck" else key] = name
    return second


def _advise(misfit: Misfit) -> str | None:
    if misfit.all_keys(_CLASS_LAYERS.search):
        return "Say head='new' to keep the model's own class layers."
    if misfit.all_keys(_MASK_HEADS.search):
        return (
            "Only one of them predicts masks. Build the model like the file, or say "
            "allow_missing=['roi.mask_heads*'] or allow_unexpected=['*mask_head*']."
        )
    return None


_DETECTOR = Kind(noun="detector", class_layers=_CLASS_LAYERS, advise=_advise)
