"""Tensors of every detector against the key list of every one that the authors configured."""

import pytest
from golden_detectors import NAMES, empty_detector, to_official, to_ours
from golden_models import official

from internimage.variants import CONFIGS
from tasks.detection.dino_keys import dino_official_to_ours, dino_ours_to_official
from tasks.detection.keys import rcnn_official_to_ours, rcnn_ours_to_official


def test_every_config_is_there():
    assert len(NAMES) == 23


@pytest.mark.parametrize("name", NAMES)
def test_a_detector_has_the_authors_keys_shapes_and_parameter_count(name):
    expected, model = official(name), empty_detector(name)
    found = {to_official(name, key): list(value.shape) for key, value in model.state_dict().items()}
    assert found == expected["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]
    assert {to_ours(name, key) for key in expected["state_dict"]} == model.state_dict().keys()


def test_a_foreign_key_of_a_two_stage_detector_is_refused():
    config = CONFIGS["T"]
    with pytest.raises(KeyError, match=r"has no tensor 'roi_head\.mask_iou_head\.weight'"):
        rcnn_official_to_ours("roi_head.mask_iou_head.weight", config, num_stages=1)
    with pytest.raises(KeyError, match=r"has no tensor 'roi\.nothing'"):
        rcnn_ours_to_official("roi.nothing", config, num_stages=1)


@pytest.mark.parametrize("composite", [False, True])
def test_a_foreign_key_of_dino_is_refused(composite):
    config = CONFIGS["H"]
    for key in ("neck.1.convs.0.gn.weight", "backbone.cb_modules.1.patch_embed.conv1.weight"):
        with pytest.raises(KeyError, match=f"DINO has no tensor '{key}'"):
            dino_official_to_ours(key, config, composite=composite)
    with pytest.raises(KeyError, match=r"DINO has no tensor 'backbone\.lead\.stem"):
        dino_ours_to_official("backbone.lead.stem.conv1.weight", config, composite=composite)
