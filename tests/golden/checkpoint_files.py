"""Weight files as the authors and others write them: their keys and shapes, random values, small."""

from dataclasses import replace

import golden_models
import pytest
import torch

from internimage import Classifier, ClipProjectorHead, ConvHead, InternImage
from internimage.checkpoints import CheckpointError, load_checkpoint, official_state_dict

CLASSES = 11


def shapes(name):
    """Shape by state-dict key of the authors' model `name`."""
    return golden_models.official(name)["state_dict"]


def authors(name, num_classes=CLASSES, *, seed=0):
    """Random weights under the keys of the authors' classifier `name`."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes(name).items():
        shape = [num_classes, *shape[1:]] if key.startswith("head.") else shape
        floating = not key.endswith("num_batches_tracked")
        weights[key] = torch.rand(shape, generator=generator) if floating else torch.tensor(5)
    return weights


def hollow(name):
    """Weights of full size in a few hundred kB: each tensor is one number, expanded."""
    weights = {key: torch.zeros(()).expand(shape) for key, shape in shapes(name).items()}
    return {key: t if t.ndim else torch.zeros((), dtype=torch.int64) for key, t in weights.items()}


def in_detector(weights):
    """An OpenMMLab file: the backbone of a classifier under a prefix, and other parts."""
    heads = ("head.", "conv_head.")
    state = {f"backbone.{key}": tensor for key, tensor in weights.items() if not key.startswith(heads)}
    parts = {"neck.conv.weight": torch.ones(2), "neck.conv.bias": torch.ones(2), "roi_head.fc.weight": torch.ones(3)}
    return {"meta": {"epoch": 12}, "state_dict": state | parts, "optimizer": {"state": {}}}


def build_meta(name, num_classes=CLASSES, **changes):
    """Our classifier `name` on the meta device, with other options of the backbone where given."""
    head = ClipProjectorHead if golden_models.official(name)["config"].get("use_clip_projector") else ConvHead
    with torch.device("meta"):
        return Classifier(InternImage(replace(golden_models.config(name), **changes)), num_classes, head)


def build(name, num_classes=CLASSES, **changes):
    """Our classifier `name` with random values, but layer scale 1, without the time that its start values take."""
    model = build_meta(name, num_classes, **changes).to_empty(device="cpu")
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.fill_(1) if ".scale" in key or not tensor.is_floating_point() else tensor.uniform_(-1, 1)
    return model


def saved(path, content):
    torch.save(content, path)
    return path


def assert_holds(model, weights, *, dense=False):
    """Check that a model has exactly these weights, under the authors' keys."""
    found = official_state_dict(model, dense=dense)
    assert found.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(found[key], tensor.to(found[key].dtype)), key


def assert_refused(model, path, match, **options):
    """Check that loading raises and changes nothing."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(model, path, **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "the model was changed"
