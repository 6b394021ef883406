"""Every detector that the authors configured, built with our code on the meta device."""

from dataclasses import replace

import golden
import torch

from internimage import InternImage
from internimage.variants import CONFIGS
from tasks.detection.cascade import CascadeMaskRCNN, CascadeRCNN
from tasks.detection.composite import CompositeDINO, cb_internimage_h
from tasks.detection.dino import DINO
from tasks.detection.dino_keys import dino_official_to_ours, dino_ours_to_official
from tasks.detection.keys import rcnn_official_to_ours, rcnn_ours_to_official
from tasks.detection.mask_rcnn import MaskRCNN

KEYS = golden.FOLDER / "keys"
NAMES = sorted(path.relative_to(KEYS).as_posix().removesuffix(".json.gz") for path in KEYS.rglob("det_*.json.gz"))
NUM_CLASSES = {"coco": 80, "lvis": 1203, "openimages": 601, "voc": 20, "crowd_human": 1}


def backbone_config(name):
    size = name.split("internimage_")[1].split("_")[0].upper()
    return replace(CONFIGS[size], layer_scale=None if size in "HG" else 1.0)


def num_classes(name):
    return NUM_CLASSES[name.split("det_")[1].split("__")[0]]


def backbone_and_detector(name):
    """Return a function that makes the backbone of a config, and the one from it to the detector."""
    config = backbone_config(name)
    if "cbinternimage" in name:
        return cb_internimage_h, CompositeDINO
    if "dino" in name:
        chunks = 4 if "internimage_g" in name else 1
        return (
            lambda: InternImage(config, out_indices=(1, 2, 3)),
            lambda backbone, classes: DINO(backbone, classes, ffn_chunks=chunks),
        )
    detector = CascadeRCNN if "crowd_human" in name else CascadeMaskRCNN if "cascade" in name else MaskRCNN
    return lambda: InternImage(config), detector


def empty_detector(name):
    """Build the detector of a config on the meta device."""
    backbone, detector = backbone_and_detector(name)
    with torch.device("meta"):
        return detector(backbone(), num_classes(name))


def to_official(name, key):
    """The authors' name of a tensor of `empty_detector(name)`."""
    if "dino" in name:
        return dino_ours_to_official(key, backbone_config(name), composite="cbinternimage" in name)
    return rcnn_ours_to_official(key, backbone_config(name), num_stages=3 if "cascade" in name else 1)


def to_ours(name, key):
    """The inverse of `to_official`."""
    if "dino" in name:
        return dino_official_to_ours(key, backbone_config(name), composite="cbinternimage" in name)
    return rcnn_official_to_ours(key, backbone_config(name), num_stages=3 if "cascade" in name else 1)
