import re
from dataclasses import replace

import golden
import pytest
import torch
from checkpoint_files import assert_holds, build, build_meta, shapes
from torch import nn

from internimage import Classifier, InternImage
from internimage.checkpoints import CheckpointError, export_official, load_checkpoint, official_state_dict
from internimage.variants import CONFIGS

FILES = sorted(path.name.removesuffix(".json.gz") for path in (golden.FOLDER / "keys").glob("*.json.gz"))
CLASSIFIERS = [name for name in FILES if "__" not in name]
MINIS = [name for name in CLASSIFIERS if "mini" in name]
DENSE = [name for name in FILES if "__" in name]


@pytest.mark.parametrize(("name", "suffix"), [*((name, ".pth") for name in MINIS), ("Lmini_os2", ".safetensors")])
def test_export_and_load_is_exact(tmp_path, name, suffix):
    model, other = build(name), build(name)
    path = export_official(model, tmp_path / f"weights{suffix}")
    load_checkpoint(other, path)
    assert_holds(other, official_state_dict(model))
    if suffix == ".pth":
        assert torch.load(path, weights_only=True).keys() == {"model"}


def test_dense_export_is_a_detectors_backbone(tmp_path):
    model, other = build("Lmini_os2"), build("Lmini_os2")
    path = export_official(model, tmp_path / "weights.pth", dense=True)
    state = torch.load(path, weights_only=True)["state_dict"]
    heads = ("head.", "conv_head.")
    assert state.keys() == {f"backbone.{k}" for k in shapes("Lmini_os2") if not k.startswith(heads)}
    load_checkpoint(other.backbone, path)
    assert_holds(other, state, dense=True)
    assert official_state_dict(model.backbone).keys() == {key.removeprefix("backbone.") for key in state}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_exports_exactly_the_authors_keys_and_shapes(name):
    found = official_state_dict(build_meta(name, 1000))
    assert {key: list(tensor.shape) for key, tensor in found.items()} == shapes(name)


def test_export_refuses_a_head_that_the_authors_do_not_have(tmp_path):
    model = Classifier(build("Tmini_rc").backbone, 2, lambda widths, num_classes: nn.Linear(widths[-1], num_classes))
    with pytest.raises(CheckpointError, match=r"head\.weight has no counterpart.*dense=True"):
        export_official(model, tmp_path / "weights.pth")
    assert export_official(model, tmp_path / "weights.pth", dense=True).exists()


@pytest.mark.parametrize("name", DENSE)
def test_dense_export_has_the_keys_of_the_authors_detectors_and_segmentors(name):
    variant = re.search(r"internimage_(\w+?)_", name)[1].upper()
    config = CONFIGS[variant]
    dense = config if config.res_post_norm or variant == "G" else replace(config, layer_scale=1.0)
    with torch.device("meta"):
        found = official_state_dict(InternImage(dense), dense=True)
    expected = {k: shape for k, shape in shapes(name).items() if k.startswith("backbone.")}
    assert {key: list(tensor.shape) for key, tensor in found.items()} == expected
