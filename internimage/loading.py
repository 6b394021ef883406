"""Fit the tensors of a weight file into a model: each key is taken, explained or an error. Keys are the authors'."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain

from torch import Tensor, nn

from internimage.config import InternImageConfig
from internimage.init import init_weights
from internimage.layouts import Layout, Shape, shape_of
from internimage.report import Report, listed
from internimage.surgery import drop_center
from internimage.weight_files import CheckpointError, WeightFile

_LAYER_SCALE = re.compile(r"\.blocks\.\d+\.(gamma[12]|layer_scale[12]|scale[12]\.weight)$")


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a file offers to a model.

    Args:
        file: The file.
        layout: Where its backbone is.
        names: The authors' key -> key in the file.
        tensors: The authors' key -> tensor.
        ignored: Other part of the file -> why it is not used.
        adapted: The authors' key -> how the file's tensor was changed to fit.
    """

    file: WeightFile
    layout: Layout
    names: dict[str, str]
    tensors: dict[str, Tensor]
    ignored: dict[str, str]
    adapted: dict[str, str] = field(default_factory=dict)

    def adapt_center(self, config: InternImageConfig) -> None:
        """Drop the central sampling point where the model has none and the file does."""
        num_points = config.kernel_size**2
        masks = [tensor for key, tensor in self.tensors.items() if key.endswith("levels.0.blocks.0.dcn.mask.bias")]
        if config.remove_center and masks and masks[0].shape[0] == config.groups[0] * num_points:
            self.adapted.update(dict.fromkeys(drop_center(self.tensors, num_points), "central point dropped"))


@dataclass(frozen=True)
class Misfit:
    """What keeps a file from fitting a model.

    Args:
        lost: Keys of the model that the file lacks.
        foreign: Keys of the file that the model lacks.
        forms: Key of the model -> how the file's tensor differs in shape or type.
    """

    lost: list[str]
    foreign: list[str]
    forms: dict[str, str]

    def all_keys(self, matches: Callable[[str], object]) -> bool:
        """Whether every key concerned is one of these."""
        return all(map(matches, chain(self.lost, self.foreign, self.forms)))


def same_variant(file: WeightFile, layout: Layout, config: InternImageConfig) -> Shape:
    """Return the shape of a model's backbone.

    Raises:
        CheckpointError: The file holds another.
    """
    held, built = shape_of(layout, file), Shape(config.channels, config.depths)
    if held != built:
        remedy = f"Build internimage_{held.variant.lower()}(), or choose" if held.variant else "Choose"
        raise CheckpointError(f"{file.path} holds {held}, the model is {built}. {remedy} another file.")
    return built


def no_layer_scale(offer: Offer, config: InternImageConfig) -> Callable[[str], str | None]:
    """Return a function that says why a key may be missing: a layer scale of 1 changes nothing."""
    neutral = config.layer_scale == 1 and not any(map(_LAYER_SCALE.search, offer.tensors))

    def why(key: str) -> str | None:
        return "the file has no layer scale, and 1 is none" if neutral and _LAYER_SCALE.search(key) else None

    return why


def fit(
    model: nn.Module,
    offer: Offer,
    ours: Mapping[str, str],
    *,
    built: str,
    why_missing: Callable[[str], str | None],
    advise: Callable[[Misfit], str | None],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Report:
    """Copy what a file offers into a model, or raise and leave the model as it was.

    Args:
        model: One on the meta device gets its memory here, on the CPU.
        offer: Of the file.
        ours: The authors' key -> key in the model, for all that the model holds.
        built: What the model is, for messages.
        why_missing: Says why the model may keep its value of a key (the authors'), or None.
        advise: Says what to do about a misfit, or None for the advice that always holds.
        allow_missing: Patterns, as of file names, for keys of the model that may keep their values.
        allow_unexpected: Patterns for keys of the file that may be left out.

    Raises:
        CheckpointError: The file does not cover the model exactly.
    """
    file, names, tensors = offer.file, offer.names, offer.tensors
    missing, lost = {}, []
    for key, name in ours.items():
        if key in tensors:
            continue
        if reason := why_missing(key) or _allowed(allow_missing, name):
            missing[name] = reason
        else:
            lost.append(name)
    strangers = [name for key, name in names.items() if key not in ours]
    unexpected = {name: reason for name in strangers if (reason := _allowed(allow_unexpected, name))}
    state = model.state_dict()
    pairs = {key: (state[ours[key]], tensor) for key, tensor in tensors.items() if key in ours}
    forms = {
        ours[key]: f"{_form(target)} in the model and {_form(tensor)} in the file ({names[key]})"
        for key, (target, tensor) in pairs.items()
        if target.shape != tensor.shape or target.is_floating_point() != tensor.is_floating_point()
    }
    misfit = Misfit(lost, [name for name in strangers if name not in unexpected], forms)
    if misfit.lost or misfit.foreign or misfit.forms:
        raise CheckpointError(_message(file, built, misfit, advise(misfit)))

    _copy(model, {ours[key]: tensor for key, (_, tensor) in pairs.items()}, complete=not missing)
    return Report(
        path=file.path,
        container=file.container,
        naming=offer.layout.naming,
        prefix=offer.layout.prefix,
        model=built,
        taken={ours[key]: file.copies.get(names[key], names[key]) for key in ours if key in pairs},
        adapted={ours[key]: how for key, how in offer.adapted.items() if key in pairs},
        missing=missing,
        unexpected=unexpected,
        ignored=offer.ignored,
        dtypes=tuple(sorted({str(tensor.dtype) for target, tensor in pairs.values() if tensor.dtype != target.dtype})),
    )


def _allowed(patterns: Iterable[str], key: str) -> str | None:
    return next((f"allowed by {pattern!r}" for pattern in patterns if fnmatchcase(key, pattern)), None)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _message(file: WeightFile, built: str, misfit: Misfit, advice: str | None) -> str:
    lines = [f"{file.path} does not fit {built}; nothing was loaded."]
    if misfit.lost:
        lines.append(f"Missing in the file: {listed(misfit.lost)}.")
    if misfit.foreign:
        lines.append(f"Without a place in the model: {listed(misfit.foreign)}.")
    lines += [f"{key} is {form}." for key, form in list(misfit.forms.items())[:3]]
    if len(misfit.forms) > 3:
        lines.append(f"{len(misfit.forms) - 3} more tensors differ like this.")
    if advice is None and misfit.all_keys(_LAYER_SCALE.search):
        advice = "Only one of them has layer scale: build the model with layer_scale=None, or with a number."
    default = (
        "Build the model with the options that the file was trained with, or name what may differ in allow_missing and "
        "allow_unexpected."
    )
    return "\n  ".join([*lines, advice or default])


def _copy(model: nn.Module, values: dict[str, Tensor], *, complete: bool) -> None:
    if any(tensor.is_meta for tensor in chain(model.parameters(), model.buffers())):
        model.to_empty(device="cpu")
        if not complete:
            init_weights(model)
    result = model.load_state_dict(values, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
