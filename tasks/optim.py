"""What an optimizer is given: parameter groups, a learning rate for each layer, and the schedule."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

# Parts of a DCNv3 that move where it samples or how much of the centre it keeps; `dcn_lr_multiplier` slows them down.
_SAMPLING_PARTS = frozenset({"offset", "center_feature_scale"})


def layer_lr_scales(layers: Sequence[Sequence[str]], decay: float) -> dict[str, float]:
    """Give every backbone parameter the factor on its learning rate, as in the authors' classification code.

    The last block has factor 1 and each block before it `decay` times that of its successor; the stem learns like the
    first block. Two differences from the authors, both of them oversights there: an inner post-norm of the third stage
    learns like the block it follows, not at the full rate, and a frozen parameter is not given to the optimizer.

    Args:
        layers: Parameter names from input to output: the stem, then one entry for each block
            (`Backbone.layer_groups()`).
        decay: Factor from one block to the one before it, in (0, 1]; 1 turns layer-wise rates off.

    Returns:
        Parameter name -> factor, for every name in `layers`.

    Raises:
        ValueError: `decay` is out of its range.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_lr_scales: layer_decay is {decay}, expected a number in (0, 1]; 1 turns it off.")
    num_blocks = len(layers) - 1
    return {name: decay ** (num_blocks - max(1, layer)) for layer, names in enumerate(layers) for name in names}


def is_sampling_parameter(name: str) -> bool:
    """Tell whether a parameter belongs to the offsets or the centre feature scale of a DCNv3."""
    return not _SAMPLING_PARTS.isdisjoint(name.split("."))


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], lr_scale: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Gather trainable parameters into one group for each pair of learning rate and weight decay.

    Vectors and scalars (norms, biases, layer scales) get no weight decay; frozen parameters get no group.

    Args:
        parameters: Names and parameters.
        lr_scale: Name -> factor on the base learning rate.

    Returns:
        Optimizer groups in order of first appearance. Beside `params` a group holds `lr_scale`, which
        `scale_learning_rates` applies, and `weight_decay` 0 where there is none.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        key = (lr_scale(name), parameter.ndim > 1)
        if key not in groups:
            groups[key] = {"params": [], "lr_scale": key[0]} | ({} if key[1] else {"weight_decay": 0.0})
        groups[key]["params"].append(parameter)
    return list(groups.values())


def warmup_cosine(
    step: int, *, warmup_steps: int, total_steps: int, warmup_lr_ratio: float, min_lr_ratio: float
) -> float:
    """Return the learning rate before optimizer step `step` (from 0), as a fraction of the base rate.

    Linear from `warmup_lr_ratio` to 1 over `warmup_steps`, then a cosine to `min_lr_ratio` at `total_steps`. As in the
    authors' recipe (timm without a warm-up prefix) the cosine's clock starts with the warm-up, so that the rate after
    the warm-up is a little below the base rate. After `total_steps` the rate stays at `min_lr_ratio`.
    """
    if step < warmup_steps:
        return warmup_lr_ratio + (1 - warmup_lr_ratio) * step / warmup_steps
    progress = min(1.0, step / total_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
