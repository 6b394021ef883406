import math

import pytest
import torch
import torch.nn.functional as F

from internimage import internimage_debug
from internimage.init import materialise
from tasks.segmentation import SegFormer, UPerNet
from tasks.segmentation.losses import pixel_accuracy, pixel_cross_entropy

SEGMENTORS = [UPerNet, SegFormer]
NUM_CLASSES = 5


def segmentor(kind, **options):
    torch.manual_seed(0)
    return kind(internimage_debug(drop_path_rate=0.0), NUM_CLASSES, channels=16, **options)


def images(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def targets(*size):
    target = torch.randint(NUM_CLASSES, (2, *size), generator=torch.Generator().manual_seed(1))
    target[0, : size[0] // 2] = 255
    return target


@pytest.mark.parametrize("kind", SEGMENTORS)
@torch.no_grad()
def test_logits_have_the_size_of_the_finest_feature_and_scores_that_of_the_image(kind):
    model, image = segmentor(kind).eval(), images(70, 90)
    assert model(image).shape == (2, NUM_CLASSES, 18, 23)
    scores = model.bfloat16().scores(image.bfloat16())
    assert scores.shape == (2, NUM_CLASSES, 70, 90)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("kind", SEGMENTORS)
def test_every_parameter_is_trained(kind):
    model = segmentor(kind).train()
    sum(model(images(64, 64), targets(64, 64)).values()).backward()
    # The bias of a key or a norm may have a gradient of 0 by structure, None it may not have.
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kind", SEGMENTORS)
def test_dropout_is_of_training_alone(kind):
    model, image = segmentor(kind, dropout=0.5), images(64, 64)
    twice = [model.train()(image) for _ in range(2)]
    assert not twice[0].equal(twice[1])
    twice = [model.eval()(image) for _ in range(2)]
    assert twice[0].equal(twice[1])


def test_the_auxiliary_loss_is_weighted_or_left_out():
    model, half, without = (segmentor(UPerNet, dropout=0.0, aux_weight=weight) for weight in (1.0, 0.5, 0.0))
    losses, halved, alone = (one(images(64, 64), targets(64, 64)) for one in (model, half, without))
    assert halved["aux_cross_entropy"].item() == pytest.approx(0.5 * losses["aux_cross_entropy"].item())
    assert losses["cross_entropy"] == alone["cross_entropy"]
    assert alone.keys() == {"cross_entropy"}
    assert not any(name.startswith("auxiliary") for name, _ in without.named_parameters())


@pytest.mark.parametrize("kind", SEGMENTORS)
def test_first_guesses_are_nearly_equal(kind):
    # Logits of small weights: nothing is sure yet.
    losses = segmentor(kind)(images(64, 64), targets(64, 64).clamp(max=NUM_CLASSES - 1))
    assert losses["cross_entropy"].item() == pytest.approx(math.log(NUM_CLASSES), rel=0.05)


@pytest.mark.parametrize("kind", SEGMENTORS)
def test_a_model_built_without_memory_gets_its_start_values(kind):
    with torch.device("meta"):
        model = kind(internimage_debug(), NUM_CLASSES)
    classifier = materialise(model).head.classifier
    # A thousand draws or more: 10 % is more than four standard deviations.
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert classifier.bias.eq(0).all()
    conv = model.head.levels[0].conv if kind is SegFormer else model.head.laterals[0].conv
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / conv.out_channels), rel=0.1)


def test_a_target_of_another_size_and_a_missing_feature_are_refused():
    with pytest.raises(ValueError, match=r"UPerNet: the target has shape \(2, 32, 32\), expected \(2, 64, 64\)"):
        segmentor(UPerNet)(images(64, 64), targets(32, 32))
    with pytest.raises(ValueError, match="aux_index is 4, expected 0 to 3"):
        segmentor(UPerNet, aux_index=4)


def test_the_loss_averages_over_all_pixels_or_the_valid_ones():
    logits, target = torch.randn(2, NUM_CLASSES, 6, 8, generator=torch.Generator().manual_seed(0)), targets(6, 8)
    expected = F.cross_entropy(logits, target, ignore_index=255)
    torch.testing.assert_close(pixel_cross_entropy(logits, target, valid_only=True), expected)
    # A quarter is ignored.
    torch.testing.assert_close(pixel_cross_entropy(logits, target), 0.75 * expected)


@pytest.mark.parametrize("valid_only", [False, True])
def test_an_image_without_valid_pixels_has_no_loss_but_a_gradient(valid_only):
    logits = torch.randn(1, NUM_CLASSES, 4, 4, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((1, 8, 8), 255), valid_only=valid_only)
    loss.backward()
    assert loss == 0
    assert logits.grad.eq(0).all()


def test_logits_are_resized_to_the_target_and_the_loss_is_float32():
    logits = torch.randn(2, NUM_CLASSES, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = targets(6, 8)
    loss = pixel_cross_entropy(logits, target)
    larger = F.interpolate(logits.float(), (6, 8), mode="bilinear", align_corners=False)
    assert loss.dtype == torch.float32
    assert loss.equal(pixel_cross_entropy(larger, target))
    right = (larger.argmax(1) == target).sum() / (target != 255).sum()
    torch.testing.assert_close(pixel_accuracy(logits, target), right)


@pytest.mark.parametrize("kind", SEGMENTORS)
def test_the_option_reaches_the_losses(kind):
    every, valid = (segmentor(kind, dropout=0.0, valid_only=option) for option in (False, True))
    ours, theirs = every(images(64, 64), targets(64, 64)), valid(images(64, 64), targets(64, 64))
    for name, loss in theirs.items():
        torch.testing.assert_close(ours[name], 0.75 * loss)
