"""Detectors of every kind, small, with random weights, and checks of what is loaded into them."""

from functools import partial

import pytest
import torch

from internimage import internimage_debug
from internimage.checkpoints import CheckpointError
from tasks.detection.cascade import STAGES
from tasks.detection.checkpoints import load_detector
from tasks.detection.composite import CompositeDINO, CompositeInternImage
from tasks.detection.dino import DINO
from tasks.detection.mask_rcnn import RCNN
from tasks.detection.roi_heads import RoIHeads
from tasks.detection.rpn import RPN

DINO_SIZES = {"num_queries": 20, "denoising_queries": 6, "dim": 32, "hidden_dim": 64, "num_layers": 2}


def rcnn(num_classes, *, stages=1, backbone=None, **options):
    """A two-stage detector of a hundredth of the usual size."""
    backbone = backbone or internimage_debug(layer_scale=1.0)
    strides = backbone.strides
    roi = RoIHeads(num_classes, strides, STAGES[:stages], channels=16, **options)
    return RCNN(backbone, RPN((*strides, 2 * strides[-1]), channels=16), roi, channels=16)


def dino(num_classes, **options):
    return DINO(internimage_debug(out_indices=(1, 2, 3)), num_classes, **DINO_SIZES | options)


def composite(num_classes, **options):
    streams = internimage_debug(), internimage_debug(out_indices=(1, 2, 3))
    return CompositeDINO(CompositeInternImage(*streams), num_classes, **DINO_SIZES | options)


KINDS = {
    "Faster R-CNN": partial(rcnn, masks=False),
    "Mask R-CNN": rcnn,
    "Cascade R-CNN": partial(rcnn, stages=3, masks=False),
    "Cascade Mask R-CNN": partial(rcnn, stages=3, num_convs=1, num_fcs=1),
    "DINO": dino,
    "DINO in parts": partial(dino, ffn_chunks=4),
    "CB-DINO": composite,
}


def build(kind, num_classes=3, seed=0):
    """A small detector all of whose tensors are random."""
    # Without the time that start values take.
    with torch.device("meta"):
        model = KINDS[kind](num_classes)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        tensor.uniform_(-0.5, 0.5, generator=generator) if tensor.is_floating_point() else tensor.zero_()
    return model


def part(model, keys):
    """The tensors of a model under these keys."""
    state = model.state_dict()
    return {key: state[key] for key in keys}


def assert_equal(found, expected):
    """Check that two state dicts hold the same tensors."""
    assert found.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert different == []


def assert_refused(model, path, match, **options):
    """Check that loading raises and changes nothing."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_detector(model, path, **options)
    assert_equal(model.state_dict(), before)


@torch.no_grad()
def detect(model):
    """What a detector finds in one image of noise."""
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    return model.eval()(image, [(64, 96)])[0]
