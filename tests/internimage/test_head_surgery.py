import pytest
import torch
from checkpoint_files import CLASSES, assert_refused, authors, build, in_detector, saved

from internimage.checkpoints import load_checkpoint


def test_a_dense_t_starts_from_the_classifier_without_layer_scale(tmp_path):
    weights = authors("Tmini_rc")
    path = saved(tmp_path / "weights.pth", {"model": weights})
    model = build("Tmini_rc", layer_scale=1.0)
    report = load_checkpoint(model, path)
    scales = [key for key in model.state_dict() if ".scale" in key]
    assert len(scales) == 2 * 5
    assert report.missing == dict.fromkeys(scales, "the file has no layer scale, and 1 is none")
    assert all((model.state_dict()[key] == 1).all() for key in scales)
    # Any other factor would change what the network computes.
    assert_refused(build("Tmini_rc", layer_scale=0.1), path, "Only one of them has layer scale")
    with_scale = saved(tmp_path / "weights.pth", {"model": authors("Lmini_os2")})
    assert_refused(build("Lmini_os2", layer_scale=None), with_scale, r"(?s)gamma1.*Only one of them has layer scale")


def test_another_number_of_classes_has_to_be_asked_for(tmp_path):
    path = saved(tmp_path / "weights.pth", {"model": authors("Tmini_rc", 21)})
    model = build("Tmini_rc", 5)
    assert_refused(
        model, path, r"(?s)head\.fc\.weight is \(5, 384\) float32 in the model and \(21, 384\).*head='new'.*head='map'"
    )


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_a_new_head_keeps_the_layers_before_it(tmp_path, scale):
    weights = authors("Tmini_rc", 21)
    path = saved(tmp_path / "weights.pth", {"model": weights})
    model = build("Tmini_rc", 5)
    before = model.head.fc.weight.clone()
    report = load_checkpoint(model, path, head="new", new_head_scale=scale)
    assert torch.equal(model.head.fc.weight, before * scale)
    assert torch.equal(model.head.conv.weight, weights["conv_head.0.weight"])
    assert report.missing == dict.fromkeys(("head.fc.weight", "head.fc.bias"), "head='new'")
    assert report.ignored == dict.fromkeys(("head.weight", "head.bias"), "head='new'")


@pytest.mark.parametrize("as_file", [True, False])
def test_a_label_map_makes_the_logits_of_those_classes(tmp_path, as_file):
    path = saved(tmp_path / "weights.pth", {"model": authors("Tmini_rc", 21)})
    rows = [20, 3, 3, 0, 7]
    label_map = rows
    if as_file:
        label_map = tmp_path / "map.txt"
        label_map.write_text("\n".join(map(str, rows)) + "\n")
    large, small = build("Tmini_rc", 21).eval(), build("Tmini_rc", 5).eval()
    load_checkpoint(large, path)
    report = load_checkpoint(small, path, head="map", label_map=label_map)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # The same products in another matrix shape: float32 rounding only, on logits of about 100.
        torch.testing.assert_close(small(image), large(image)[:, rows], rtol=1e-5, atol=1e-3)
    assert report.adapted == dict.fromkeys(("head.fc.weight", "head.fc.bias"), "5 of 21 rows, by the label map")


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ("1\n2\n", r"label_map has 2 indices, expected 5"),
        ("1\n2\n3\n4\n21\n", r"index 21 is not in \[0, 21\)"),
        ("1\n2\n3\n4\n-1\n", r"index -1 is not in"),
        ("1\n2\nn01440764\n4\n5\n", r"map\.txt:3 is 'n01440764'"),
    ],
)
def test_refuses_a_label_map_that_does_not_fit(tmp_path, lines, match):
    path = saved(tmp_path / "weights.pth", {"model": authors("Tmini_rc", 21)})
    (tmp_path / "map.txt").write_text(lines)
    assert_refused(build("Tmini_rc", 5), path, match, head="map", label_map=tmp_path / "map.txt")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head": "map"}, "label_map=None"),
        ({"label_map": [1, 2]}, "head='load' with label_map"),
        ({"head": "map", "label_map": "nowhere.txt"}, "no such file nowhere.txt"),
        ({"new_head_scale": 0.1}, "new_head_scale=0.1 has no effect with head='load'"),
        ({"head": "random"}, "head is 'random', expected"),
    ],
)
def test_refuses_options_that_do_not_go_together(tmp_path, options, match):
    path = saved(tmp_path / "weights.pth", {"model": authors("Tmini_rc")})
    assert_refused(build("Tmini_rc"), path, match, **options)


def test_a_label_map_needs_a_head_in_the_file(tmp_path):
    path = saved(tmp_path / "detector.pth", in_detector(authors("Lmini_os2")))
    assert_refused(
        build("Lmini_os2"), path, "no classification head to pick rows from", head="map", label_map=[0] * CLASSES
    )


def with_center(name):
    """Weights of the same model before its central points were dropped."""
    weights = authors(name)
    generator = torch.Generator().manual_seed(1)
    for key, tensor in weights.items():
        if ".dcn.mask." in key or ".dcn.offset." in key:
            shape = (tensor.shape[0] * 9 // 8, *tensor.shape[1:])
            weights[key] = torch.rand(shape, generator=generator)
    return weights


def test_remove_center_drops_the_rows_that_the_authors_drop(tmp_path):
    weights = with_center("Tmini_rc")
    model = build("Tmini_rc")
    report = load_checkpoint(model, saved(tmp_path / "weights.pth", {"model": weights}))
    state = model.state_dict()
    for part in ("weight", "bias"):
        full = weights[f"levels.2.blocks.1.dcn.mask.{part}"]
        expected = torch.stack([row for i, row in enumerate(full) if i % 9 != 4])
        assert torch.equal(state[f"backbone.stages.2.blocks.1.dcn.mask.{part}"], expected)
        full = weights[f"levels.2.blocks.1.dcn.offset.{part}"]
        expected = torch.stack([row for i, row in enumerate(full) if i % 18 not in (8, 9)])
        assert torch.equal(state[f"backbone.stages.2.blocks.1.dcn.offset.{part}"], expected)
    assert len(report.adapted) == 5 * 4
    assert set(report.adapted.values()) == {"central point dropped"}


def test_remove_center_is_the_full_model_whose_centers_have_no_weight(tmp_path):
    weights = with_center("Tmini_rc")
    for key, tensor in weights.items():
        # A logit of -1e4 is a weight of 0 after the softmax.
        if key.endswith(".dcn.mask.bias"):
            tensor.view(-1, 9)[:, 4] = -1e4
    path = saved(tmp_path / "weights.pth", {"model": weights})
    full, reduced = build("Tmini_rc", remove_center=False).eval(), build("Tmini_rc").eval()
    load_checkpoint(full, path)
    load_checkpoint(reduced, path)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = full(image), reduced(image)
    # Eight terms summed in another order: float32 rounding through five blocks.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
