"""Tensors of UPerNet and SegFormer against the key lists of every one that the authors configured."""

from dataclasses import replace

import golden
import pytest
import torch
from golden_models import official

from internimage import InternImage
from internimage.variants import CONFIGS
from tasks.segmentation.keys import num_segmentor_classes, segmentor_official_to_ours, segmentor_ours_to_official
from tasks.segmentation.segformer import SegFormer
from tasks.segmentation.upernet import UPerNet

FILES = sorted(
    path.name.removesuffix(".json.gz")
    for pattern in ("seg_*upernet*", "seg_*segformer*")
    for path in (golden.FOLDER / "keys").glob(pattern)
)


def backbone_config(name):
    size = name.split("internimage_")[1].split("_")[0].upper()
    return replace(CONFIGS[size], layer_scale=None if size in "HG" else 1.0)


def test_every_config_is_there():
    assert len(FILES) == 20


@pytest.mark.parametrize("name", FILES)
def test_a_segmentor_has_the_authors_keys_shapes_and_parameter_count(name):
    expected, config = official(name), backbone_config(name)
    with torch.device("meta"):
        held = {key: torch.empty(shape) for key, shape in expected["state_dict"].items()}
        model = (UPerNet if "upernet" in name else SegFormer)(InternImage(config), num_segmentor_classes(held))
    found = {segmentor_ours_to_official(key, config): list(value.shape) for key, value in model.state_dict().items()}
    assert found == expected["state_dict"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]
    back = {segmentor_official_to_ours(key, config) for key in expected["state_dict"]}
    assert back == model.state_dict().keys()


def test_a_foreign_key_is_refused():
    config = CONFIGS["T"]
    with pytest.raises(KeyError, match=r"have no tensor 'decode_head\.cls_embed\.weight'"):
        segmentor_official_to_ours("decode_head.cls_embed.weight", config)
    with pytest.raises(KeyError, match=r"have no tensor 'head\.nothing'"):
        segmentor_ours_to_official("head.nothing", config)
    with pytest.raises(KeyError, match="neither UPerNet nor SegFormer"):
        num_segmentor_classes({"decode_head.cls_embed.weight": torch.empty(20, 256)})
