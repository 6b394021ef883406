"""Published and own weights into a model, with a report of every key, and back to the authors' format."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from internimage.config import InternImageConfig
from internimage.hub import locate
from internimage.init import init_weights
from internimage.keys import ours_to_official
from internimage.layouts import Layout, Shape, find_layout, official_or_same, shape_of
from internimage.model import Classifier, InternImage
from internimage.report import Report, listed
from internimage.surgery import HEAD_BIAS, HEAD_WEIGHT, drop_center, read_label_map, scale_linear, select_classes
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
    built = _same_variant(file, layout, config)

    # Everything is compared under the authors' keys: `names` leads from them into the file, `ours` into the model.
    names, ignored = _select(file, layout, model, head)
    ours = _official_keys(model, config)
    tensors = {key: file.tensors[name] for key, name in names.items()}
    adapted = _adapt(tensors, model, config, label_map)
    missing, lost = _explain_missing(ours, tensors, head, config, allow_missing, has_head=bool(layout.head))
    unexpected, foreign = _explain_unexpected(names, ours, allow_unexpected)
    state = model.state_dict()
    pairs = {key: (state[ours[key]], tensor) for key, tensor in tensors.items() if key in ours}
    misfits = [
        f"{ours[key]} is {_form(target)} in the model and {_form(tensor)} in the file ({names[key]})"
        for key, (target, tensor) in pairs.items()
        if target.shape != tensor.shape or target.is_floating_point() != tensor.is_floating_point()
    ]
    if lost or foreign or misfits:
        raise CheckpointError(_misfit_message(file.path, built, lost, foreign, misfits))

    _copy(model, {ours[key]: tensor for key, (_, tensor) in pairs.items()}, complete=not missing)
    if new_head_scale != 1:
        scale_linear(_last_layer(model), new_head_scale)
    return Report(
        path=file.path,
        container=file.container,
        naming=layout.naming,
        prefix=layout.prefix,
        model=str(built),
        taken={ours[key]: names[key] for key in ours if key in pairs},
        adapted={ours[key]: how for key, how in adapted.items()},
        missing=missing,
        unexpected=unexpected,
        ignored=ignored,
        dtypes=tuple(sorted({str(tensor.dtype) for target, tensor in pairs.values() if tensor.dtype != target.dtype})),
    )


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


def _same_variant(file: WeightFile, layout: Layout, config: InternImageConfig) -> Shape:
    held, built = shape_of(layout, file), Shape(config.channels, config.depths)
    if held != built:
        remedy = f"Build internimage_{held.variant.lower()}(), or choose" if held.variant else "Choose"
        raise CheckpointError(f"{file.path} holds {held}, the model is {built}. {remedy} another file.")
    return built


def _select(
    file: WeightFile, layout: Layout, model: nn.Module, head: HeadOption
) -> tuple[dict[str, str], dict[str, str]]:
    """Return what the model may take, the authors' key -> key in the file, and why the rest of the file is not used."""
    backbone_keys, head_keys = layout.official_keys(_config(model))
    ignored = file.skipped | {part: f"another part, {count} tensors" for part, count in layout.others.items()}
    if head_keys and not isinstance(model, Classifier):
        ignored[listed(list(head_keys.values()))] = "the model has no head"
        head_keys = {}
    if head == "new":
        ignored |= {head_keys.pop(key): "head='new'" for key in (HEAD_WEIGHT, HEAD_BIAS) if key in head_keys}
    return backbone_keys | head_keys, ignored


def _official_keys(model: nn.Module, config: InternImageConfig) -> dict[str, str]:
    """Return the authors' key -> key in the model, for all that the model holds."""
    start = "" if isinstance(model, Classifier) else "backbone."
    return {official_or_same(start + key, config): key for key in model.state_dict()}


def _adapt(
    tensors: dict[str, Tensor],
    model: nn.Module,
    config: InternImageConfig,
    label_map: str | Path | Sequence[int] | None,
) -> dict[str, str]:
    """Change `tensors` to fit the model where that is meant; return how, by the authors' key."""
    adapted = {}
    num_points = config.kernel_size**2
    mask = tensors.get("levels.0.blocks.0.dcn.mask.bias")
    if config.remove_center and mask is not None and mask.shape[0] == config.groups[0] * num_points:
        adapted = dict.fromkeys(drop_center(tensors, num_points), "central point dropped")
    if label_map is not None:
        assert isinstance(model, Classifier)
        if HEAD_WEIGHT not in tensors or HEAD_BIAS not in tensors:
            raise CheckpointError("head='map': the file has no classification head to pick rows from. Use head='new'.")
        num_rows = tensors[HEAD_WEIGHT].shape[0]
        rows = read_label_map(label_map, num_classes=_last_layer(model).out_features, num_rows=num_rows)
        select_classes(tensors, rows)
        adapted |= dict.fromkeys((HEAD_WEIGHT, HEAD_BIAS), f"{len(rows)} of {num_rows} rows, by the label map")
    return adapted


def _explain_missing(
    ours: dict[str, str],
    tensors: dict[str, Tensor],
    head: HeadOption,
    config: InternImageConfig,
    allow: Sequence[str],
    *,
    has_head: bool,
) -> tuple[dict[str, str], list[str]]:
    """Return the model's keys that may keep their values and why, and those that may not."""
    file_scales = any(key.endswith((".gamma1", ".gamma2")) for key in tensors)
    reasons, lost = {}, []
    for key, name in ours.items():
        if key in tensors:
            continue
        if head == "new" and (key in (HEAD_WEIGHT, HEAD_BIAS) or (not has_head and name.startswith("head."))):
            reasons[name] = "head='new'"
        elif config.layer_scale == 1 and not file_scales and key.endswith((".gamma1", ".gamma2")):
            reasons[name] = "the file has no layer scale, and 1 is none"
        elif pattern := _match(allow, name):
            reasons[name] = f"allowed by {pattern!r}"
        else:
            lost.append(name)
    return reasons, lost


def _explain_unexpected(
    names: dict[str, str], ours: dict[str, str], allow: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the file's keys that may be left out and why, and those that may not."""
    foreign = [name for key, name in names.items() if key not in ours]
    reasons = {name: f"allowed by {pattern!r}" for name in foreign if (pattern := _match(allow, name))}
    return reasons, [name for name in foreign if name not in reasons]


def _match(patterns: Iterable[str], key: str) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(key, pattern)), None)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _misfit_message(path: Path, built: Shape, lost: list[str], foreign: list[str], misfits: list[str]) -> str:
    lines = [f"{path} does not fit {built}; nothing was loaded."]
    if lost:
        lines.append(f"Missing in the file: {listed(lost)}.")
    if foreign:
        lines.append(f"Without a place in the model: {listed(foreign)}.")
    lines += [f"{misfit}." for misfit in misfits[:3]]
    if len(misfits) > 3:
        lines.append(f"{len(misfits) - 3} more tensors differ like this.")
    concerned = [*lost, *foreign, *misfits]
    if all(name.startswith("head.") for name in concerned):
        pick = ", or head='map' and a label_map to pick rows of the file's" if misfits else ""
        lines.append(f"Say head='new' to keep the model's own{pick}.")
    elif all(".scale" in name or ".gamma" in name for name in concerned):
        lines.append("Only one of them has layer scale: build the model with layer_scale=None, or with a number.")
    else:
        lines.append(
            "Build the model with the options that the file was trained with, or name what may differ in allow_missing "
            "and allow_unexpected."
        )
    return "\n  ".join(lines)


def _copy(model: nn.Module, values: dict[str, Tensor], *, complete: bool) -> None:
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        model.to_empty(device="cpu")
        if not complete:
            init_weights(model)
    result = model.load_state_dict(values, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
