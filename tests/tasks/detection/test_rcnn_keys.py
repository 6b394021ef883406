"""Tensors of the two-stage detectors against the key lists of every one that the authors configured."""

from dataclasses import replace

import golden
import pytest
import torch
from golden_models import official

from internimage import InternImage
from internimage.variants import CONFIGS
from tasks.detection.cascade import CascadeMaskRCNN, CascadeRCNN
from tasks.detection.keys import rcnn_official_to_ours, rcnn_ours_to_official
from tasks.detection.mask_rcnn import MaskRCNN

FILES = sorted(
    path.name.removesuffix(".json.gz")
    for pattern in ("det_*mask_rcnn*", "det_*cascade*")
    for path in (golden.FOLDER / "keys").glob(pattern)
)


def empty_detector(name):
    """Build the detector of a config on the meta device; return it, its backbone's config and its number of stages."""
    config = replace(CONFIGS[name.split("internimage_")[1].split("_")[0].upper()], layer_scale=1.0)
    with torch.device("meta"):
        backbone = InternImage(config)
        if "crowd_human" in name:
            return CascadeRCNN(backbone, 1), config, 3
        if "cascade" in name:
            return CascadeMaskRCNN(backbone, 80), config, 3
        return MaskRCNN(backbone, 80), config, 1


def test_every_config_is_there():
    assert len(FILES) == 12


@pytest.mark.parametrize("name", FILES)
def test_a_detector_has_the_authors_keys_shapes_and_parameter_count(name):
    expected = official(name)
    model, config, num_stages = empty_detector(name)
    found = {
        rcnn_ours_to_official(key, config, num_stages=num_stages): list(value.shape)
        for key, value in model.state_dict().items()
    }
    assert found == expected["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]
    back = {rcnn_official_to_ours(key, config, num_stages=num_stages) for key in expected["state_dict"]}
    assert back == model.state_dict().keys()


def test_a_foreign_key_is_refused():
    config = CONFIGS["T"]
    with pytest.raises(KeyError, match=r"has no tensor 'roi_head\.mask_iou_head\.weight'"):
        rcnn_official_to_ours("roi_head.mask_iou_head.weight", config, num_stages=1)
    with pytest.raises(KeyError, match=r"has no tensor 'roi\.nothing'"):
        rcnn_ours_to_official("roi.nothing", config, num_stages=1)
