import pytest
import torch

from internimage import InternImage, InternImageConfig, internimage_debug
from tasks.detection.composite import ASSIST_WEIGHT, CompositeDINO, CompositeInternImage


def build(seed=0, **options):
    torch.manual_seed(seed)
    return CompositeInternImage(internimage_debug(), internimage_debug(out_indices=(1, 2, 3)), **options)


def connect(backbone):
    """Let the assist take part: the factors start at zero."""
    for name, parameter in backbone.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.normal_(parameter)
    return backbone


def images(count=2, height=64, width=96):
    torch.manual_seed(0)
    return torch.randn(count, 3, height, width)


def test_without_assistance_the_lead_is_a_plain_backbone():
    composite = build()
    plain = internimage_debug(out_indices=(1, 2, 3))
    state = {
        name.replace("downsample.downsample", "downsample"): value
        for name, value in composite.lead.state_dict().items()
    }
    state |= {f"stem.{name}": value for name, value in composite.assist.stem.state_dict().items()}
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    with torch.no_grad():
        found, expected = composite(images()), plain(images())
    assert len(found) == len(expected) == len(composite.widths) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@torch.no_grad()
def test_a_stage_gets_the_projected_features_of_the_assist_from_that_stage_on():
    composite = connect(build(half_gamma=False))
    junction = composite.lead.stages[2].downsample
    x = torch.randn(2, 8, 12, 32)
    assist = [torch.randn(2, 64, 4, 6), torch.randn(2, 128, 2, 3)]
    (projection,) = junction.linears
    enlarged = projection(assist[1]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = junction.downsample(x) + junction.gamma * (assist[0] + enlarged).permute(0, 2, 3, 1)
    torch.testing.assert_close(junction((x, assist)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(64, 96), (50, 37), (33, 32)])
def test_any_size_works(size):
    features = connect(build())(images(1, *size))
    for feature, stride in zip(features, (8, 16, 32), strict=True):
        assert feature.shape[2:] == tuple(-(-length // stride) for length in size)
        assert feature.isfinite().all()


def test_factors_are_rounded_to_float16_and_their_gradients_are_not():
    rounded, exact = build(), build(half_gamma=False)
    value = torch.tensor(0.1)
    for composite in (rounded, exact):
        for stage in composite.lead.stages:
            torch.nn.init.constant_(stage.downsample.gamma, value.item())
    difference = [(one - other).abs().max() for one, other in zip(rounded(images()), exact(images()), strict=True)]
    assert all(0 < one < 1e-2 for one in difference)
    for stage in exact.lead.stages:
        torch.nn.init.constant_(stage.downsample.gamma, value.half().item())
    for one, other in zip(rounded(images()), exact(images()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    # Far above the largest float16, 65504.
    sum(feature.sum() for feature in rounded(images())).mul(1e9).backward()
    for stage in rounded.lead.stages:
        assert stage.downsample.gamma.grad.isfinite().all()


def test_layer_groups_hold_every_parameter_once():
    composite = build()
    groups = composite.layer_groups()
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(name for name, _ in composite.named_parameters())
    assert len(groups) == len(internimage_debug().layer_groups())
    # What joins a stage learns with its first block: block 3 of 5 opens stage 2.
    assert "lead.stages.2.downsample.gamma" in groups[3]
    assert "lead.stages.2.downsample.linears.0.weight" in groups[3]


def test_backbones_of_two_widths_are_refused():
    other = InternImage(InternImageConfig(channels=32, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8)))
    with pytest.raises(ValueError, match=r"assist is \(16, 32, 64, 128\) channels wide and lead \(32, 64, 128, 256\)"):
        CompositeInternImage(internimage_debug(), other)


def detector(**options):
    backbone = connect(build())
    options = {"num_queries": 20, "denoising_queries": 6, "dim": 32, "hidden_dim": 64, "num_layers": 2} | options
    return CompositeDINO(backbone, 3, **options)


def target(*boxes):
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": torch.ones(len(boxes), dtype=torch.long)}


def test_a_batch_gives_the_mean_of_its_images():
    """With as many objects in each image, its losses weigh the same: nothing depends on the size of the batch."""
    model = detector(label_noise=0.0, box_noise=0.0)
    targets = [
        target((8, 8, 40, 40), (1, 1, 9, 60)),
        target((30, 5, 80, 45), (2, 20, 20, 44)),
        target((5, 5, 9, 9), (0, 0, 90, 60)),
    ]
    sizes = [(64, 96), (50, 96), (64, 70)]
    image = images(3)
    with torch.no_grad():
        together = model(image, sizes, targets)
        alone = [model(image[i : i + 1], sizes[i : i + 1], targets[i : i + 1]) for i in range(3)]
    assert len(together) == 2 * 3 * (1 + 2 * 2)
    for name, loss in together.items():
        expected = torch.stack([losses[name] for losses in alone]).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_the_assist_counts_half(monkeypatch):
    model = detector(label_noise=0.0, box_noise=0.0)
    # Both halves get the same features.
    features = [
        torch.randn(1, width, 64 // stride, 96 // stride)
        for width, stride in zip((32, 64, 128), (8, 16, 32), strict=True)
    ]
    monkeypatch.setattr(model.backbone, "streams", lambda image: (features, features))
    losses = model(images(1), [(64, 96)], [target((8, 8, 40, 40))])
    for name, loss in losses.items():
        if name.startswith("assist_"):
            full = losses[name.replace("assist_", "lead_")]
            torch.testing.assert_close(loss, ASSIST_WEIGHT * full, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("targets", [[target((8, 8, 40, 40)), target()], [target(), target()]])
def test_every_parameter_is_trained_whatever_the_images_hold(targets):
    model = detector()
    sum(model(images(), [(64, 96), (50, 96)], targets).values()).backward()
    missing = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.isfinite().all()]
    assert missing == []


def test_detections_come_from_the_lead():
    model = detector(limit=5).eval()
    with torch.no_grad():
        found = model(images(), [(64, 96), (50, 96)])
        lead = model.backbone.streams(images())[1]
        features = model.backbone(images())
    assert all(one["boxes"].shape == (5, 4) for one in found)
    for one, other in zip(features, lead, strict=True):
        assert one.equal(other)
