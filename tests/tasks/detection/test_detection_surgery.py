"""Files that are changed to fit a detector, or that fit a part of it."""

from dataclasses import replace

import pytest
import torch
from checkpoint_files import saved
from detector_files import KINDS, assert_equal, assert_refused, build, composite, detect, dino, part, rcnn

from internimage import Classifier, InternImage, internimage_debug
from internimage.checkpoints import export_official, official_state_dict
from internimage.convert import main
from tasks.detection.checkpoints import export_detector, load_detector, official_detector_state_dict


def copied(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("held", "built"), [(4, 1), (1, 4), (4, 2)])
def test_feed_forward_networks_change_their_form_exactly(tmp_path, held, built):
    source, target = dino(3, ffn_chunks=held), dino(3, ffn_chunks=built)
    report = load_detector(target, export_detector(source, tmp_path / "detector.pth"))
    joined = {1: "4 parts joined", 4: "one of 4 parts", 2: "one of 2 parts"}[built]
    assert set(report.adapted.values()) == {joined}
    assert len(report.adapted) == 4 * 3 * built
    again = dino(3, ffn_chunks=held)
    load_detector(again, export_detector(target, tmp_path / "again.pth"))
    assert_equal(again.state_dict(), source.state_dict())
    found, expected = detect(target), detect(source)
    # Sums of 64 products in another order.
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_classes_has_to_be_asked_for(tmp_path, kind):
    source, model = build(kind), build(kind, 5, seed=1)
    path = export_detector(source, tmp_path / "detector.pth")
    assert_refused(model, path, r"has 3 classes, the model 5; nothing was loaded\. Say head='new'.*num_classes=3")
    before, held = copied(model), source.state_dict()
    report = load_detector(model, path, head="new")
    classes = {key for key in before if before[key].shape != held[key].shape}
    assert set(report.missing) == classes
    assert len(report.ignored) == len(classes) > 0
    assert set(report.missing.values()) == set(report.ignored.values()) == {"head='new'"}
    assert_equal(model.state_dict(), {key: before[key] if key in classes else held[key] for key in before})


def test_new_class_layers_stay_also_where_the_numbers_agree(tmp_path):
    model = build("Mask R-CNN", seed=1)
    before = copied(model)
    load_detector(model, export_detector(build("Mask R-CNN"), tmp_path / "detector.pth"), head="new")
    assert torch.equal(model.roi.box_heads[0].classes.weight, before["roi.box_heads.0.classes.weight"])
    assert not torch.equal(model.rpn.conv.weight, before["rpn.conv.weight"])


def backbone_files(tmp_path, backbone):
    """Files of one backbone without a detector, and what a report names of their other parts."""
    classifier = Classifier(backbone, 7)
    lightning = {f"model.{key}": tensor for key, tensor in classifier.state_dict().items()}
    dense = official_state_dict(classifier, dense=True)
    segmentor = dense | {"decode_head.conv_seg.weight": torch.zeros(2)}
    return {
        "classifier": (export_official(classifier, tmp_path / "1.pth"), {"conv_head.*", "head.*"}),
        "run": (saved(tmp_path / "2.ckpt", {"state_dict": lightning}), {"head.*"}),
        "backbone": (export_official(classifier, tmp_path / "3.pth", dense=True), set()),
        "segmentor": (saved(tmp_path / "4.pth", {"state_dict": segmentor}), {"decode_head.*"}),
    }


@pytest.mark.parametrize("head", ["load", "new"])
@pytest.mark.parametrize("kind", ["Cascade Mask R-CNN", "DINO"])
def test_a_file_without_a_detector_gives_the_backbone(tmp_path, kind, head):
    for path, parts in backbone_files(tmp_path, build(kind).backbone).values():
        model = build(kind, seed=1)
        before = copied(model)
        report = load_detector(model, path, head=head)
        assert_equal(model.backbone.state_dict(), build(kind).backbone.state_dict())
        rest = {key: tensor for key, tensor in before.items() if not key.startswith("backbone.")}
        assert_equal(part(model, rest), rest)
        assert report.missing == dict.fromkeys(rest, "the file has no detector")
        assert report.ignored.keys() == parts


def test_a_backbone_without_layer_scale_is_one_of_scale_one(tmp_path):
    plain = internimage_debug()
    path = export_official(plain, tmp_path / "weights.pth", dense=True)
    model = rcnn(3)
    report = load_detector(model, path)
    scales = {key for key in model.state_dict() if ".scale" in key}
    assert {report.missing[key] for key in scales} == {"the file has no layer scale, and 1 is none"}
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for found, expected in zip(model.backbone.eval()(image), plain.eval()(image), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    other = rcnn(3, backbone=internimage_debug(layer_scale=0.1))
    assert_refused(other, path, "Only one of them has layer scale")


def test_one_backbone_goes_into_both_of_a_composite(tmp_path):
    backbone = build("DINO").backbone
    for path, parts in backbone_files(tmp_path, backbone).values():
        model = composite(3)
        report = load_detector(model, path)
        state = official_detector_state_dict(model)
        for key, tensor in official_state_dict(backbone).items():
            assert torch.equal(state[f"backbone.cb_modules.0.{key}"], tensor)
            assert "patch_embed" in key or torch.equal(state[f"backbone.cb_modules.1.{key}"], tensor)
        assert set(report.adapted.values()) == {"the file's only backbone, once more"}
        assert set(report.missing.values()) == {"the file has no detector", "the file has one backbone"}
        assert report.ignored.keys() == parts


@pytest.mark.parametrize("kind", ["DINO", "DINO in parts"])
def test_a_composite_that_starts_from_a_dino_detects_the_same(tmp_path, kind):
    source, model = build(kind), composite(3)
    path = export_detector(source, tmp_path / "detector.pth")
    report = load_detector(model, path)
    assert set(report.missing.values()) == {"the file has one backbone"}
    found, expected = detect(model), detect(source)
    # The same arithmetic, but for the order of sums in the feed-forward networks.
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-3)
    run = saved(tmp_path / "last.ckpt", {"state_dict": {f"model.{k}": t for k, t in source.state_dict().items()}})
    other = composite(3)
    load_detector(other, run)
    assert other.state_dict().keys() - report.missing.keys() == report.taken.keys()
    assert_equal(part(other, report.taken), part(model, report.taken))


def test_a_composite_backbone_without_a_detector_loads_whole(tmp_path):
    source, model = build("CB-DINO"), build("CB-DINO", seed=1)
    state = {key: t for key, t in official_detector_state_dict(source).items() if key.startswith("backbone.")}
    report = load_detector(model, saved(tmp_path / "backbone.pth", {"state_dict": state}))
    assert_equal(model.backbone.state_dict(), source.backbone.state_dict())
    assert set(report.missing.values()) == {"the file has no detector"}


def test_drops_the_central_points_of_a_model_that_has_none(tmp_path):
    config = internimage_debug().config
    full, reduced = (rcnn(3, backbone=InternImage(replace(config, remove_center=drop))) for drop in (False, True))
    report = load_detector(reduced, export_detector(full, tmp_path / "detector.pth"))
    assert set(report.adapted.values()) == {"central point dropped"}
    assert len(report.adapted) == 5 * 4
    bias = full.backbone.stages[0].blocks[0].dcn.mask.bias
    assert torch.equal(reduced.backbone.stages[0].blocks[0].dcn.mask.bias, torch.cat([bias[:4], bias[5:]]))


def test_the_backbone_of_a_file_that_is_refused_can_be_taken_alone(tmp_path):
    source, model = build("Mask R-CNN"), rcnn(5, stages=3)
    path = export_detector(source, tmp_path / "detector.pth")
    assert_refused(model, path, "export --dense detector.pth backbone.pth")
    assert main(["export", "--dense", str(path), str(tmp_path / "backbone.pth")]) == 0
    load_detector(model, tmp_path / "backbone.pth")
    assert_equal(model.backbone.state_dict(), source.backbone.state_dict())


def test_masks_may_be_left_out_or_kept_when_they_are_named(tmp_path):
    masked, plain = build("Mask R-CNN"), build("Faster R-CNN", seed=1)
    report = load_detector(plain, export_detector(masked, tmp_path / "a.pth"), allow_unexpected=["*mask_head*"])
    assert len(report.unexpected) == 12
    assert_equal(plain.state_dict(), part(masked, plain.state_dict()))
    report = load_detector(masked, export_detector(plain, tmp_path / "b.pth"), allow_missing=["roi.mask_heads*"])
    assert len(report.missing) == 12


def test_a_detector_on_the_meta_device_gets_memory_and_start_values(tmp_path):
    source = build("Mask R-CNN")
    path = export_detector(source, tmp_path / "detector.pth")
    with torch.device("meta"):
        whole, new = rcnn(3), rcnn(5)
    load_detector(whole, path)
    assert_equal(whole.state_dict(), source.state_dict())
    load_detector(new, path, head="new")
    assert torch.equal(new.roi.box_heads[0].fcs[0].weight, source.roi.box_heads[0].fcs[0].weight)
    # As its own start values are.
    assert 0.005 < new.roi.box_heads[0].classes.weight.std() < 0.02
