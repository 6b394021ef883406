"""The authors' models that the stored numbers belong to, described by their files and built with our code."""

import gzip
import json
from functools import partial
from typing import Any

import golden
import torch

from internimage import Classifier, ClipProjectorHead, ConvHead, InternImage, InternImageConfig
from internimage.keys import ours_to_official

# Authors' option -> ours, where the names differ.
_RENAMED = {"norm_layer": "norm", "act_layer": "activation", "level2_post_norm_block_ids": "post_norm_blocks"}


def official(name: str) -> dict[str, Any]:
    """Return the file `keys/<name>.json.gz`: config, parameter count, and shapes by state-dict key."""
    with gzip.open(golden.FOLDER / "keys" / f"{name}.json.gz", "rt") as file:
        return json.load(file)


def config(name: str) -> InternImageConfig:
    """Return our config of the authors' classifier `name`."""
    options = {_RENAMED.get(key, key): value for key, value in official(name)["config"].items()}
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    # Said by post_norm_blocks and by the choice of head.
    for key in ("level2_post_norm", "use_clip_projector"):
        options.pop(key, None)
    reduced_or_g = name == "G" or "mini" in name
    return InternImageConfig(**options, strict=not reduced_or_g)


def empty_classifier(name: str, num_classes: int = 1000) -> Classifier:
    """Build the classifier `name` on the meta device."""
    backbone_config = config(name)
    conv_head = partial(ConvHead, activation=backbone_config.activation)
    head = ClipProjectorHead if official(name)["config"].get("use_clip_projector") else conv_head
    with torch.device("meta"):
        return Classifier(InternImage(backbone_config), num_classes, head)


def classifier(name: str) -> Classifier:
    """Build the classifier `name` with the weights of the stored numbers, in evaluation mode."""
    model, backbone_config = empty_classifier(name).to_empty(device="cpu"), config(name)
    filled = golden.load(model, lambda key: ours_to_official(key, backbone_config))
    assert len(filled) == len(model.state_dict())
    return model.eval()
