"""Detectors and their parts: plain modules and functions."""

from tasks.detection.cascade import CascadeMaskRCNN, CascadeRCNN
from tasks.detection.mask_rcnn import RCNN, MaskRCNN

__all__ = ["RCNN", "CascadeMaskRCNN", "CascadeRCNN", "MaskRCNN"]
