"""Feed-forward networks of a DINO's weight file, whole or in parts: each form is made of the other without rounding."""

import torch

from internimage.loading import Offer

# The authors' keys. Tensor of a whole network -> that of a part, and the axis on which the parts stand side by side.
_DIVIDED = {
    "layers.0.0.weight": ("fc1_{}.weight", 0),
    "layers.0.0.bias": ("fc1_{}.bias", 0),
    "layers.1.weight": ("fc2_{}.weight", 1),
}
_WHOLE_BIAS, _PARTS_BIAS = "layers.1.bias", "fc2_bias"


def match_ffns(offer: Offer, held: int, built: int) -> None:
    """Change what a file with its networks in `held` parts offers to what a model with `built` parts takes.

    A network that lacks a tensor stays as it is, to be reported.
    """
    if held == built:
        return
    if held > 1:
        _join(offer, held)
    if built > 1:
        _split(offer, built)


def _join(offer: Offer, num_parts: int) -> None:
    for network in _networks(offer, _PARTS_BIAS):
        pieces = {
            whole: ([f"{network}{part.format(number)}" for number in range(num_parts)], dim)
            for whole, (part, dim) in _DIVIDED.items()
        }
        if any(key not in offer.tensors for keys, _ in pieces.values() for key in keys):
            continue
        for whole, (keys, dim) in pieces.items():
            target = f"{network}{whole}"
            offer.names[target] = " + ".join(offer.names.pop(key) for key in keys)
            offer.tensors[target] = torch.cat([offer.tensors.pop(key) for key in keys], dim)
            offer.adapted[target] = f"{num_parts} parts joined"
        _rename(offer, f"{network}{_PARTS_BIAS}", f"{network}{_WHOLE_BIAS}")


def _split(offer: Offer, num_parts: int) -> None:
    for network in _networks(offer, _WHOLE_BIAS):
        if any(f"{network}{whole}" not in offer.tensors for whole in _DIVIDED):
            continue
        for whole, (part, dim) in _DIVIDED.items():
            name = offer.names.pop(f"{network}{whole}")
            offer.adapted.pop(f"{network}{whole}", None)
            pieces = offer.tensors.pop(f"{network}{whole}").tensor_split(num_parts, dim)
            for number, piece in enumerate(pieces):
                target = f"{network}{part.format(number)}"
                offer.names[target], offer.tensors[target] = name, piece
                offer.adapted[target] = f"one of {num_parts} parts"
        _rename(offer, f"{network}{_WHOLE_BIAS}", f"{network}{_PARTS_BIAS}")


def _networks(offer: Offer, bias: str) -> list[str]:
    return [key.removesuffix(bias) for key in offer.tensors if key.endswith(f".ffns.0.{bias}")]


def _rename(offer: Offer, old: str, new: str) -> None:
    offer.names[new], offer.tensors[new] = offer.names.pop(old), offer.tensors.pop(old)
