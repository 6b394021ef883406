import golden
import pytest
import torch
from golden_models import config, empty_classifier, official

from internimage import InternImage, InternImageConfig
from internimage.keys import official_to_ours, ours_to_official
from internimage.variants import CONFIGS

FILES = sorted(path.name.removesuffix(".json.gz") for path in (golden.FOLDER / "keys").glob("*.json.gz"))
DENSE = [name for name in FILES if name.startswith(("det_", "seg_"))]
CLASSIFIERS = [name for name in FILES if name not in DENSE]


def dense_config(name):
    """The backbone in the authors' detector or segmentor: T to XL have layer scale there."""
    size = name.split("internimage_")[1].split("_")[0].upper()
    released = CONFIGS[size]
    return released if size in ("H", "G") else InternImageConfig(**{**vars(released), "layer_scale": 1.0})


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_has_the_authors_keys_shapes_and_parameter_count(name):
    expected, backbone_config = official(name), config(name)
    model = empty_classifier(name, expected["num_classes"])
    found = {ours_to_official(key, backbone_config): list(value.shape) for key, value in model.state_dict().items()}
    assert found == expected["state_dict"]
    assert len(found) == len(model.state_dict())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_backbone_has_the_authors_keys_and_shapes(name):
    backbone_config = dense_config(name)
    with torch.device("meta"):
        state = InternImage(backbone_config).state_dict()
    found = {
        ours_to_official(f"backbone.{key}", backbone_config, dense=True): list(value.shape)
        for key, value in state.items()
    }
    assert found == {k: v for k, v in official(name)["state_dict"].items() if k.startswith("backbone.")}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_both_directions_of_a_classifier_are_inverse(name):
    backbone_config = config(name)
    for key in official(name)["state_dict"]:
        assert ours_to_official(official_to_ours(key, backbone_config), backbone_config) == key


@pytest.mark.parametrize("name", DENSE)
def test_both_directions_of_a_dense_backbone_are_inverse(name):
    backbone_config = dense_config(name)
    for key in official(name)["state_dict"]:
        if key.startswith("backbone."):
            ours = official_to_ours(key, backbone_config)
            assert ours_to_official(ours, backbone_config, dense=True) == key


def test_names_are_what_the_docs_say():
    assert (
        official_to_ours("levels.0.downsample.conv.weight", CONFIGS["T"]) == "backbone.stages.1.downsample.conv.weight"
    )
    # H: the second of the post-norms after blocks 5, 11, ...
    post_norm = official_to_ours("levels.2.post_norms.1.0.bias", CONFIGS["H"])
    assert post_norm == "backbone.stages.2.post_norms.11.bias"


def test_a_tensor_that_this_config_does_not_use_still_has_a_name():
    assert CONFIGS["T"].layer_scale is None
    key = official_to_ours("backbone.levels.3.blocks.0.gamma2", CONFIGS["T"])
    assert key == "backbone.stages.3.blocks.0.scale2.weight"


@pytest.mark.parametrize(
    "key", ["neck.lateral_convs.0.conv.weight", "levels.0.blocks.4.gamma1", "levels.2.post_norms.0.0.bias", "head"]
)
def test_an_unknown_official_key_is_an_error_that_names_it(key):
    with pytest.raises(KeyError, match=key):
        official_to_ours(key, CONFIGS["T"])


@pytest.mark.parametrize("key", ["stem.conv1.weight", "backbone.stages.4.norm.weight", "head.conv.bias", "backbone"])
def test_an_unknown_key_of_ours_is_an_error_that_names_it(key):
    with pytest.raises(KeyError, match=key):
        ours_to_official(key, CONFIGS["T"])


def test_a_dense_model_has_no_classification_head():
    assert ours_to_official("head.fc.weight", CONFIGS["T"]) == "head.weight"
    with pytest.raises(KeyError, match="classification head"):
        ours_to_official("head.fc.weight", CONFIGS["T"], dense=True)
