import pytest
import torch
from jsonargparse import ArgumentParser
from torchvision.ops import box_convert, box_iou

from internimage import internimage_debug
from tasks.detection import MaskRCNN
from tasks.detection.boxes import best_after_nms
from tasks.detection.postprocess import to_original
from tasks.detection.tta import MergeViews, detect, merge_views, select, unflip

METHODS = ["nms", "wbf"]


def make(boxes, scores, labels, masks=None):
    found = {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}
    return found if masks is None else found | {"masks": masks}


def scattered(num, seed=0, masks=True, height=90, width=120):
    """Detections of three classes, best first, as a two-stage detector leaves them."""
    generator = torch.Generator().manual_seed(seed)
    size = 8 + 40 * torch.rand(num, 2, generator=generator)
    corner = torch.rand(num, 2, generator=generator) * (torch.tensor([width, height]) - size)
    scores = torch.rand(num, generator=generator).sort(descending=True).values
    found = {"boxes": torch.cat([corner, corner + size], 1), "scores": scores}
    found["labels"] = torch.randint(3, (num,), generator=generator)
    if masks:
        found["masks"] = torch.rand(num, 28, 28, generator=generator)
    return select(found, best_after_nms(found["boxes"], scores, found["labels"], threshold=0.5, limit=num))


def mirrored(found, width):
    """The same objects in the flipped image, computed from centres and sizes."""
    centres = box_convert(found["boxes"], "xyxy", "cxcywh")
    centres[:, 0] = width - centres[:, 0]
    return found | {
        "boxes": box_convert(centres, "cxcywh", "xyxy"),
        "masks": found["masks"][:, :, torch.arange(27, -1, -1)],
    }


def scaled(found, by):
    return found | {"boxes": found["boxes"] * by}


def fake_detector(by_width):
    """Return what is known of the view that is as wide as the image."""

    def detector(image, sizes):
        assert len(image) == len(sizes)
        return by_width[image.shape[-1]]

    return detector


def batch_of(*views, originals):
    """Images without content; each view is (padded width, size of each image, flipped)."""
    made = [
        {"image": torch.zeros(len(valid), 3, 256, width), "valid": valid, "flipped": flipped}
        for width, valid, flipped in views
    ]
    first = {"image": made[0]["image"], "valid": made[0]["valid"], "original_size": originals}
    rest = {"image_id": list(range(len(originals))), "path": [""] * len(originals)}
    return first | rest | ({"views": made[1:]} if made[1:] else {})


def assert_same(one, other, atol=0.0):
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=atol)


def test_one_view_is_what_the_detector_says_on_the_original_image():
    found = [scattered(9), scattered(5, seed=1, height=70, width=64)]
    batch = batch_of((128, [(90, 120), (70, 64)], False), originals=[(180, 241), (35, 31)])
    got = detect(fake_detector({128: found}), batch, MergeViews(limit=1))
    for one, result, size, original in zip(found, got, batch["valid"], batch["original_size"], strict=True):
        assert_same(result, to_original(one, size, original))


@pytest.mark.parametrize("method", METHODS)
def test_a_mirrored_view_alone_gives_the_plain_result(method):
    found = scattered(12)
    batch = batch_of((160, [(180, 150)], False), (128, [(90, 120)], True), originals=[(180, 240)])
    nothing = select(found, slice(0))
    got = detect(
        fake_detector({160: [nothing], 128: [mirrored(found, 120)]}), batch, MergeViews(method=method, iou=0.5)
    )[0]
    expected = to_original(found, (90, 120), (180, 240))
    if method == "wbf":  # found in one of two views
        expected["scores"] = expected["scores"] / 2
    # Rounding of centres and halves at 240 px.
    torch.testing.assert_close(got["boxes"], expected["boxes"], rtol=0, atol=1e-4)
    torch.testing.assert_close(got["scores"], expected["scores"])
    assert got["labels"].equal(expected["labels"])
    # A probability at the threshold may fall on either side.
    assert (got["masks"] != expected["masks"]).float().mean() < 1e-3
    assert got["masks"].any(2).any(1).all()


@pytest.mark.parametrize("method", METHODS)
def test_views_that_agree_change_nothing(method):
    found = [scattered(12), scattered(7, seed=3)]
    valid = [(90, 120)] * 2
    batch = batch_of(
        (128, valid, False),
        (256, [(180, 240)] * 2, False),
        (160, valid, True),
        originals=[(90, 120), (45, 60)],
    )
    known = {
        128: found,
        256: [scaled(one, 2) for one in found],
        160: [mirrored(one, 120) for one in found],
    }
    got = detect(fake_detector(known), batch, MergeViews(method=method, iou=0.5))
    for one, result, original in zip(found, got, batch["original_size"], strict=True):
        expected = to_original(one, (90, 120), original)
        # Rounding of the mirrored boxes and of the weighted mean at 120 px.
        torch.testing.assert_close(result["boxes"], expected["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(result["scores"], expected["scores"])
        assert result["labels"].equal(expected["labels"])
        assert (result["masks"] != expected["masks"]).float().mean() < 1e-3  # a probability at the threshold


def test_a_detector_that_sees_the_same_image_twice_finds_what_it_found_once():
    torch.manual_seed(0)
    detector = MaskRCNN(internimage_debug(), 3, score=0.0, limit=20).eval()
    batch = batch_of((128, [(90, 120)], False), originals=[(180, 240)]) | {"image": torch.randn(1, 3, 96, 128)}
    again = {"image": batch["image"], "valid": batch["valid"], "flipped": False}
    with torch.inference_mode():
        once = detect(detector, batch, MergeViews())
        twice = detect(detector, batch | {"views": [again]}, MergeViews(iou=detector.roi.nms, limit=20))
    assert len(once[0]["boxes"]) == 20
    assert_same(once[0], twice[0])


def test_suppression_keeps_the_best_box_with_its_score_and_mask():
    weak = make([[0.0, 0, 10, 10], [50, 0, 60, 10]], [0.6, 0.5], [1, 2], torch.full((2, 2, 2), 0.25))
    strong = make([[0.0, 0, 10, 9], [0, 0, 10, 10]], [0.9, 0.3], [1, 0], torch.full((2, 2, 2), 0.75))
    merged = merge_views([weak, strong], MergeViews(method="nms", iou=0.5))
    expected = make([[0.0, 0, 10, 9], [50, 0, 60, 10], [0, 0, 10, 10]], [0.9, 0.5, 0.3], [1, 2, 0])
    assert_same(merged, expected | {"masks": torch.tensor([0.75, 0.25, 0.75]).view(3, 1, 1).expand(3, 2, 2)})
    assert_same(
        merge_views([weak, strong], MergeViews(iou=0.5, limit=2)), select(merged, torch.tensor([True, True, False]))
    )


def test_fusion_averages_boxes_and_masks_by_score_and_scores_by_views():
    one = make([[0.0, 0, 10, 10], [50, 0, 60, 10]], [0.8, 0.9], [1, 2], torch.tensor([0.0, 0.5]).view(2, 1, 1))
    other = make([[2.0, 0, 12, 10], [0, 0, 10, 10]], [0.4, 0.3], [1, 0], torch.tensor([0.9, 0.5]).view(2, 1, 1))
    merged = merge_views([one, other, select(other, slice(0))], MergeViews(method="wbf", iou=0.5))
    expected = make(
        [[0.8 * 0 + 0.4 * 2, 0, 0.8 * 10 + 0.4 * 12, 10 * 1.2], [50, 0, 60, 10], [0, 0, 10, 10]],
        [0.6 * 2 / 3, 0.9 / 3, 0.3 / 3],
        [1, 2, 0],
        torch.tensor([0.4 * 0.9 / 1.2, 0.5, 0.5]).view(3, 1, 1),
    )
    expected["boxes"][0] /= 1.2
    assert_same(merged, expected, atol=1e-5)  # rounding at 60 px


def test_fusion_never_gains_from_two_boxes_of_one_view():
    twice = make([[0.0, 0, 10, 10], [0, 0, 10, 10]], [0.8, 0.6], [0, 0])
    merged = merge_views([twice], MergeViews(method="wbf", iou=0.5))
    assert_same(merged, make([[0.0, 0, 10, 10]], [0.7], [0]), atol=1e-6)


def fuse_slowly(found, iou, num_views):
    """Weighted box fusion as the paper tells it: lists of members, the fused box recomputed from all of them."""
    members = []
    for box, score, label in sorted(
        zip(found["boxes"].double(), found["scores"].double(), found["labels"].tolist(), strict=True),
        key=lambda row: -row[1],
    ):
        best, nearest = None, iou
        for group in members:
            fused = sum(s * b for b, s, _ in group) / sum(s for _, s, _ in group)
            near = box_iou(box[None], fused[None]).item()
            if group[0][2] == label and near > nearest:
                best, nearest = group, near
        if best is None:
            members.append([(box, score, label)])
        else:
            best.append((box, score, label))
    rows = [
        (
            (sum(s for _, s, _ in group) / len(group) * min(len(group), num_views) / num_views).item(),
            (sum(s * b for b, s, _ in group) / sum(s for _, s, _ in group)).tolist(),
            group[0][2],
        )
        for group in members
    ]
    scores, boxes, labels = zip(*sorted(rows, reverse=True), strict=True)
    return make(list(boxes), list(scores), list(labels))


def test_fusion_agrees_with_the_published_algorithm_in_float64():
    views = [scattered(40, masks=False)]
    for seed in (1, 2, 3):
        noise = torch.randn(len(views[0]["boxes"]), 4, generator=torch.Generator().manual_seed(seed))
        scores = (views[0]["scores"] + 0.02 * noise[:, 0]).clamp(0.01, 1)
        views.append(views[0] | {"boxes": views[0]["boxes"] + noise, "scores": scores})
    views.append(scattered(20, seed=9, masks=False))
    merged = merge_views(views, MergeViews(method="wbf", iou=0.55, limit=1000))
    every = {key: torch.cat([view[key] for view in views]) for key in views[0]}
    expected = fuse_slowly(every, 0.55, len(views))
    assert len(every["boxes"]) > len(merged["boxes"]) > len(views[0]["boxes"])
    assert_same(merged, expected, atol=1e-4)  # rounding at 120 px, a few sums


@pytest.mark.parametrize("method", METHODS)
def test_nothing_found_stays_nothing(method):
    nothing = select(scattered(3), slice(0))
    merged = merge_views([nothing, nothing], MergeViews(method=method))
    assert {key: tuple(value.shape) for key, value in merged.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
        "masks": (0, 28, 28),
    }


@pytest.mark.parametrize("method", METHODS)
def test_boxes_without_extent_and_without_score_give_finite_results(method):
    flat = make([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 9, 9]], [0.5, 0.4, 0.0], [0, 0, 0])
    merged = merge_views([flat, flat], MergeViews(method=method))
    assert all(merged[key].isfinite().all() for key in ("boxes", "scores"))
    assert merged["boxes"][0].tolist() == [5, 5, 5, 5]


def test_flipping_back_moves_boxes_and_masks():
    image = torch.zeros(1, 4, 6, dtype=torch.bool)
    image[0, 1:3, 0:2] = True
    back = unflip(make([[0.0, 1, 2, 3]], [1.0], [0], image), 6)
    assert back["boxes"].tolist() == [[4, 1, 6, 3]]
    assert back["masks"][0].nonzero().tolist() == [[1, 4], [1, 5], [2, 4], [2, 5]]


def test_settings_are_read_from_yaml_types():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--merge", type=MergeViews | None)
    words = ["--merge.method=wbf", "--merge.iou=0.6", "--merge.limit=300"]
    merge = parser.instantiate(parser.parse_args(words)).merge
    assert merge == MergeViews(method="wbf", iou=0.6, limit=300)


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"method": "mean"}, "expected 'nms' or 'wbf'"), ({"iou": 0.0}, "above 0"), ({"limit": 0}, "at least 1")],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        MergeViews(**setting)
