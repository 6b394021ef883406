"""Published and own weights into a model, with a report of every key, and back to the authors' format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from internimage.config import InternImageConfig
from internimage.hub import locate
from internimage.keys import ours_to_official
from internimage.layouts import Layout, find_layout, official_or_same
from internimage.loading import Misfit, Offer, fit, no_layer_scale, same_variant
from internimage.model import Classifier, InternImage
from internimage.report import Report, listed
from internimage.surgery import HEAD_BIAS, HEAD_WEIGHT, read_label_map, scale_linear, select_classes
from internimage.weight_files import CheckpointError, WeightFile, read_weights, write_weights

__all__ = ["CheckpointError", "HeadOption", "Report", "export_official", "load_checkpoint", "official_state_dict"]

HeadOption = Literal["load", "new", "map"]


def load_checkpoint(
    model: nn.Module,
    source: str | Path,
    *,
    ema: bool | None = None,
    head: HeadOption = "load",
    label_map: str | Path | Sequence[int] | None = None,
    new_head_scale: float = 1.0,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Report:
    """Copy the weights of a file into a model, or raise and leave the model as it was.

    The file may be the authors' classifier, detector or segmentor (of which the backbone is taken), the Hugging Face
    port of a classifier, or a checkpoint of this project: a pickle or safetensors, sharded or not, of any float type.

    Args:
        model: A `Classifier` around an `InternImage`, or a bare `InternImage`. One on the meta device gets its memory
            here, on the CPU.
        source: A path, or `hub:NAME` to download a published file (see `internimage.hub.locate`).
        ema: `True` takes the averaged weights, `False` those as trained, `None` what the file gives as its main ones.
        head: `load` takes the last layer of the file's classifier, which must score as many classes as the model's;
            `new` keeps the model's and takes the layers before it where the file has them; `map` picks rows of it.
        label_map: For `map`: the file's row for each class of the model, or a text file of them, one a line.
        new_head_scale: For `new`: factor on the model's last layer. The authors fine-tune from 0.001.
        allow_missing: Patterns, as of file names, for keys of the model that may keep their values.
        allow_unexpected: Patterns for keys of the file that may be left out.

    Raises:
        CheckpointError: The file cannot be read, holds another variant, or does not cover the model exactly; or an
            option does not go with the model or with another option.
    """
    config = _config(model)
    _check_options(model, head, label_map, new_head_scale)
    file = read_weights(locate(source), ema=ema)
    layout = find_layout(file)
    built = same_variant(file, layout, config)
    offer = _select(file, layout, model, head)
    offer.adapt_center(config)
    if label_map is not None:
        _map_classes(offer, model, label_map)
    ours = _official_keys(model, config)
    scale_free = no_layer_scale(offer, config)

    def why_missing(key: str) -> str | None:
        kept = key in (HEAD_WEIGHT, HEAD_BIAS) or (not layout.head and ours[key].startswith("head."))
        return "head='new'" if head == "new" and kept else scale_free(key)

    report = fit(
        model,
        offer,
        ours,
        built=str(built),
        why_missing=why_missing,
        advise=_advise,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )
    if new_head_scale != 1:
        scale_linear(_last_layer(model), new_head_scale)
    return report


def official_state_dict(model: nn.Module, *, dense: bool = False) -> dict[str, Tensor]:
    """Return the weights of a model under the authors' keys, without copying them.

    Args:
        model: A `Classifier` around an `InternImage`, or a bare `InternImage`.
        dense: Name them as in the authors' detectors and segmentors: `backbone.` in front, no head.

    Raises:
        CheckpointError: The head is not one of theirs, or the backbone is not an `InternImage`.
    """
    config = _config(model)
    tensors = {}
    for key, tensor in model.state_dict().items():
        full = key if isinstance(model, Classifier) else f"backbone.{key}"
        if dense and full.startswith("head."):
            continue
        try:
            tensors[ours_to_official(full, config, dense=dense)] = tensor
        except KeyError as error:
            raise CheckpointError(
                f"{key} has no counterpart in the authors' models. Use dense=True to leave the head out."
            ) from error
    return tensors


def export_official(model: nn.Module, path: str | Path, *, dense: bool = False) -> Path:
    """Write the weights of a model in the authors' format; arguments and errors of `official_state_dict`.

    Args:
        model: As there.
        path: Ends in `.pth` (a pickle with the entry `model`, or `state_dict` if dense) or `.safetensors` (plain).
        dense: As there.

    Returns:
        `path`.
    """
    return write_weights(path, official_state_dict(model, dense=dense), container="state_dict" if dense else "model")


def _config(model: nn.Module) -> InternImageConfig:
    backbone = model.backbone if isinstance(model, Classifier) else model
    if not isinstance(backbone, InternImage):
        raise CheckpointError(
            f"model is a {type(model).__name__} with {type(backbone).__name__} as backbone, expected an InternImage or "
            "a Classifier around one. Of a task, pass its `model`."
        )
    return backbone.config


def _check_options(
    model: nn.Module, head: HeadOption, label_map: str | Path | Sequence[int] | None, new_head_scale: float
) -> None:
    if head not in ("load", "new", "map"):
        raise CheckpointError(f"head is {head!r}, expected 'load', 'new' or 'map'.")
    if head != "load" and not isinstance(model, Classifier):
        raise CheckpointError(f"head={head!r} needs a Classifier, the model is a {type(model).__name__}. Use 'load'.")
    if (head == "map") != (label_map is not None):
        raise CheckpointError(f"head={head!r} with label_map={label_map!r}: 'map' needs one, the others take none.")
    if new_head_scale != 1:
        if head != "new":
            raise CheckpointError(f"new_head_scale={new_head_scale} has no effect with head={head!r}. Use head='new'.")
        _last_layer(model)


def _last_layer(model: nn.Module) -> nn.Linear:
    assert isinstance(model, Classifier)
    layer = getattr(model.head, "fc", None)
    if not isinstance(layer, nn.Linear):
        raise CheckpointError(f"{type(model.head).__name__} has no linear layer `fc` to map rows to or to scale.")
    return layer


def _select(file: WeightFile, layout: Layout, model: nn.Module, head: HeadOption) -> Offer:
    """Return what the model may take, and why the rest of the file is not used."""
    backbone_keys, head_keys = layout.official_keys(_config(model))
    ignored = file.skipped | {part: f"another part, {count} tensors" for part, count in layout.others.items()}
    if head_keys and not isinstance(model, Classifier):
        ignored[listed(list(head_keys.values()))] = "the model has no head"
        head_keys = {}
    if head == "new":
        ignored |= {head_keys.pop(key): "head='new'" for key in (HEAD_WEIGHT, HEAD_BIAS) if key in head_keys}
    names = backbone_keys | head_keys
    tensors = {key: file.tensors[name] for key, name in names.items()}
    return Offer(file=file, layout=layout, names=names, tensors=tensors, ignored=ignored)


def _official_keys(model: nn.Module, config: InternImageConfig) -> dict[str, str]:
    """Return the authors' key -> key in the model, for all that the model holds."""
    start = "" if isinstance(model, Classifier) else "backbone."
    return {official_or_same(start + key, config): key for key in model.state_dict()}


def _map_classes(offer: Offer, model: nn.Module, label_map: str | Path | Sequence[int]) -> None:
    """Pick the rows of the file's last layer that the model's classes name."""
    if HEAD_WEIGHT not in offer.tensors or HEAD_BIAS not in offer.tensors:
        raise CheckpointError("head='map': the file has no classification head to pick rows from. Use head='new'.")
    num_rows = offer.tensors[HEAD_WEIGHT].shape[0]
    rows = read_label_map(label_map, num_classes=_last_layer(model).out_features, num_rows=num_rows)
    select_classes(offer.tensors, rows)
    offer.adapted.update(dict.fromkeys((HEAD_WEIGHT, HEAD_BIAS), f"{len(rows)} of {num_rows} rows, by the label map"))


def _advise(misfit: Misfit) -> str | None:
    if not misfit.all_keys(lambda key: key.startswith("head.")):
        return None
    pick = ", or head='map' and a label_map to pick rows of the file's" if misfit.forms else ""
    return f"Say head='new' to keep the model's own{pick}."
