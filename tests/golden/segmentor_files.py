"""Segmentors of every kind, small, with random weights, and checks of what is loaded into them."""

from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from detector_files import assert_equal

from internimage import internimage_debug
from internimage.checkpoints import CheckpointError
from tasks.segmentation.checkpoints import load_segmentor
from tasks.segmentation.mask2former import Mask2Former
from tasks.segmentation.segformer import SegFormer
from tasks.segmentation.upernet import UPerNet

MASK2FORMER_SIZES = {
    "num_queries": 10,
    "dim": 32,
    "num_heads": 4,
    "encoder_hidden_dim": 48,
    "hidden_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
}


def upernet(num_classes, *, backbone=None, **options):
    backbone = backbone or internimage_debug(layer_scale=1.0)
    return UPerNet(backbone, num_classes, **{"channels": 16, "aux_channels": 8} | options)


def segformer(num_classes, *, backbone=None):
    return SegFormer(backbone or internimage_debug(layer_scale=1.0), num_classes, channels=16)


def mask2former(num_classes, **options):
    return Mask2Former(internimage_debug(), num_classes, **MASK2FORMER_SIZES | options)


KINDS = {
    "UPerNet": upernet,
    "UPerNet without auxiliary head": partial(upernet, aux_weight=0),
    "SegFormer": segformer,
    "Mask2Former": mask2former,
}


@cache
def empty(kind, num_classes):
    """A small segmentor on the meta device."""
    with torch.device("meta"):
        return KINDS[kind](num_classes)


def build(kind, num_classes=3, seed=0):
    """A small segmentor all of whose tensors are random."""
    # Without the time that start values take.
    model = deepcopy(empty(kind, num_classes)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.uniform_(-0.5, 0.5, generator=generator) if tensor.is_floating_point() else tensor.zero_()
    return model


def assert_refused(model, path, match, **options):
    """Check that loading raises and changes nothing."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_segmentor(model, path, **options)
    assert_equal(model.state_dict(), before)
