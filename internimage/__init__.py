"""InternImage backbones and classifiers. Knows PyTorch and `ops`; never Lightning."""

from internimage.backbone import Backbone
from internimage.config import InternImageConfig
from internimage.heads import ClipProjectorHead, ConvHead
from internimage.init import init_weights, materialise
from internimage.model import Classifier, HeadFactory, InternImage
from internimage.variants import (
    internimage_b,
    internimage_debug,
    internimage_g,
    internimage_h,
    internimage_l,
    internimage_s,
    internimage_t,
    internimage_xl,
)

__all__ = [
    "Backbone",
    "Classifier",
    "ClipProjectorHead",
    "ConvHead",
    "HeadFactory",
    "InternImage",
    "InternImageConfig",
    "init_weights",
    "internimage_b",
    "internimage_debug",
    "internimage_g",
    "internimage_h",
    "internimage_l",
    "internimage_s",
    "internimage_t",
    "internimage_xl",
    "materialise",
]
