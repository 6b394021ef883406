"""What an optimizer is given: parameter groups, and a learning rate for each layer."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

# Parts of a DCNv3 that move where it samples or how much of the centre it keeps; `dcn_lr_multiplier` slows them down.
_SAMPLING_PARTS = frozenset({"offset", "center_feature_scale"})


def layer_lr_scales(layers: Sequence[Sequence[str]], decay: float, *, dense: bool = False) -> dict[str, float]:
    """Give every backbone parameter the factor on its learning rate, as in the authors' code.

    Each block has `decay` times the factor of its successor. Their classifiers give the last block the head's rate, and
    the stem that of the first block. Their detectors and segmentors count the head and the stem as layers of their own.

    Differences from the authors, all of them oversights there: an inner post-norm of the third stage learns like the
    block it follows (theirs: at the full rate in classifiers, like block k of the stage for the k-th of them in
    detectors), the last norm learns like the last block (theirs, in detectors: like the first of the stage), the layers
    of both backbones of a composite decay (theirs: none), a factor on the rate of sampling offsets reaches those of
    Mask2Former (theirs, in segmentors: looks in the backbone, where there are none), and a frozen parameter is not
    given to the optimizer.

    Args:
        layers: Parameter names from input to output: the stem, then one entry for each block
            (`Backbone.layer_groups()`).
        decay: Factor from one block to the one before it, in (0, 1]; 1 turns layer-wise rates off.
        dense: As in detectors and segmentors.

    Returns:
        Parameter name -> factor, for every name in `layers`.

    Raises:
        ValueError: `decay` is out of its range.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_lr_scales: layer_decay is {decay}, expected a number in (0, 1]; 1 turns it off.")
    last, first = (len(layers), 0) if dense else (len(layers) - 1, 1)
    return {name: decay ** (last - max(first, layer)) for layer, names in enumerate(layers) for name in names}


def is_sampling_parameter(name: str) -> bool:
    """Tell whether a parameter belongs to the offsets or the centre feature scale of a DCNv3."""
    return not _SAMPLING_PARTS.isdisjoint(name.split("."))


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr_scale: Callable[[str], float],
    undecayed: Callable[[str], bool] = lambda name: False,
) -> list[dict[str, Any]]:
    """Gather trainable parameters into one group for each pair of learning rate and weight decay.

    Vectors and scalars (norms, biases, layer scales) get no weight decay; frozen parameters get no group.

    Args:
        parameters: Names and parameters.
        lr_scale: Name -> factor on the base learning rate.
        undecayed: Name -> whether a matrix gets no weight decay either.

    Returns:
        Optimizer groups in order of first appearance. Beside `params` a group holds `lr_scale`, a factor that is still
        to be applied to its learning rate, and `weight_decay` 0 where there is none.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        key = (lr_scale(name), parameter.ndim > 1 and not undecayed(name))
        if key not in groups:
            groups[key] = {"params": [], "lr_scale": key[0]} | ({} if key[1] else {"weight_decay": 0.0})
        groups[key]["params"].append(parameter)
    return list(groups.values())
