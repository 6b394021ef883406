"""Tensors of Mask2Former against the key lists of every one that the authors configured."""

from dataclasses import replace

import golden
import pytest
import torch
from golden_models import official

from internimage import InternImage
from internimage.variants import CONFIGS
from tasks.segmentation.mask2former import Mask2Former
from tasks.segmentation.mask2former_keys import (
    mask2former_official_to_ours,
    mask2former_ours_to_official,
    num_mask2former_classes,
    to_official,
    to_ours,
)

FILES = sorted(path.name.removesuffix(".json.gz") for path in (golden.FOLDER / "keys").glob("seg_*mask2former*"))
NUM_CLASSES = {
    "ade20k": 150,
    "cityscapes": 19,
    "coco_stuff10k": 171,
    "coco_stuff164k": 171,
    "mapillary": 19,
    "nyu_depth_v2": 40,
    "pascal_context": 59,
}
LARGE = {"num_queries": 200, "dim": 1024, "num_heads": 32, "encoder_hidden_dim": 4096, "hidden_dim": 4096}
CONFIG = replace(CONFIGS["H"], layer_scale=None)


def test_every_config_is_there():
    assert len(FILES) == 8


@pytest.mark.parametrize("name", FILES)
def test_a_segmentor_has_the_authors_keys_shapes_and_parameter_count(name):
    expected, data = official(name), name.removeprefix("seg_").split("__")[0]
    with torch.device("meta"):
        options = LARGE if data in ("ade20k", "coco_stuff10k", "coco_stuff164k") else {}
        model = Mask2Former(InternImage(CONFIG), NUM_CLASSES[data], **options)
    state = model.state_dict()
    found = to_official(state, CONFIG)
    assert {key: list(tensor.shape) for key, tensor in found.items()} == expected["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]
    assert num_mask2former_classes(found) == NUM_CLASSES[data]
    back = to_ours(found, CONFIG)
    assert back.keys() == state.keys()
    assert all(back[key] is tensor for key, tensor in state.items())


def test_a_foreign_key_is_refused():
    with pytest.raises(KeyError, match=r"authors' Mask2Former has no tensor 'decode_head\.conv_seg\.weight'"):
        mask2former_official_to_ours("decode_head.conv_seg.weight", CONFIG)
    with pytest.raises(KeyError, match=r"Mask2Former has no tensor 'head\.classifier\.weight'"):
        mask2former_ours_to_official("head.classifier.weight", CONFIG)
    with pytest.raises(KeyError, match="this is not a Mask2Former"):
        num_mask2former_classes({"decode_head.conv_seg.weight": torch.zeros(19, 4)})
