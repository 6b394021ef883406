"""UPerNet and SegFormer against the authors' numbers, on their weights."""

from functools import partial
from types import SimpleNamespace

import golden
import golden_segmentation
import numpy as np
import pytest
import torch
from golden_segmentation import BACKBONES, ORIGINAL_SIZE, SIZE

from tasks.segmentation import inference
from tasks.segmentation.inference import SlidingWindow, View
from tasks.segmentation.keys import segmentor_official_to_ours
from tasks.segmentation.losses import pixel_accuracy

# Float32 rounding of two correct models differs by about 1e-5 of an entry's standard deviation.
TOLERANCE = 1e-4
# Relative to a parameter's gradient. Rectifiers and sampling cells that rounding flips change single pixels' gradients,
# so that projections differ by more than norms.
NORM_TOLERANCE, MEDIAN_PROJECTION, WORST_PROJECTION = 1e-3, 1e-3, 1e-2
# What the stored predictions by windows were made with.
WINDOW = SlidingWindow(crop=(96, 96), stride=(64, 64))


@pytest.fixture(scope="module", params=["upernet_t", "segformer_lmini"])
def case(request):
    """Everything that a segmentor computes from the two images, with its stored numbers."""
    name = request.param
    model, image = golden_segmentation.segmentor(name), golden_segmentation.images()
    with torch.no_grad():
        features = model.backbone(image)
    return SimpleNamespace(
        name=name,
        stored=golden.Golden(f"seg/{name}.npz"),
        raw=golden_segmentation.raw(name),
        model=model,
        image=image,
        features=features,
    )


@torch.no_grad()
def test_features_and_logits_are_the_authors(case):
    for level, feature in enumerate(case.features):
        case.stored.check(f"backbone/{level}", feature, TOLERANCE)
    case.stored.check("seg_logits", case.model(case.image), TOLERANCE)
    if case.name == "upernet_t":
        case.stored.check("aux_logits", case.model.auxiliary(case.features[2]), TOLERANCE)


@torch.no_grad()
def test_scores_at_every_pixel_are_the_authors(case):
    case.stored.check("encode_decode", case.model.scores(case.image), TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("entry", "flipped", "window"),
    [
        ("prob_whole_200x250", False, None),
        ("prob_whole_hflip_meta", True, None),
        ("prob_slide_96_64", False, WINDOW),
    ],
)
def test_probabilities_on_the_original_image_are_the_authors(case, entry, flipped, window):
    scorer = partial(window.scores, case.model.scores) if window else case.model.scores
    probabilities = inference.mean_probabilities(scorer, [View(case.image[:1], flipped)], ORIGINAL_SIZE)
    case.stored.check(entry, probabilities, TOLERANCE)


@pytest.mark.parametrize(("entry", "window"), [("pred_whole_200x250", None), ("pred_slide_96_64", WINDOW)])
def test_class_maps_are_the_authors(case, entry, window):
    expected = case.raw[entry].reshape(-1, *ORIGINAL_SIZE)
    number = len(expected)
    found = inference.class_maps(
        case.model.scores, case.image[:number], [SIZE] * number, [ORIGINAL_SIZE] * number, window=window
    )
    # Rounding decides near ties: of 50 thousand pixels with 150 classes none or a few.
    assert sum((ours.numpy() != theirs).sum() for ours, theirs in zip(found, expected, strict=True)) <= 3


def test_losses_gradients_and_statistics_are_the_authors(case):
    name, model, target = case.name, case.model, golden_segmentation.target(case.name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    logits = []
    heads = [model.head, *([model.auxiliary] if name == "upernet_t" else [])]
    hooks = [head.register_forward_hook(lambda module, inputs, output: logits.append(output)) for head in heads]
    losses = model.train()(case.image, target)
    for hook in hooks:
        hook.remove()
    expected = [key for key in ("loss/decode.loss_ce", "loss/aux.loss_ce") if key in case.raw]
    assert list(losses) == ["cross_entropy", "aux_cross_entropy"][: len(expected)]
    for found, key in zip(losses.values(), expected, strict=True):
        np.testing.assert_allclose(found.item(), case.raw[key], rtol=TOLERANCE)
    for found, key in zip(logits, ("loss/decode.acc_seg", "loss/aux.acc_seg"), strict=False):
        # In percent of 37 thousand pixels; rounding may decide for one of them.
        np.testing.assert_allclose(100 * pixel_accuracy(found, target), case.raw[key], rtol=0, atol=4e-3)
    total = sum(losses.values())
    np.testing.assert_allclose(total.item(), case.raw["loss/total"], rtol=TOLERANCE)

    total.backward()
    norms, projections, names = golden_segmentation.gradient_errors(name, model)
    worst = [(names[i], norms[i], projections[i]) for i in projections.argsort()[-5:]]
    assert norms.max() < NORM_TOLERANCE, worst
    assert np.median(projections) < MEDIAN_PROJECTION, worst
    assert projections.max() < WORST_PROJECTION, worst

    moved = [key for key in case.raw.files if key.startswith("after/")]
    assert len(moved) == 3
    for key in moved:
        ours = segmentor_official_to_ours(key.removeprefix("after/"), BACKBONES[name])
        case.stored.check(key, model.state_dict()[ours], TOLERANCE)
    model.zero_grad()
    model.load_state_dict(before)
    model.eval()
