"""Detectors and their parts: plain modules and functions."""

from tasks.detection.cascade import CascadeMaskRCNN, CascadeRCNN
from tasks.detection.composite import CompositeDINO, CompositeInternImage, cb_internimage_h
from tasks.detection.dino import DINO
from tasks.detection.mask_rcnn import RCNN, MaskRCNN

__all__ = [
    "DINO",
    "RCNN",
    "CascadeMaskRCNN",
    "CascadeRCNN",
    "CompositeDINO",
    "CompositeInternImage",
    "MaskRCNN",
    "cb_internimage_h",
]
