import json

import pytest
import torch
from checkpoint_files import (
    CLASSES,
    assert_holds,
    assert_refused,
    authors,
    build,
    build_meta,
    hollow,
    in_detector,
    saved,
    shapes,
)
from safetensors.torch import save_file
from torch import nn

from internimage import Backbone, Classifier, internimage_t
from internimage.checkpoints import CheckpointError, load_checkpoint, official_state_dict


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def in_port(weights):
    """Keys as in the Hugging Face port of a classifier."""
    rename = {"gamma1": "layer_scale1", "gamma2": "layer_scale2"}
    return {f"model.{'.'.join(rename.get(part, part) for part in key.split('.'))}": t for key, t in weights.items()}


def write_port_shards(folder, weights):
    folder.mkdir()
    weight_map = {key: f"model-{number % 3}.safetensors" for number, key in enumerate(weights)}
    for shard in set(weight_map.values()):
        save_file({key: weights[key] for key in weights if weight_map[key] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# How a file is written -> what its report says of container, naming and prefix.
FORMATS = {
    "the authors' release": (lambda p, w: saved(p, {"model": w}), ("model", "authors", "")),
    "deepspeed": (lambda p, w: saved(p, {"module": w, "epoch": 1}), ("module", "authors", "")),
    "plain": (lambda p, w: saved(p, w), ("", "authors", "")),
    "DistributedDataParallel": (
        lambda p, w: saved(p, {"model": {f"module.{key}": t for key, t in w.items()}}),
        ("model", "authors", ""),
    ),
    "a port": (
        lambda p, w: save_file(in_port(w), p.with_suffix(".safetensors")) or p.with_suffix(".safetensors"),
        ("", "transformers", "model."),
    ),
    "a sharded port": (lambda p, w: write_port_shards(p, in_port(w)), ("", "transformers", "model.")),
}


@pytest.mark.parametrize("form", FORMATS)
def test_loads_every_classifier_format(tmp_path, form):
    write, expected = FORMATS[form]
    weights = authors("Lmini_os2")
    model = build("Lmini_os2")
    report = load_checkpoint(model, write(tmp_path / "weights.pth", weights))
    assert_holds(model, weights)
    assert (report.container, report.naming, report.prefix) == expected
    assert report.taken.keys() == model.state_dict().keys()
    assert report.missing == report.unexpected == report.adapted == {}


def test_puts_tensors_where_they_belong(tmp_path):
    weights = authors("Lmini_os2")
    model = build("Lmini_os2")
    report = load_checkpoint(model, saved(tmp_path / "weights.pth", {"model": weights}))
    state = model.state_dict()
    for ours, theirs in {
        "backbone.stem.norm1.weight": "patch_embed.norm1.1.weight",
        "backbone.stages.1.downsample.conv.weight": "levels.0.downsample.conv.weight",
        "backbone.stages.2.blocks.1.dcn.dw_norm.bias": "levels.2.blocks.1.dcn.dw_conv.1.1.bias",
        "backbone.stages.2.blocks.1.scale2.weight": "levels.2.blocks.1.gamma2",
        "head.norm.running_mean": "conv_head.1.0.running_mean",
        "head.fc.weight": "head.weight",
    }.items():
        assert torch.equal(state[ours], weights[theirs])
        assert report.taken[ours] == report.renamed[ours] == theirs
    summary = str(report)
    assert (
        "weights.pth, entry `model`, in the authors' keys, into an InternImage (channels 48, depths 1-1-3-1)" in summary
    )
    assert f"taken: {len(weights)} tensors" in summary


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_converts_to_the_type_of_the_model(tmp_path, dtype):
    weights = {key: t.to(dtype) if t.is_floating_point() else t for key, t in authors("Tmini_bnrelu").items()}
    model = build("Tmini_bnrelu")
    report = load_checkpoint(model, saved(tmp_path / "weights.pth", {"model": weights}))
    assert_holds(model, weights)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert report.dtypes == (str(dtype),)
    assert f"converted from {dtype}" in str(report)


def test_takes_the_average_when_asked(tmp_path):
    raw, averaged = authors("Tmini_rc"), authors("Tmini_rc", seed=1)
    path = saved(tmp_path / "weights.pth", {"model": raw, "model_ema": averaged})
    model = build("Tmini_rc")
    report = load_checkpoint(model, path)
    assert_holds(model, raw)
    assert report.ignored == {"model_ema": "another set of weights"}
    load_checkpoint(model, path, ema=True)
    assert_holds(model, averaged)


@pytest.mark.parametrize(("name", "compiled"), [("Hmini", ""), ("Tmini_rc", "_orig_mod.")])
def test_loads_checkpoints_of_this_project(tmp_path, name, compiled):
    source, target = build(name), build(name)
    state = {f"model.{key.replace('backbone.', f'backbone.{compiled}')}": t for key, t in source.state_dict().items()}
    path = saved(tmp_path / "last.ckpt", {"state_dict": state, "epoch": 1, "global_step": 5})
    report = load_checkpoint(target, path)
    assert_holds(target, official_state_dict(source))
    assert (report.naming, report.prefix) == ("ours", "model.backbone.")
    bare = target.backbone
    report = load_checkpoint(bare, saved(tmp_path / "backbone.pth", source.backbone.state_dict()))
    assert not report.renamed
    assert report.prefix == ""


def test_takes_the_backbone_of_a_detector(tmp_path):
    weights = authors("Lmini_os2")
    path = saved(tmp_path / "detector.pth", in_detector(weights))
    model = build("Lmini_os2")
    before = {key: tensor.clone() for key, tensor in model.head.state_dict().items()}
    report = load_checkpoint(model.backbone, path)
    assert_holds(model, {k: t for k, t in in_detector(weights)["state_dict"].items() if "backbone" in k}, dense=True)
    assert report.prefix == "backbone."
    assert report.ignored == {
        "meta": "not weights",
        "optimizer": "not weights",
        "neck.*": "another part, 2 tensors",
        "roi_head.*": "another part, 1 tensors",
    }
    with pytest.raises(CheckpointError, match=r"(?s)Missing in the file: head\.conv\.weight.*and 5 more.*head='new'"):
        load_checkpoint(model, path)
    report = load_checkpoint(model, path, head="new")
    assert set(report.missing) == {f"head.{key}" for key in before}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.head.state_dict().items())


def test_takes_the_first_backbone_of_a_composite_detector(tmp_path):
    weights = {key: t for key, t in in_detector(authors("Lmini_os2"))["state_dict"].items() if "backbone" in key}
    first = {key.replace("backbone", "backbone.cb_modules.0"): tensor for key, tensor in weights.items()}
    # The second one starts from the stem of the first.
    second = {k.replace("backbone", "backbone.cb_modules.1"): t + 1 for k, t in weights.items() if ".levels." in k}
    model = build("Lmini_os2").backbone
    report = load_checkpoint(model, saved(tmp_path / "detector.pth", {"state_dict": first | second}))
    assert_holds(model, weights, dense=True)
    assert report.prefix == "backbone.cb_modules.0."
    assert report.ignored == {"backbone.*": f"another part, {len(second)} tensors"}


def test_leaves_the_second_copy_of_openmmlabs_averaging_hook(tmp_path):
    content = in_detector(authors("Lmini_os2"))
    state = content["state_dict"]
    state |= {f"ema_{key.replace('.', '_')}": tensor + 1 for key, tensor in state.items()}
    model = build("Lmini_os2").backbone
    report = load_checkpoint(model, saved(tmp_path / "detector.pth", content))
    assert_holds(model, {key: t for key, t in state.items() if key.startswith("backbone.")}, dense=True)
    assert report.ignored["ema_*"] == f"another part, {len(state) // 2} tensors"


def test_a_bare_backbone_leaves_the_head(tmp_path):
    weights = authors("Tmini_rc")
    model = build("Tmini_rc").backbone
    report = load_checkpoint(model, saved(tmp_path / "weights.pth", {"model": weights}))
    assert report.ignored == {
        "conv_head.0.weight, conv_head.1.0.weight, conv_head.1.0.bias and 5 more": "the model has no head"
    }


def test_refuses_a_file_that_lacks_parameters_unless_they_are_named(tmp_path):
    weights = authors("Tmini_rc")
    lost = [key for key in weights if key.startswith("levels.3.blocks.0.mlp.fc2.")]
    path = saved(tmp_path / "weights.pth", {"model": {k: t for k, t in weights.items() if k not in lost}})
    model = build("Tmini_rc")
    assert_refused(model, path, r"Missing in the file: backbone\.stages\.3\.blocks\.0\.mlp\.fc2\.weight, .*bias\.")
    report = load_checkpoint(model, path, allow_missing=["*.mlp.fc2.*"])
    assert report.missing == {
        f"backbone.stages.3.blocks.0.mlp.fc2.{name}": "allowed by '*.mlp.fc2.*'" for name in ("weight", "bias")
    }


def test_refuses_a_file_with_more_parameters_unless_they_are_named(tmp_path):
    # As in the released iNaturalist model, which scores place and date as well.
    weights = authors("Tmini_rc") | {"meta_head.weight": torch.ones(CLASSES, 4), "meta_norm.weight": torch.ones(4)}
    path = saved(tmp_path / "weights.pth", {"model": weights})
    model = build("Tmini_rc")
    assert_refused(model, path, r"Without a place in the model: meta_head\.weight, meta_norm\.weight")
    report = load_checkpoint(model, path, allow_unexpected=["meta_*"])
    assert report.unexpected == dict.fromkeys(("meta_head.weight", "meta_norm.weight"), "allowed by 'meta_*'")
    assert "unexpected: meta_head.weight, meta_norm.weight (allowed by 'meta_*')" in str(report)


def test_a_shape_that_differs_names_both(tmp_path):
    weights = authors("Tmini_rc")
    weights["levels.1.blocks.0.mlp.fc1.weight"] = torch.zeros(7, 64)
    path = saved(tmp_path / "weights.pth", {"model": weights})
    match = (
        r"backbone\.stages\.1\.blocks\.0\.mlp\.fc1\.weight is \(256, 64\) float32 in the model and \(7, 64\) float32 "
        r"in the file \(levels\.1\.blocks\.0\.mlp\.fc1\.weight\)"
    )
    assert_refused(build("Tmini_rc"), path, match)


def test_guesses_the_variant_of_a_file_that_does_not_fit(tmp_path):
    with torch.device("meta"):
        model = Classifier(internimage_t(), 1000)
    match = (
        r"holds InternImage-{0} \(.*\), the model is InternImage-T \(channels 64, depths 4-4-18-4\)\. "
        r"Build internimage_{1}\(\)"
    )
    for name in ("S", "B", "L", "XL", "H", "G"):
        path = saved(tmp_path / "weights.pth", {"model": hollow(name)})
        with pytest.raises(CheckpointError, match=match.format(name, name.lower())):
            load_checkpoint(model, path)
    with pytest.raises(CheckpointError, match=r"holds an InternImage \(channels 32, depths 1-1-2-1\).*Choose another"):
        load_checkpoint(model, saved(tmp_path / "weights.pth", {"model": authors("Tmini_rc")}))


def test_refuses_models_that_it_cannot_load_into(tmp_path):
    class Other(Backbone):
        widths = (8,)

    path = saved(tmp_path / "weights.pth", {"model": authors("Tmini_rc")})
    for model in (nn.Linear(2, 2), Other(), Classifier(Other(), 2)):
        with pytest.raises(CheckpointError, match=r"expected an InternImage or a Classifier around one"):
            load_checkpoint(model, path)
    with pytest.raises(CheckpointError, match="head='new' needs a Classifier"):
        load_checkpoint(build("Tmini_rc").backbone, path, head="new")


def test_refuses_files_without_or_with_several_internimages(tmp_path):
    model = build("Tmini_rc")
    with pytest.raises(
        CheckpointError, match=r"has no InternImage: none of its 2 keys ends in patch_embed\.conv1\.weight"
    ):
        load_checkpoint(model, saved(tmp_path / "weights.pth", nn.Linear(2, 2).state_dict()))
    weights = authors("Tmini_rc")
    both = {f"{part}.{key}": tensor for part in ("student", "teacher") for key, tensor in weights.items()}
    with pytest.raises(CheckpointError, match=r"several InternImages, under 'student\.', 'teacher\.'"):
        load_checkpoint(model, saved(tmp_path / "weights.pth", both))


def test_a_model_on_the_meta_device_gets_memory_weights_and_start_values(tmp_path):
    weights = authors("Tmini_rc", 21)
    path = saved(tmp_path / "weights.pth", {"model": weights})
    model = build_meta("Tmini_rc", 5, layer_scale=1.0)
    load_checkpoint(model, path, head="map", label_map=[0, 1, 2, 3, 4])
    heads = {key: weights[key][:5] for key in ("head.weight", "head.bias")}
    scales = {key: torch.ones_like(t) for key, t in official_state_dict(model).items() if "gamma" in key}
    assert_holds(model, weights | heads | scales)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_takes_the_backbone_of_a_full_size_detector(tmp_path):
    name = "det_coco__mask_rcnn_internimage_t_fpn_1x_coco"
    with torch.device("meta"):
        model = internimage_t(layer_scale=1.0)
    report = load_checkpoint(model, saved(tmp_path / "detector.pth", {"state_dict": hollow(name)}))
    assert report.model == "InternImage-T (channels 64, depths 4-4-18-4)"
    assert set(report.taken.values()) == {key for key in shapes(name) if key.startswith("backbone.")}
    assert report.ignored.keys() == {"neck.*", "rpn_head.*", "roi_head.*"}
    assert all((parameter == 0).all() for parameter in model.parameters())
