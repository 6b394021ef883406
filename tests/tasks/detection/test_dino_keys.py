"""Tensors of DINO and CB-DINO against the key lists of every one that the authors configured."""

from dataclasses import replace

import golden
import pytest
import torch
from golden_models import official

from internimage import InternImage
from internimage.variants import CONFIGS
from tasks.detection.composite import CompositeDINO, cb_internimage_h
from tasks.detection.dino import DINO
from tasks.detection.dino_keys import dino_official_to_ours, dino_ours_to_official

KEYS = golden.FOLDER / "keys"
FILES = sorted(path.relative_to(KEYS).as_posix().removesuffix(".json.gz") for path in KEYS.rglob("det_*dino*"))
NUM_CLASSES = {"coco": 80, "lvis": 1203, "openimages": 601, "voc": 20}


def backbone_config(name):
    size = name.split("internimage_")[1].split("_")[0].upper()
    return replace(CONFIGS[size], layer_scale=None if size in "HG" else 1.0)


def empty_detector(name):
    """Build the detector of a config on the meta device."""
    num_classes = NUM_CLASSES[name.split("det_")[1].split("__")[0]]
    with torch.device("meta"):
        if "cbinternimage" in name:
            return CompositeDINO(cb_internimage_h(), num_classes)
        backbone = InternImage(backbone_config(name), out_indices=(1, 2, 3))
        return DINO(backbone, num_classes, ffn_chunks=4 if "internimage_g" in name else 1)


def test_every_config_is_there():
    assert len(FILES) == 11


@pytest.mark.parametrize("name", FILES)
def test_a_detector_has_the_authors_keys_shapes_and_parameter_count(name):
    expected, config, composite = official(name), backbone_config(name), "cbinternimage" in name
    model = empty_detector(name)
    found = {
        dino_ours_to_official(key, config, composite=composite): list(value.shape)
        for key, value in model.state_dict().items()
    }
    assert found == expected["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]
    back = {dino_official_to_ours(key, config, composite=composite) for key in expected["state_dict"]}
    assert back == model.state_dict().keys()


@pytest.mark.parametrize("composite", [False, True])
def test_a_foreign_key_is_refused(composite):
    config = CONFIGS["H"]
    for key in ("neck.1.convs.0.gn.weight", "backbone.cb_modules.1.patch_embed.conv1.weight"):
        with pytest.raises(KeyError, match=f"DINO has no tensor '{key}'"):
            dino_official_to_ours(key, config, composite=composite)
    with pytest.raises(KeyError, match=r"DINO has no tensor 'backbone\.lead\.stem"):
        dino_ours_to_official("backbone.lead.stem.conv1.weight", config, composite=composite)
