"""Mask2Former against the authors' numbers, on their weights."""

from types import SimpleNamespace

import golden
import golden_mask2former
import numpy as np
import pytest
import torch
from golden_mask2former import BACKBONE, FILE

from tasks.segmentation.inference import SlidingWindow, View, class_maps, mean_probabilities
from tasks.segmentation.mask2former_inference import semantic_scores
from tasks.segmentation.mask2former_keys import mask2former_official_to_ours

# Float32 rounding of two correct models differs by about 1e-5 of an entry's standard deviation.
TOLERANCE = 1e-4
ORIGINAL_SIZE = (200, 250)
# Pixels of 100,000 where two classes' scores are equal up to rounding.
MAX_TIES = 5
# Relative to a parameter's gradient. Which points are uncertain and which pixels are hidden are choices that rounding
# can change for single ones. One thread finds norms within 4e-5 and projections within 3e-4, medians 3e-6 and 2e-5;
# two threads add in another order and find 6e-4 and 3e-3, medians 3e-5 and 1e-4.
NORM_TOLERANCE, MEDIAN_PROJECTION, WORST_PROJECTION = 2e-3, 5e-4, 1e-2


@pytest.fixture(scope="module")
def case():
    """Everything that the segmentor computes from the two images, with its stored numbers."""
    model, image = golden_mask2former.segmentor(), golden_mask2former.images()
    with torch.no_grad():
        features = model.backbone(image)
        pixels, layers = model.pixel_decoder(features), model.layers(features)
    return SimpleNamespace(
        model=model,
        image=image,
        features=features,
        pixels=pixels,
        layers=layers,
        stored=golden.Golden(FILE),
        raw=golden_mask2former.stored(),
    )


def test_backbone_and_pixel_decoder_are_the_authors(case):
    assert len(case.pixels.multi_scale_features) == 3
    for entry, maps in {"backbone": case.features, "memory": case.pixels.multi_scale_features}.items():
        for level, tensor in enumerate(maps):
            case.stored.check(f"{entry}/{level}", tensor, TOLERANCE)
    case.stored.check("mask_features", case.pixels.mask_features, TOLERANCE)


def test_every_layer_is_the_authors(case):
    assert len(case.layers) == 10
    for number, layer in enumerate(case.layers):
        case.stored.check(f"cls/{number}", layer.classes, TOLERANCE)
        case.stored.check(f"mask/{number}", layer.masks, TOLERANCE)


@torch.no_grad()
def test_scores_and_probabilities_are_the_authors(case):
    model, image = case.model, case.image
    case.stored.check("seg_logits", semantic_scores(case.layers[-1], (32, 40)), TOLERANCE)
    case.stored.check("encode_decode", model.scores(image), TOLERANCE)
    for entry, flipped in (("prob_whole_200x250", False), ("prob_whole_hflip_meta", True)):
        found = mean_probabilities(model.scores, [View(image[:1], flipped)], ORIGINAL_SIZE)
        case.stored.check(entry, found, TOLERANCE)
    window = SlidingWindow(crop=(96, 96), stride=(64, 64))
    found = mean_probabilities(lambda view: window.scores(model.scores, view), [View(image[:1])], ORIGINAL_SIZE)
    case.stored.check("prob_slide_96_64", found, TOLERANCE)


def test_maps_of_classes_are_the_authors(case):
    sizes, original_sizes = [tuple(case.image.shape[-2:])] * 2, [ORIGINAL_SIZE] * 2
    whole = class_maps(case.model.scores, case.image, sizes, original_sizes)
    assert (torch.stack(whole).numpy() != case.raw["pred_whole_200x250"]).sum() <= MAX_TIES
    window = SlidingWindow(crop=(96, 96), stride=(64, 64))
    slide = class_maps(case.model.scores, case.image[:1], sizes[:1], original_sizes[:1], window=window)
    assert (slide[0].numpy() != case.raw["pred_slide_96_64"]).sum() <= MAX_TIES


def test_assignments_losses_and_gradients_are_the_authors(case, monkeypatch):
    model, values = case.model, case.raw
    calls = golden_mask2former.stored_points(monkeypatch)
    pairs, match = [], model.losses.match
    monkeypatch.setattr(model.losses, "match", lambda *args: pairs.append(match(*args)) or pairs[-1])
    model.zero_grad()
    losses = model.train()(case.image, torch.from_numpy(values["gt_semantic"]).long())
    model.eval()
    assert len(calls) == values["rand_calls"]
    # One row for each layer and image: 1 + the number of the mask, 0 for none.
    assigned = np.zeros_like(values["assigned_gt_inds"])
    for row, pair in zip(assigned, [pair for layer in pairs for pair in layer], strict=True):
        row[pair.query.numpy()] = 1 + pair.object.numpy()
    np.testing.assert_array_equal(assigned, values["assigned_gt_inds"])

    assert len(losses) == 30
    for name, value in losses.items():
        key = f"loss/{golden_mask2former.official_loss(name)}"
        # Float32 sums over 12544 points.
        np.testing.assert_allclose(value.item(), values[key], rtol=1e-5, err_msg=key)
    total = sum(losses.values())
    np.testing.assert_allclose(total.item(), values["loss/total"], rtol=1e-5)

    total.backward()
    parameters = dict(model.named_parameters())
    names = values["grad_names"].tolist()
    found = []
    for key in names:
        gradient = parameters.pop(mask2former_official_to_ours(key, BACKBONE)).grad.double()
        projection = (gradient * golden.noise(f"proj/{key}", tuple(gradient.shape), torch.float64)).sum()
        found.append((gradient.norm(), projection))
    assert not parameters
    norms, projections = np.array(found, dtype=np.float64).T
    scale = np.maximum(values["grad_norm"], 1e-3)
    error = np.abs(norms - values["grad_norm"]) / scale
    error_projected = np.abs(projections - values["grad_proj"]) / scale
    worst = [(names[index], error[index], error_projected[index]) for index in error_projected.argsort()[-5:]]
    assert error.max() < NORM_TOLERANCE, worst
    assert np.median(error_projected) < MEDIAN_PROJECTION, worst
    assert error_projected.max() < WORST_PROJECTION, worst


def test_the_stored_masks_are_those_of_the_classes_present(case):
    targets = golden_mask2former.targets()
    for number, target in enumerate(targets):
        np.testing.assert_array_equal(target["labels"].numpy(), case.raw[f"gt_labels/{number}"])
