"""The authors' UPerNet and SegFormer of the stored numbers, built with our code; images and targets."""

from dataclasses import replace

import golden
import golden_rcnn
import numpy as np
import torch

from internimage import InternImage
from internimage.variants import CONFIGS
from tasks.segmentation.keys import segmentor_official_to_ours, segmentor_ours_to_official
from tasks.segmentation.segformer import SegFormer
from tasks.segmentation.upernet import UPerNet

KINDS = {"upernet_t": UPerNet, "segformer_lmini": SegFormer}
BACKBONES = {
    "upernet_t": replace(CONFIGS["T"], layer_scale=1.0),
    "segformer_lmini": golden_rcnn.BACKBONES["cascade_lmini"],
}
NUM_CLASSES = 150
SIZE = (128, 160)
ORIGINAL_SIZE = (200, 250)
# Class layers were filled with larger weights, so that scores spread.
CLASS_GAIN = 2.0


def segmentor(name):
    """Build the segmentor `name` with the weights of the stored numbers, without dropout, in evaluation mode."""
    config = BACKBONES[name]
    with torch.device("meta"):
        model = KINDS[name](InternImage(config), NUM_CLASSES, dropout=0.0)
    model = model.to_empty(device="cpu")
    filled = golden.load(model, lambda key: segmentor_ours_to_official(key, config))
    assert len(filled) == len(model.state_dict())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("classifier.weight"):
                parameter *= CLASS_GAIN
    return model.eval()


def images():
    """Return the two images."""
    return golden.image("seg", (2, 3, *SIZE))


def raw(name):
    """Return the stored arrays of the segmentor `name`."""
    return np.load(golden.FOLDER / "seg" / f"{name}.npz")


def target(name):
    """Return the semantic maps of the two images; a tenth of the pixels is to be ignored."""
    return torch.from_numpy(raw(name)["gt_semantic"]).long()


def gradient_errors(name, model):
    """Compare the parameters' gradients with the stored ones.

    Returns:
        The errors of the norms and of the projections on noise, each divided by the norm, or by 1e-3 where the norm is
        smaller; and their names.
    """
    values, parameters = raw(name), dict(model.named_parameters())
    names = values["grad_names"].tolist()
    norms, projections = [], []
    for key in names:
        gradient = parameters.pop(segmentor_official_to_ours(key, BACKBONES[name])).grad.double()
        norms.append(gradient.norm().item())
        projections.append((gradient * golden.noise(f"proj/{key}", tuple(gradient.shape), torch.float64)).sum().item())
    assert not parameters
    size = np.maximum(values["grad_norm"], 1e-3)
    return np.abs(norms - values["grad_norm"]) / size, np.abs(projections - values["grad_proj"]) / size, names
