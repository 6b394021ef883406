"""Start values, and building models whose parameters would not fit into memory twice."""

from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# The authors' spread for every linear layer, cut at +-2 (which is 100 of it, so never in practice).
LINEAR_STD = 0.02


def init_weights(module: nn.Module) -> None:
    """Start every parameter and running statistic inside `module` afresh, as the authors do.

    Linear layers: normal of standard deviation 0.02, bias 0. Convolutions and norms: PyTorch's defaults. Layers that
    know better (DCNv3, layer scale) follow their own `reset_parameters`.
    """
    # `apply` reaches children before parents, so the DCNv3 has the last word about the linear layers in it.
    module.apply(_reset)


def materialise(module: ModuleT, device: torch.device | str = "cpu") -> ModuleT:
    """Give a model that was built on the meta device its memory and its start values, in place.

    Nothing is held twice, so that a model of 3 billion parameters needs 12 GB in float32 and no more:

        with torch.device("meta"):
            model = Classifier(internimage_g(), num_classes=1000, head=ClipProjectorHead)
        materialise(model, "cuda")

    Args:
        module: Layers of PyTorch or of this package. Existing values are lost.
        device: Where the parameters and buffers go.

    Returns:
        `module` itself.

    Raises:
        TypeError: A layer in `module` has parameters or buffers but no `reset_parameters()` to fill them.
    """
    for name, layer in module.named_modules():
        owned = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if owned and not callable(getattr(layer, "reset_parameters", None)):
            raise TypeError(
                f"materialise: {name or 'the module'} is a {type(layer).__name__} without reset_parameters(), so its "
                "memory would hold no start values. Give it that method, or build it on the device."
            )
    module.to_empty(device=device)
    init_weights(module)
    return module


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=LINEAR_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
