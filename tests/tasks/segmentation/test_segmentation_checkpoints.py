"""Files of segmentors: every key of the published ones, every form of a file, and those that are refused."""

import re
from dataclasses import replace
from functools import cache

import golden
import pytest
import torch
from checkpoint_files import saved
from detector_files import assert_equal, composite, part, rcnn
from detector_files import build as build_detector
from golden_models import official
from segmentor_files import KINDS, assert_refused, build, mask2former, segformer, upernet
from torch import nn

from internimage import Backbone, Classifier, InternImage, internimage_debug
from internimage.checkpoints import CheckpointError, export_official, official_state_dict
from internimage.convert import main
from internimage.variants import CONFIGS
from tasks.detection.checkpoints import export_detector, load_detector
from tasks.segmentation.checkpoints import export_segmentor, load_segmentor, official_segmentor_state_dict
from tasks.segmentation.mask2former import Mask2Former
from tasks.segmentation.segformer import SegFormer
from tasks.segmentation.upernet import UPerNet

KEYS = golden.FOLDER / "keys"
FILES = sorted(path.name.removesuffix(".json.gz") for path in KEYS.glob("seg_*.json.gz"))
# Classes of the Mask2Formers. The others have 150, also where the data set has 19.
FULL_CLASSES = {
    "ade20k": 150,
    "cityscapes": 19,
    "coco_stuff10k": 171,
    "coco_stuff164k": 171,
    "mapillary": 19,
    "nyu_depth_v2": 40,
    "pascal_context": 59,
}
WIDE = {"num_queries": 200, "dim": 1024, "num_heads": 32, "encoder_hidden_dim": 4096, "hidden_dim": 4096}


@cache
def empty_segmentor(kind, size, num_classes, wide):
    """Build a segmentor of the authors' on the meta device; several configs have the same one."""
    with torch.device("meta"):
        backbone = InternImage(replace(CONFIGS[size], layer_scale=None if size in "HG" else 1.0))
        return kind(backbone, num_classes, **(WIDE if wide else {}))


def configured(name):
    """Return the segmentor of one of the authors' configs."""
    data = name.removeprefix("seg_").split("__")[0]
    size = name.split("internimage_")[1].split("_")[0].upper()
    if "mask2former" in name:
        return empty_segmentor(Mask2Former, size, FULL_CLASSES[data], data == "ade20k" or data.startswith("coco_stuff"))
    return empty_segmentor(UPerNet if "upernet" in name else SegFormer, size, 150, False)


def test_every_config_is_there():
    assert len(FILES) == 28


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_of_a_published_segmentor_goes_to_its_place_and_back(tmp_path, monkeypatch, name):
    shapes = official(name)["state_dict"]
    # Full size in a few hundred kB: each tensor is its own number, expanded.
    weights = {
        key: torch.tensor(float(number)).expand(shape) if shape else torch.tensor(number)
        for number, (key, shape) in enumerate(shapes.items())
    }
    copied_values = {}
    # Gigabytes are not copied here; small segmentors are, below.
    monkeypatch.setattr("internimage.loading._copy", lambda model, values, complete: copied_values.update(values))
    model = configured(name)
    report = load_segmentor(model, saved(tmp_path / "segmentor.pth", {"state_dict": weights, "meta": {"iter": 160000}}))
    assert set(report.taken.values()) == shapes.keys()
    assert report.missing == report.unexpected == report.adapted == {}
    assert report.ignored == {"meta": "not weights"}
    state = model.state_dict()
    assert copied_values.keys() == state.keys()
    exported = official_segmentor_state_dict(model)
    assert {key: list(tensor.shape) for key, tensor in exported.items()} == shapes
    assert list(exported) == [report.taken[key] for key in state]
    numbers = {key: number for number, key in enumerate(shapes)}
    for key, value in copied_values.items():
        assert value.flatten()[0] == numbers[report.taken[key]]
        assert value.shape == state[key].shape


@pytest.mark.parametrize(("kind", "suffix"), [*((kind, ".pth") for kind in KINDS), ("UPerNet", ".safetensors")])
def test_export_and_load_is_exact(tmp_path, kind, suffix):
    model, other = build(kind), build(kind, seed=1)
    path = export_segmentor(model, tmp_path / f"segmentor{suffix}")
    report = load_segmentor(other, path)
    assert_equal(other.state_dict(), model.state_dict())
    assert report.naming == "authors"
    assert f"{kind} (" in report.model
    assert "3 classes" in report.model
    again = export_segmentor(other, tmp_path / "again.pth")
    assert_equal(torch.load(again, weights_only=True)["state_dict"], official_segmentor_state_dict(model))


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_training_scripts_leave_around_the_weights(tmp_path, kind):
    model, other = build(kind), build(kind, seed=1)
    state = official_segmentor_state_dict(model)
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    wrapped = {f"module.{key}": tensor for key, tensor in half.items()}
    content = {"meta": {"CLASSES": ("a", "b", "c"), "PALETTE": [[0, 0, 0]]}, "state_dict": wrapped, "optimizer": {}}
    report = load_segmentor(other, saved(tmp_path / "segmentor.pth", content))
    expected = {key: t.half().float() if t.is_floating_point() else t for key, t in model.state_dict().items()}
    assert_equal(other.state_dict(), expected)
    assert report.dtypes == ("torch.float16",)
    assert report.ignored == {"meta": "not weights", "optimizer": "not weights"}
    assert set(report.taken.values()) == wrapped.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_loads_checkpoints_of_this_project(tmp_path, kind):
    model, other = build(kind), build(kind, seed=1)
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    content = {"state_dict": state | {"metric.counts": torch.ones(2)}, "epoch": 3}
    report = load_segmentor(other, saved(tmp_path / "last.ckpt", content))
    assert_equal(other.state_dict(), model.state_dict())
    assert report.naming == "ours"
    assert report.ignored == {"epoch": "not weights", "metric.*": "another part, 1 tensors"}
    load_segmentor(other, saved(tmp_path / "plain.pth", build(kind, seed=2).state_dict()))
    assert_equal(other.state_dict(), build(kind, seed=2).state_dict())


@pytest.mark.parametrize(("plain_is_average", "kind"), [(True, "UPerNet"), (False, "UPerNet"), (True, "Mask2Former")])
def test_tells_the_average_of_openmmlabs_hook_from_the_weights_as_trained(tmp_path, plain_is_average, kind):
    average, trained = build(kind), build(kind, seed=1)
    # The hook averages floating-point tensors only.
    for key, tensor in trained.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensor.fill_(90)
    plain, copies = (average, trained) if plain_is_average else (trained, average)
    state = dict(official_segmentor_state_dict(plain))
    state |= {f"ema_{key.replace('.', '_')}": t for key, t in official_segmentor_state_dict(copies).items()}
    path = saved(tmp_path / "segmentor.pth", {"state_dict": state})
    model = build(kind, seed=2)
    for ema, expected in ((None, plain), (True, average), (False, trained)):
        report = load_segmentor(model, path, ema=ema)
        assert_equal(model.state_dict(), expected.state_dict())
        assert all(name.startswith("ema_") for name in report.taken.values()) == (expected is copies)
        assert len(report.ignored) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_classes_has_to_be_asked_for(tmp_path, kind):
    source, model = build(kind), build(kind, 5, seed=1)
    path = export_segmentor(source, tmp_path / "segmentor.pth")
    assert_refused(model, path, r"has 3 classes, the model 5; nothing was loaded\. Say head='new'.*num_classes=3")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    held = source.state_dict()
    report = load_segmentor(model, path, head="new")
    classes = {key for key in before if before[key].shape != held[key].shape}
    # Weight and bias: of both heads where there are two.
    assert len(classes) == (4 if kind == "UPerNet" else 2)
    assert report.missing == dict.fromkeys(classes, "head='new'")
    assert len(report.ignored) == len(classes)
    assert set(report.ignored.values()) == {"head='new'"}
    assert_equal(model.state_dict(), {key: before[key] if key in classes else held[key] for key in before})


def test_new_class_layers_stay_also_where_the_numbers_agree(tmp_path):
    model = build("Mask2Former", seed=1)
    before = model.decoder.class_predictor.weight.clone()
    source = build("Mask2Former")
    load_segmentor(model, export_segmentor(source, tmp_path / "segmentor.pth"), head="new")
    assert torch.equal(model.decoder.class_predictor.weight, before)
    assert torch.equal(model.decoder.queries_features.weight, source.decoder.queries_features.weight)


def test_the_classes_of_a_file_are_counted_in_its_tensors(tmp_path):
    # As in the authors' Cityscapes models: the list of names beside the weights is shorter than the outputs.
    content = {"meta": {"CLASSES": tuple("abc")}, "state_dict": official_segmentor_state_dict(build("SegFormer", 8))}
    path = saved(tmp_path / "segmentor.pth", content)
    assert_refused(build("SegFormer"), path, r"has 8 classes, the model 3; nothing was loaded.*num_classes=8")
    load_segmentor(build("SegFormer", 8), path)


def backbone_files(tmp_path, backbone):
    """Files of one backbone without a segmentor, and what a report names of their other parts."""
    classifier, detector = Classifier(backbone, 7), rcnn(4, backbone=backbone)
    lightning = {f"model.{key}": tensor for key, tensor in classifier.state_dict().items()}
    run = {f"model.{key}": tensor for key, tensor in detector.state_dict().items()}
    other = official_state_dict(backbone, dense=True) | {"decode_head.conv_seg.weight": torch.zeros(2)}
    return [
        (export_official(classifier, tmp_path / "1.pth"), {"conv_head.*", "head.*"}),
        (saved(tmp_path / "2.ckpt", {"state_dict": lightning}), {"head.*"}),
        (export_official(classifier, tmp_path / "3.pth", dense=True), set()),
        (export_detector(detector, tmp_path / "4.pth"), {"neck.*", "rpn_head.*", "roi_head.*"}),
        (saved(tmp_path / "5.ckpt", {"state_dict": run}), {"neck.*", "rpn.*", "roi.*"}),
        (saved(tmp_path / "6.pth", {"state_dict": other}), {"decode_head.*"}),
    ]


@pytest.mark.parametrize(("kind", "head"), [("UPerNet", "load"), ("SegFormer", "new")])
def test_a_file_without_a_segmentor_gives_the_backbone(tmp_path, kind, head):
    for path, parts in backbone_files(tmp_path, build(kind).backbone):
        model = build(kind, seed=1)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        report = load_segmentor(model, path, head=head)
        assert_equal(model.backbone.state_dict(), build(kind).backbone.state_dict())
        rest = {key: tensor for key, tensor in before.items() if not key.startswith("backbone.")}
        assert_equal(part(model, rest), rest)
        assert report.missing == dict.fromkeys(rest, "the file has no segmentor")
        assert report.ignored.keys() == parts


def test_a_composite_gives_its_first_backbone(tmp_path):
    source, model = composite(3), build("Mask2Former")
    report = load_segmentor(model, export_detector(source, tmp_path / "detector.pth"))
    assert_equal(model.backbone.state_dict(), source.backbone.assist.state_dict())
    assert set(report.missing.values()) == {"the file has no segmentor"}


def test_a_segmentor_gives_a_detector_its_backbone(tmp_path):
    source, model = build("UPerNet"), build_detector("Mask R-CNN")
    report = load_detector(model, export_segmentor(source, tmp_path / "segmentor.pth"))
    assert_equal(model.backbone.state_dict(), source.backbone.state_dict())
    assert report.ignored.keys() == {"decode_head.*", "auxiliary_head.*"}


def test_a_backbone_without_layer_scale_is_one_of_scale_one(tmp_path):
    plain = internimage_debug()
    path = export_official(plain, tmp_path / "weights.pth", dense=True)
    model = upernet(3)
    report = load_segmentor(model, path)
    scales = {key for key in model.state_dict() if ".scale" in key}
    assert {report.missing[key] for key in scales} == {"the file has no layer scale, and 1 is none"}
    other = segformer(3, backbone=internimage_debug(layer_scale=0.1))
    assert_refused(other, path, "Only one of them has layer scale")


def test_drops_the_central_points_of_a_model_that_has_none(tmp_path):
    config = internimage_debug().config
    full, reduced = (upernet(3, backbone=InternImage(replace(config, remove_center=drop))) for drop in (False, True))
    report = load_segmentor(reduced, export_segmentor(full, tmp_path / "segmentor.pth"))
    assert set(report.adapted.values()) == {"central point dropped"}
    bias = full.backbone.stages[0].blocks[0].dcn.mask.bias
    assert torch.equal(reduced.backbone.stages[0].blocks[0].dcn.mask.bias, torch.cat([bias[:4], bias[5:]]))


def test_refuses_another_segmentor_and_names_both(tmp_path):
    models = {kind: build(kind) for kind in KINDS if "without" not in kind}
    paths = {kind: export_segmentor(model, tmp_path / f"{kind}.pth") for kind, model in models.items()}
    for held, path in paths.items():
        for built, model in models.items():
            if held != built:
                match = rf"holds {held} \(.*the model is {built} \(.*nothing was loaded\. Build that segmentor.*--dense"
                assert_refused(model, path, match)
                assert_refused(model, path, match, head="new")


def test_the_backbone_of_a_file_that_is_refused_can_be_taken_alone(tmp_path):
    source, model = upernet(3, backbone=internimage_debug()), build("Mask2Former")
    path = export_segmentor(source, tmp_path / "segmentor.pth")
    assert_refused(model, path, "export --dense segmentor.pth backbone.pth")
    assert main(["export", "--dense", str(path), str(tmp_path / "backbone.pth")]) == 0
    load_segmentor(model, tmp_path / "backbone.pth")
    assert_equal(model.backbone.state_dict(), source.backbone.state_dict())


def test_refuses_other_queries_layers_sizes_or_variants(tmp_path):
    model = build("Mask2Former")
    path = export_segmentor(mask2former(3, num_queries=12), tmp_path / "segmentor.pth")
    queries = r"holds Mask2Former \(12 queries of 32 channels, 3 classes\), the model is Mask2Former \(10 queries of 32"
    assert_refused(model, path, queries)
    export_segmentor(mask2former(3, decoder_layers=2), path)
    assert_refused(model, path, r"(?s)does not fit Mask2Former.*Missing in the file: decoder\.decoder\.layers\.2")
    export_segmentor(upernet(3, channels=24), path)
    assert_refused(build("UPerNet"), path, r"is \(16, .*\) float32 in the model and \(24, .*\) float32 in the file")
    with torch.device("meta"):
        large = UPerNet(InternImage(CONFIGS["S"]), 3)
    with pytest.raises(CheckpointError, match=r"channels 16, depths 1-1-2-1\), the model is InternImage-S"):
        load_segmentor(large, path)


def test_the_auxiliary_head_may_be_left_out_or_kept_when_it_is_named(tmp_path):
    whole, without = build("UPerNet"), build("UPerNet without auxiliary head", seed=1)
    one, other = (export_segmentor(model, tmp_path / f"{id(model)}.pth") for model in (whole, without))
    says = r"(?s)does not fit UPerNet{} \(3 classes\).*Only one of them has an auxiliary head"
    assert_refused(without, one, says.format(" without auxiliary head"))
    assert_refused(whole, other, says.format(""))
    report = load_segmentor(whole, other, allow_missing=["auxiliary.*"])
    assert len(report.missing) == 8
    report = load_segmentor(without, one, allow_unexpected=["auxiliary_head.*"])
    assert len(report.unexpected) == 8
    assert_equal(without.state_dict(), part(build("UPerNet"), without.state_dict()))


@pytest.mark.parametrize("kind", ["UPerNet", "SegFormer", "Mask2Former"])
def test_damaged_files_are_refused_and_say_where(tmp_path, kind):
    model, state = build(kind, seed=1), dict(official_segmentor_state_dict(build(kind)))
    path = tmp_path / "segmentor.pth"
    names = dict(zip(state, model.state_dict(), strict=True))
    for lost in (list(state)[number] for number in (1, len(state) // 2, -1)):
        short = {key: tensor for key, tensor in state.items() if key != lost}
        match = rf"(?s)does not fit .*Missing in the file: {re.escape(names[lost])}\."
        assert_refused(model, saved(path, {"state_dict": short}), match)
    more = saved(path, {"state_dict": state | {"decode_head.extra.weight": torch.ones(1)}})
    assert_refused(model, more, r"(?s)Without a place in the model: decode_head\.extra\.weight\..*allow_unexpected")
    assert load_segmentor(model, more, allow_unexpected=["decode_head.extra*"]).unexpected
    classifier = "decode_head.cls_embed.weight" if kind == "Mask2Former" else "decode_head.conv_seg.weight"
    unclassified = {key: tensor for key, tensor in state.items() if key != classifier}
    assert_refused(model, saved(path, {"state_dict": unclassified}), "(?s)Missing.*Say head='new' to keep")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("UPerNet", "UPerNet (1 class)"),
        ("UPerNet without auxiliary head", "UPerNet without auxiliary head (1 class)"),
        ("SegFormer", "SegFormer (1 class)"),
        ("Mask2Former", "Mask2Former (10 queries of 32 channels, 1 class)"),
    ],
)
def test_inspect_says_which_segmentor_a_file_holds(tmp_path, capsys, kind, expected, own):
    model = build(kind, 1)
    path = export_segmentor(model, tmp_path / "segmentor.pth")
    if own:
        saved(path, {"state_dict": {f"model.{key}": tensor for key, tensor in model.state_dict().items()}})
    assert main(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert f"segmentor:   {expected}\n" in output
    assert "detector:    none\n" in output


def test_refuses_models_and_options_that_it_does_not_know(tmp_path):
    class Other(Backbone):
        widths = (16, 16, 16, 16)
        strides = (4, 8, 16, 32)

    path = export_segmentor(build("UPerNet"), tmp_path / "segmentor.pth")
    for model in (nn.Linear(2, 2), internimage_debug(), upernet(3, backbone=Other())):
        with pytest.raises(CheckpointError, match="expected a UPerNet, SegFormer or Mask2Former on an InternImage"):
            load_segmentor(model, path)
    assert_refused(build("UPerNet"), path, "head is 'map', expected 'load' or 'new'", head="map")
    model = build("UPerNet")
    model.head.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"the authors' segmentors have no head\.temperature"):
        export_segmentor(model, tmp_path / "other.pth")
    own = saved(tmp_path / "own.pth", model.state_dict())
    other = build("UPerNet", seed=1)
    assert_refused(other, own, r"Without a place in the model: head\.temperature")
    other.head.register_parameter("temperature", nn.Parameter(torch.zeros(1)))
    load_segmentor(other, own)
    assert_equal(other.state_dict(), model.state_dict())


def test_a_segmentor_on_the_meta_device_gets_memory_and_start_values(tmp_path):
    source = build("UPerNet")
    path = export_segmentor(source, tmp_path / "segmentor.pth")
    with torch.device("meta"):
        whole, new = upernet(3), upernet(5)
    load_segmentor(whole, path)
    assert_equal(whole.state_dict(), source.state_dict())
    load_segmentor(new, path, head="new")
    assert torch.equal(new.head.fuse_outputs.conv.weight, source.head.fuse_outputs.conv.weight)
    # As its own start values are: 80 values of standard deviation 0.01.
    assert 0.005 < new.head.classifier.weight.std() < 0.02
