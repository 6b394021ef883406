"""Mask R-CNN and Cascade Mask R-CNN against the authors' numbers, on their weights."""

import golden
import golden_rcnn
import numpy as np
import pytest
import torch
from golden_rcnn import BACKBONES, SIZES

from tasks.detection.keys import rcnn_official_to_ours
from tasks.detection.postprocess import to_original

# Float32 rounding of two correct models differs by about 1e-5 of an entry's standard deviation.
TOLERANCE = 1e-4
# Pixels. The authors' float32 proposals are up to 0.8e-3 from a float64 run of T; ours add a rounding of their own.
BOX_TOLERANCE = 2e-3
# The heads alone, on the authors' proposals: float32 rounding of a coordinate of 100 px, a few times.
HEAD_BOX_TOLERANCE = 2e-4
# Relative to a parameter's gradient. Rectifiers and sampling cells that rounding flips change single pixels' gradients:
# images that differ by 1e-7 of their values already give projections that differ by 1.1e-2, at the median by 8e-4.
NORM_TOLERANCE, MEDIAN_PROJECTION, WORST_PROJECTION = 5e-3, 2e-3, 3e-2
# In the last block of T one sampling location is 1e-6 px below a whole number with our rounding and not with theirs,
# and the derivative jumps there: its place in the flattened offsets, and the step to the other side.
FLIPPED_OFFSET, FLIPPED_BY = 4415, 3e-6

# Thousands of proposals pass four convolutions in three stages: 1.4 TFLOP forward, 8 in training.
CASCADE_IS_SLOW = ["maskrcnn_t", pytest.param("cascade_lmini", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=["maskrcnn_t", "cascade_lmini"])
def case(request):
    """Name, stored numbers, model, pyramid of the two images."""
    name = request.param
    model = golden_rcnn.detector(name)
    with torch.no_grad():
        features = model.backbone(golden_rcnn.images(name))
        pyramid = model.neck(features)
    return name, golden.Golden(f"det/{name}.npz"), model, features, pyramid


def raw(name):
    return np.load(golden.FOLDER / "det" / f"{name}.npz")


def stage_entry(model, what, stage):
    return f"{what}/{stage}" if len(model.roi.stages) > 1 else what


@torch.no_grad()
def test_backbone_pyramid_and_proposal_maps_are_the_authors(case):
    _, stored, model, features, pyramid = case
    objectness, deltas = model.rpn.maps(pyramid)
    for entry, maps in {"backbone": features, "fpn": pyramid, "rpn_cls": objectness, "rpn_reg": deltas}.items():
        for level, tensor in enumerate(maps):
            stored.check(f"{entry}/{level}", tensor, TOLERANCE)


@torch.no_grad()
def test_proposals_are_the_authors(case):
    name, _, model, _, pyramid = case
    proposals, losses = model.rpn(pyramid, SIZES)
    assert not losses
    for number, found in enumerate(proposals):
        expected = torch.from_numpy(raw(name)[f"proposals/{number}"])[:, :4]
        assert found.shape == expected.shape
        distance = torch.cdist(found, expected, p=float("inf"))
        assert distance.amin(0).max() < BOX_TOLERANCE
        assert distance.amin(1).max() < BOX_TOLERANCE


@torch.no_grad()
def test_stages_on_fixed_boxes_are_the_authors(case):
    name, stored, model, _, pyramid = case
    rois = torch.from_numpy(raw(name)["fixed_rois"])
    order = torch.cat([torch.where(rois[:, 0] == number)[0] for number in range(2)])
    back = order.argsort()
    boxes = [rois[rois[:, 0] == number, 1:] for number in range(2)]
    levels = pyramid[:4]
    for stage, (box_head, mask_head) in enumerate(zip(model.roi.box_heads, model.roi.mask_heads, strict=True)):
        crops = model.roi.pool(levels, boxes, 7)
        stored.check(stage_entry(model, "roi_feat", stage), crops[back], TOLERANCE)
        logits, deltas = box_head(crops)
        stored.check(stage_entry(model, "roi_cls", stage), logits[back], TOLERANCE)
        stored.check(stage_entry(model, "roi_reg", stage), deltas.flatten(1)[back], TOLERANCE)
        masks = mask_head(model.roi.pool(levels, boxes, 14))
        stored.check(stage_entry(model, "roi_mask", stage), masks[back], TOLERANCE)
        refined = f"roi_refined/{stage}"
        if refined in stored.names():
            moved = torch.cat(model.roi.refine(stage, boxes, logits[:, :-1].argmax(1), deltas, SIZES))[back]
            expected = torch.from_numpy(raw(name)[refined])[:, 1:]
            torch.testing.assert_close(moved, expected, rtol=0, atol=BOX_TOLERANCE)


@pytest.fixture(scope="module")
def detections(case):
    name, _, model, _, _ = case
    with torch.no_grad():
        return model(golden_rcnn.images(name), SIZES)


@pytest.mark.parametrize("case", CASCADE_IS_SLOW, indirect=True, scope="module")
@torch.no_grad()
def test_detections_from_the_authors_proposals_are_the_authors(case):
    name, _, model, _, pyramid = case
    stored = raw(name)
    proposals = [torch.from_numpy(stored[f"proposals/{number}"])[:, :4] for number in range(2)]
    for number, found in enumerate(model.roi.predict(pyramid[:4], proposals, SIZES)):
        boxes, labels = (torch.from_numpy(stored[f"det_rescale0/{number}/{what}"]) for what in ("boxes", "labels"))
        distance = torch.cdist(found["boxes"], boxes[:, :4], p=float("inf"))
        nearest, match = distance.masked_fill(found["labels"][:, None] != labels, float("inf")).min(1)
        assert nearest.max() < HEAD_BOX_TOLERANCE
        assert match.unique().shape == labels.shape
        torch.testing.assert_close(found["scores"], boxes[match, 4], rtol=0, atol=5e-6)


@pytest.mark.parametrize("rescale", [0, 1])
def test_detections_are_the_authors(case, detections, rescale):
    name = case[0]
    stored = raw(name)
    for number, found in enumerate(detections):
        entry = f"det_rescale{rescale}/{number}"
        size = SIZES[number]
        original = tuple(stored[f"{entry}/mask_shape"].tolist())
        found = to_original(found, size, original)
        boxes = torch.from_numpy(stored[f"{entry}/boxes"])
        labels, areas = (torch.from_numpy(stored[f"{entry}/{what}"]) for what in ("labels", "mask_area"))
        assert len(found["boxes"]) == len(boxes)
        distance = torch.cdist(found["boxes"], boxes[:, :4], p=float("inf"))
        distance = distance.masked_fill(found["labels"][:, None] != labels, float("inf"))
        nearest, match = distance.min(1)
        assert nearest.max() < BOX_TOLERANCE * max(original[0] / size[0], 1)
        assert len(match.unique()) == len(boxes)
        torch.testing.assert_close(found["scores"], boxes[match, 4], rtol=0, atol=5e-5)
        # A pixel whose probability is 0.5 up to rounding may fall on either side; a mask has hundreds of pixels.
        pixels = found["masks"].flatten(1).sum(1)
        assert (pixels - areas[match]).abs().max() <= 4
        packed = stored[f"{entry}/masks_packed_first"]
        whole = packed.size * 8 // (original[0] * original[1])
        drawn = np.unpackbits(packed)[: whole * original[0] * original[1]].reshape(whole, *original)
        place = match.argsort()[:whole]
        assert (found["masks"][place].numpy() != drawn.astype(bool)).sum() <= 8


def move_the_flipped_location(module, inputs, offset):
    step = torch.zeros(offset.numel())
    step[FLIPPED_OFFSET] = FLIPPED_BY
    return offset + step.view_as(offset)


def losses_of(name, model):
    losses = model.train()(golden_rcnn.images(name), SIZES, golden_rcnn.targets(name))
    model.eval()
    return losses


def official_loss(ours):
    stage, _, what = ours.rpartition("_")
    if stage == "rpn":
        return {"class": "loss_rpn_cls", "box": "loss_rpn_bbox"}[what]
    what = {"class": "loss_cls", "box": "loss_bbox", "mask": "loss_mask"}[what]
    return f"s{stage.removeprefix('stage')}.{what}" if stage else what


@pytest.mark.parametrize("case", CASCADE_IS_SLOW, indirect=True, scope="module")
def test_losses_and_gradients_are_the_authors(case):
    name, stored, model, _, _ = case
    model.zero_grad()
    hook = None
    if name == "maskrcnn_t":
        hook = model.backbone.stages[3].blocks[3].dcn.offset.register_forward_hook(move_the_flipped_location)
    losses = losses_of(name, model)
    if hook is not None:
        hook.remove()
    expected = {entry for entry in stored.names() if entry.startswith("loss/") and "acc" not in entry}
    named = {official_loss(key): value for key, value in losses.items()}
    assert {f"loss/{key}" for key in named} == {e for e in expected if "levels" not in e and not e.endswith("total")}
    values = raw(name)
    for key, value in named.items():
        np.testing.assert_allclose(value.item(), values[f"loss/{key}"], rtol=TOLERANCE, err_msg=key)
    total = sum(losses.values())
    np.testing.assert_allclose(total.item(), values["loss/total"], rtol=TOLERANCE)

    total.backward()
    parameters = dict(model.named_parameters())
    norms, projections = {}, {}
    for key in values["grad_names"].tolist():
        ours = rcnn_official_to_ours(key, BACKBONES[name], num_stages=len(model.roi.stages))
        gradient = parameters.pop(ours).grad.double()
        norms[key] = gradient.norm().item()
        projections[key] = (gradient * golden.noise(f"proj/{key}", tuple(gradient.shape), torch.float64)).sum().item()
    assert not parameters
    found = np.array([norms[key] for key in values["grad_names"].tolist()])
    projected = np.array([projections[key] for key in values["grad_names"].tolist()])
    error = np.abs(found - values["grad_norm"]) / np.maximum(values["grad_norm"], 1e-3)
    error_projected = np.abs(projected - values["grad_proj"]) / np.maximum(values["grad_norm"], 1e-3)
    worst = [(values["grad_names"][i], error[i], error_projected[i]) for i in error_projected.argsort()[-5:]]
    assert error.max() < NORM_TOLERANCE, worst
    assert np.median(error_projected) < MEDIAN_PROJECTION, worst
    assert error_projected.max() < WORST_PROJECTION, worst
