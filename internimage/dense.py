"""Weight files of detectors and segmentors: what loading either has in common. Keys are the authors'."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeVar

from torch import Tensor, nn

from internimage.config import InternImageConfig
from internimage.layouts import Layout, Shape, count_parts
from internimage.loading import Misfit, Offer, fit, no_layer_scale
from internimage.report import Report, listed
from internimage.weight_files import CheckpointError, WeightFile

DenseHead = Literal["load", "new"]

Namer = Callable[[str], str]


class DenseModel(Protocol):
    """A detector or a segmentor: what a file holds, or what a model is; `str()` of it names it."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes, None where the class layer is missing."""

    def fits(self, built: Self) -> bool:
        """Whether the weights of this one go into a model that is `built`, but for what depends on the classes."""


_Held = TypeVar("_Held", bound=DenseModel)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What tells detectors from segmentors.

    Args:
        noun: For messages.
        class_layers: Finds the tensors with rows for classes, in the authors' names.
        advise: Says what to do about a misfit, or None for the advice that always holds.
    """

    noun: str
    class_layers: re.Pattern[str]
    advise: Callable[[Misfit], str | None]


def plural(number: int, noun: str, ending: str = "s") -> str:
    """Return a number with its noun, for example `1 class`."""
    return f"{number} {noun}{ending if number != 1 else ''}"


def count_classes(number: int | None) -> str:
    """Say how many classes there are, None where there is no class layer."""
    return "no class layer" if number is None else plural(number, "class", "es")


def or_same(name: Namer) -> Namer:
    """Return the same map of keys, in which a key without a counterpart stays."""

    def renamed(key: str) -> str:
        try:
            return name(key)
        except KeyError:
            return key

    return renamed


def check_head(head: str) -> None:
    """Check the choice of class layers.

    Raises:
        CheckpointError: It is neither `load` nor `new`.
    """
    if head not in ("load", "new"):
        raise CheckpointError(f"head is {head!r}, expected 'load' or 'new'.")


def check_same(kind: Kind, file: WeightFile, held: _Held, built: _Held, head: DenseHead) -> None:
    """Check that a file holds what the model is.

    Raises:
        CheckpointError: It holds another structure, or with `head="load"` another number of classes.
    """
    if not held.fits(built):
        raise CheckpointError(
            f"{file.path} holds {held}, the model is {built}; nothing was loaded. Build that {kind.noun}, or choose "
            "another file. To start from its backbone alone, write that to a file of its own: "
            f"python -m internimage.convert export --dense {file.path.name} backbone.pth"
        )
    classes = held.num_classes
    if head == "load" and classes is not None and classes != built.num_classes:
        raise CheckpointError(
            f"{file.path} has {count_classes(classes)}, the model {built.num_classes}; nothing was loaded. Say "
            f"head='new' to keep the model's own class layers, or build it with num_classes={classes}."
        )


def offer_named(file: WeightFile, layout: Layout, names: dict[str, str]) -> Offer:
    """Offer some tensors of a file, and say why the rest is not used.

    Args:
        file: The file.
        layout: Of the file.
        names: The authors' key -> key in the file.
    """
    used, ignored = set(names.values()), dict(file.skipped)
    others = count_parts(key.removeprefix(layout.root) for key, name in layout.names.items() if name not in used)
    ignored |= {part: f"another part, {count} tensors" for part, count in others.items()}
    tensors = {key: file.tensors[name] for key, name in names.items()}
    return Offer(file=file, layout=layout, names=names, tensors=tensors, ignored=ignored)


def backbone_names(layout: Layout, config: InternImageConfig) -> dict[str, str]:
    """Return the authors' key in a detector or segmentor -> key in the file, of the backbone alone."""
    return {f"backbone.{key}": name for key, name in layout.official_keys(config)[0].items()}


def fit_dense(
    kind: Kind,
    model: nn.Module,
    offer: Offer,
    name: Namer,
    *,
    built: DenseModel,
    shape: Shape,
    config: InternImageConfig,
    head: DenseHead,
    backbone_only: bool,
    why_missing: Callable[[str], str | None] = lambda key: None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Report:
    """Copy what a file offers into a model, or raise and leave the model as it was.

    Args:
        kind: Detector or segmentor.
        model: One on the meta device gets its memory here, on the CPU.
        offer: Of the file.
        name: Our key -> the authors'.
        built: What the model is.
        shape: Of its backbone.
        config: Of its backbone.
        head: `new` keeps the model's class layers.
        backbone_only: The file has no more to offer than a backbone.
        why_missing: Says for what else the model may keep its value of a key, or None.
        allow_missing: Patterns, as of file names, for keys of the model that may keep their values.
        allow_unexpected: Patterns for keys of the file that may be left out.

    Raises:
        CheckpointError: The file does not cover the model exactly.
    """
    if head == "new":
        for key in [key for key in offer.names if kind.class_layers.search(key)]:
            offer.ignored[offer.names.pop(key)] = "head='new'"
            del offer.tensors[key]
    scale_free = no_layer_scale(offer, config)

    def why(key: str) -> str | None:
        if backbone_only and not key.startswith("backbone."):
            return f"the file has no {kind.noun}"
        if head == "new" and kind.class_layers.search(key):
            return "head='new'"
        return why_missing(key) or scale_free(key)

    return fit(
        model,
        offer,
        {name(key): key for key in model.state_dict()},
        built=f"{built} on {shape}",
        why_missing=why,
        advise=kind.advise,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )


def official_weights(kind: Kind, model: nn.Module, name: Namer) -> dict[str, Tensor]:
    """Return the weights of a model under the authors' keys, without copying them.

    Args:
        kind: Detector or segmentor.
        model: The model.
        name: Our key -> the authors'; a key without a counterpart stays.

    Raises:
        CheckpointError: A tensor has no counterpart.
    """
    state = model.state_dict()
    # No key is the same in both.
    if own := [key for key in state if name(key) == key]:
        raise CheckpointError(f"{type(model).__name__}: the authors' {kind.noun}s have no {listed(own)}.")
    return {name(key): tensor for key, tensor in state.items()}
