"""Files of detectors: every key of the published ones, every form of a file, and those that are refused."""

import re

import pytest
import torch
from checkpoint_files import saved
from detector_files import KINDS, assert_equal, assert_refused, build, dino, rcnn
from golden_detectors import NAMES, empty_detector
from golden_models import official
from torch import nn

from internimage import Backbone, InternImage, internimage_debug
from internimage.checkpoints import CheckpointError
from internimage.convert import main
from internimage.variants import CONFIGS
from tasks.detection.checkpoints import export_detector, load_detector, official_detector_state_dict
from tasks.detection.mask_rcnn import MaskRCNN


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_published_detector_goes_to_its_place_and_back(tmp_path, monkeypatch, name):
    shapes = official(name)["state_dict"]
    # Full size in a few hundred kB: each tensor is its own number, expanded.
    weights = {
        key: torch.tensor(float(number)).expand(shape) if shape else torch.tensor(number)
        for number, (key, shape) in enumerate(shapes.items())
    }
    copied_values = {}
    # Gigabytes are not copied here; small detectors are, below.
    monkeypatch.setattr("internimage.loading._copy", lambda model, values, complete: copied_values.update(values))
    model = empty_detector(name)
    report = load_detector(model, saved(tmp_path / "detector.pth", {"state_dict": weights, "meta": {"epoch": 12}}))
    assert set(report.taken.values()) == shapes.keys()
    assert report.missing == report.unexpected == report.adapted == {}
    assert report.ignored == {"meta": "not weights"}
    state = model.state_dict()
    assert copied_values.keys() == state.keys()
    exported = official_detector_state_dict(model)
    assert {key: list(tensor.shape) for key, tensor in exported.items()} == shapes
    assert list(exported) == [report.taken[key] for key in state]
    numbers = {key: number for number, key in enumerate(shapes)}
    for key, value in copied_values.items():
        assert value.flatten()[0] == numbers[report.taken[key]]
        assert value.shape == state[key].shape


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_and_load_is_exact(tmp_path, kind, suffix):
    model, other = build(kind), build(kind, seed=1)
    path = export_detector(model, tmp_path / f"detector{suffix}")
    report = load_detector(other, path)
    assert_equal(other.state_dict(), model.state_dict())
    assert report.naming == "authors"
    assert kind.removesuffix(" in parts") in report.model
    assert "3 classes" in report.model
    again = export_detector(other, tmp_path / "again.pth")
    assert_equal(torch.load(again, weights_only=True)["state_dict"], official_detector_state_dict(model))


@pytest.mark.parametrize("kind", ["Cascade Mask R-CNN", "DINO", "CB-DINO"])
def test_reads_what_training_scripts_leave_around_the_weights(tmp_path, kind):
    model, other = build(kind), build(kind, seed=1)
    state = official_detector_state_dict(model)
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    wrapped = {f"module.{key}": tensor for key, tensor in half.items()}
    content = {"meta": {"CLASSES": ("a", "b", "c")}, "state_dict": wrapped, "optimizer": {"state": {}}}
    report = load_detector(other, saved(tmp_path / "detector.pth", content))
    expected = {key: t.half().float() if t.is_floating_point() else t for key, t in model.state_dict().items()}
    assert_equal(other.state_dict(), expected)
    assert report.dtypes == ("torch.float16",)
    assert report.ignored == {"meta": "not weights", "optimizer": "not weights"}
    assert set(report.taken.values()) == wrapped.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_loads_checkpoints_of_this_project(tmp_path, kind):
    model, other = build(kind), build(kind, seed=1)
    state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    content = {"state_dict": state | {"metric.total": torch.ones(2)}, "epoch": 3}
    report = load_detector(other, saved(tmp_path / "last.ckpt", content))
    assert_equal(other.state_dict(), model.state_dict())
    assert report.naming == "ours"
    assert report.ignored == {"epoch": "not weights", "metric.*": "another part, 1 tensors"}
    load_detector(other, saved(tmp_path / "plain.pth", build(kind, seed=2).state_dict()))
    assert_equal(other.state_dict(), build(kind, seed=2).state_dict())


def with_copies(plain, copies):
    return {"state_dict": plain | {f"ema_{key.replace('.', '_')}": tensor for key, tensor in copies.items()}}


@pytest.mark.parametrize(
    ("plain_is_average", "kind"), [(True, "Cascade Mask R-CNN"), (False, "Cascade Mask R-CNN"), (True, "DINO")]
)
def test_tells_the_average_of_openmmlabs_hook_from_the_weights_as_trained(tmp_path, plain_is_average, kind):
    average, trained = build(kind), build(kind, seed=1)
    # The hook averages floating-point tensors only.
    for key, tensor in trained.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensor.fill_(90)
    plain, copies = (average, trained) if plain_is_average else (trained, average)
    path = saved(
        tmp_path / "detector.pth",
        with_copies(official_detector_state_dict(plain), official_detector_state_dict(copies)),
    )
    model = build(kind, seed=2)
    for ema, expected in ((None, plain), (True, average), (False, trained)):
        report = load_detector(model, path, ema=ema)
        assert_equal(model.state_dict(), expected.state_dict())
        from_copy = all(name.startswith("ema_") for name in report.taken.values())
        assert from_copy == (expected is copies)
        # The other set is named whichever is taken.
        assert len(report.ignored) == 1
        assert f"{len(model.state_dict())} tensors" in next(iter(report.ignored.values()))


def test_a_copy_that_belongs_to_two_keys_or_to_none_is_refused(tmp_path):
    model = build("Mask R-CNN")
    state = dict(official_detector_state_dict(model))
    twin = state | {"neck.lateral.convs.0.conv.bias": torch.zeros(16)}
    path = saved(tmp_path / "detector.pth", with_copies(twin, state))
    both = r"ema_neck_lateral_convs_0_conv_bias may be the copy of neck\.lateral_convs.* and neck\.lateral\.convs"
    assert_refused(model, path, both, ema=False)
    stray = with_copies(state, state | {"gone.weight": torch.zeros(1)})
    assert_refused(model, saved(path, stray), r"ema_gone_weight \(and 0 more\) is a copy of no key", ema=False)
    assert_refused(model, saved(path, {"state_dict": state}), "ema=True, but state_dict has none of", ema=True)


def other_structures():
    """Pairs of file and model that must not fit."""
    for held in KINDS:
        for built in KINDS:
            form_only = "DINO" in held and "DINO" in built and (held != "CB-DINO" or built == "CB-DINO")
            if held != built and not form_only:
                yield held, built


def test_refuses_another_detector_and_names_both(tmp_path):
    models = {kind: build(kind) for kind in KINDS}
    paths = {kind: export_detector(model, tmp_path / f"{kind}.pth") for kind, model in models.items()}
    pairs = list(other_structures())
    assert len(pairs) == 42 - 4
    for held, built in pairs:
        if {held, built} == {"Faster R-CNN", "Mask R-CNN"}:
            match = r"(?s)does not fit (Mask|Faster) R-CNN.*Only one of them predicts masks"
        elif {held, built} == {"Cascade R-CNN", "Cascade Mask R-CNN"}:
            match = r"(?s)does not fit Cascade.*(Missing|Without a place).*Build the model with the options"
        else:
            first, second = (kind.removesuffix(" in parts") for kind in (held, built))
            match = rf"holds {first} \(.*the model is {second} \(.*nothing was loaded\. Build that.*export --dense"
        assert_refused(models[built], paths[held], match)


def test_refuses_another_number_of_stages_layers_or_variant(tmp_path):
    path = export_detector(rcnn(3, stages=2), tmp_path / "detector.pth")
    assert_refused(build("Cascade Mask R-CNN"), path, r"Cascade Mask R-CNN \(2 stages.*Cascade Mask R-CNN \(3 stages")
    path = export_detector(dino(3, num_layers=1), tmp_path / "detector.pth")
    assert_refused(build("DINO"), path, r"DINO \(1 layer, 3 classes\), the model is DINO \(2 layers")
    with torch.device("meta"):
        large = MaskRCNN(InternImage(CONFIGS["S"]), 3)
    path = export_detector(build("Mask R-CNN"), tmp_path / "detector.pth")
    with pytest.raises(CheckpointError, match=r"channels 16, depths 1-1-2-1\), the model is InternImage-S"):
        load_detector(large, path)


@pytest.mark.parametrize("kind", ["Mask R-CNN", "Cascade Mask R-CNN", "DINO", "DINO in parts", "CB-DINO"])
def test_damaged_files_are_refused_and_say_where(tmp_path, kind):
    model, state = build(kind, seed=1), dict(official_detector_state_dict(build(kind)))
    path = tmp_path / "detector.pth"
    names = dict(zip(state, model.state_dict(), strict=True))
    for lost in (list(state)[number] for number in (1, len(state) // 2, -1)):
        short = {key: tensor for key, tensor in state.items() if key != lost}
        match = rf"(?s)does not fit .*Missing in the file: {re.escape(names[lost])}\."
        assert_refused(model, saved(path, {"state_dict": short}), match)
    more = saved(path, {"state_dict": state | {"neck.extra.weight": torch.ones(1)}})
    assert_refused(model, more, r"(?s)Without a place in the model: neck\.extra\.weight\..*allow_unexpected")
    assert load_detector(model, more, allow_unexpected=["neck.extra*"]).unexpected
    key = next(key for key in state if key.startswith("neck.") and key.endswith("weight"))
    wrong = saved(path, {"state_dict": state | {key: torch.ones(2, 3)}})
    assert_refused(
        model, wrong, rf"{names[key]} is \(.*\) float32 in the model and \(2, 3\) float32 in the file \({key}"
    )


def test_a_key_with_and_without_a_wrappers_prefix_is_refused(tmp_path):
    model = build("Mask R-CNN")
    state = dict(official_detector_state_dict(model))
    state["module.neck.lateral_convs.0.conv.bias"] = torch.ones(16)
    path = saved(tmp_path / "detector.pth", {"state_dict": state})
    assert_refused(model, path, r"has (module\.)?neck\.lateral_convs\.0\.conv\.bias twice")


def test_another_number_of_queries_is_refused(tmp_path):
    source, model = build("DINO"), dino(3, num_queries=30)
    path = export_detector(source, tmp_path / "detector.pth")
    assert_refused(model, path, r"transformer\.query\.weight is \(30, 32\) float32 in the model and \(20, 32\)")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Mask R-CNN", "Mask R-CNN (1 class)"),
        ("Cascade Mask R-CNN", "Cascade Mask R-CNN (3 stages, 1 class)"),
        ("DINO in parts", "DINO (2 layers, 1 class, feed-forward networks in 4 parts)"),
        ("CB-DINO", "CB-DINO (2 layers, 1 class)"),
    ],
)
def test_inspect_says_which_detector_a_file_holds(tmp_path, capsys, kind, expected, own):
    model = build(kind, 1)
    path = export_detector(model, tmp_path / "detector.pth")
    if own:
        saved(path, {"state_dict": {f"model.{key}": tensor for key, tensor in model.state_dict().items()}})
    assert main(["inspect", str(path)]) == 0
    assert f"detector:    {expected}\n" in capsys.readouterr().out


def test_refuses_models_and_options_that_it_does_not_know(tmp_path):
    class Other(Backbone):
        widths = (16, 16, 16, 16)
        strides = (4, 8, 16, 32)

    path = export_detector(build("Mask R-CNN"), tmp_path / "detector.pth")
    for model in (nn.Linear(2, 2), internimage_debug(), rcnn(3, backbone=Other())):
        with pytest.raises(CheckpointError, match="expected an RCNN or a DINO on an InternImage"):
            load_detector(model, path)
    assert_refused(build("Mask R-CNN"), path, "head is 'map', expected 'load' or 'new'", head="map")
    model = build("Mask R-CNN")
    model.roi.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"the authors' detectors have no roi\.temperature"):
        export_detector(model, tmp_path / "other.pth")
    own = saved(tmp_path / "own.pth", model.state_dict())
    other = build("Mask R-CNN", seed=1)
    assert_refused(other, own, r"Without a place in the model: roi\.temperature")
    other.roi.register_parameter("temperature", nn.Parameter(torch.zeros(1)))
    load_detector(other, own)
    assert_equal(other.state_dict(), model.state_dict())
