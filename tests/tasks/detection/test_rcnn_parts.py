import math
import warnings

import pytest
import torch
from torchvision.ops import box_iou

from tasks.detection.anchors import Anchors
from tasks.detection.boxes import DeltaCoder, best_after_nms, rescale_boxes
from tasks.detection.matching import IGNORED, NEGATIVE, MaxIoUMatcher, RandomSampler
from tasks.detection.postprocess import paste_masks
from tasks.detection.roi_heads import crop_masks
from tasks.layers import FPN, SyncBatchNorm


def random_boxes(num, seed=0, extent=100.0):
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(2, num, 2, generator=generator) * extent / 2
    return torch.cat([corner, corner + size + 1], 1)


def test_decoding_is_the_inverse_of_encoding():
    reference, boxes = random_boxes(50), random_boxes(50, seed=1)
    coder = DeltaCoder((0.1, 0.1, 0.2, 0.2))
    # Rounding of the logarithm and the exponential at 100 px.
    torch.testing.assert_close(coder.decode(reference, coder.encode(reference, boxes)), boxes, rtol=0, atol=1e-4)


def test_a_box_grows_and_shrinks_by_at_most_a_thousand_sixteenths():
    reference = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    boxes = [DeltaCoder().decode(reference, torch.tensor([[0, 0, d, 0.0]]))[0] for d in (50.0, -50.0)]
    assert [(box[2] - box[0]).item() for box in boxes] == pytest.approx([1000, 16 * 16 / 1000], rel=1e-5)


def test_one_reference_serves_every_class():
    reference, deltas = random_boxes(4), torch.randn(4, 3, 4)
    together = DeltaCoder().decode(reference.unsqueeze(1), deltas)
    apart = torch.stack([DeltaCoder().decode(reference, deltas[:, k]) for k in range(3)], 1)
    assert together.equal(apart)


def test_suppression_keeps_groups_apart():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60]])
    scores, groups = torch.tensor([0.5, 0.9, 0.4, 0.1]), torch.tensor([0, 0, 1, 1])
    assert best_after_nms(boxes, scores, groups, threshold=0.5, limit=9).tolist() == [1, 2, 3]
    assert best_after_nms(boxes, scores, groups, threshold=0.5, limit=2).tolist() == [1, 2]


def test_boxes_are_rescaled_along_each_axis():
    assert rescale_boxes(torch.tensor([[1.0, 2, 3, 4]]), (10, 20), (20, 60)).tolist() == [[3, 4, 9, 8]]


def test_anchors_are_centred_on_the_corners_of_pixels_and_keep_their_area():
    levels = Anchors((4, 8))([(3, 5), (2, 3)], torch.device("cpu"))
    assert [len(level) for level in levels] == [3 * 5 * 3, 2 * 3 * 3]
    for level, stride, width in zip(levels, (4, 8), (5, 3), strict=True):
        size = level[:, 2:] - level[:, :2]
        torch.testing.assert_close(size.prod(1), torch.full((len(level),), float(8 * stride) ** 2))
        torch.testing.assert_close(size[:3, 1] / size[:3, 0], torch.tensor([0.5, 1, 2]))
        centre = (level[:, 2:] + level[:, :2]) / 2
        number = 3 * (1 * width + 2)  # row 1, column 2
        torch.testing.assert_close(centre[number : number + 3], torch.tensor([[2.0, 1.0]]).expand(3, 2) * stride)


def test_anchors_in_the_padding_of_the_batch_do_not_train():
    # 33 x 20 px is padded to 64 x 32 on its own, and to 96 x 64 in the batch.
    used = Anchors((4, 64)).used([(24, 16), (2, 1)], (33, 20), torch.device("cpu"))
    pixels = used[0].view(24, 16, 3)
    assert pixels[:16, :8].all()
    assert pixels.sum() == 16 * 8 * 3
    assert used[1].view(2, 1, 3)[:, 0, 0].tolist() == [True, False]


def by_loops(truth, boxes, positive, negative, low_quality):
    """The matching rule as it is said, one box at a time."""
    overlap = box_iou(truth, boxes)
    match = []
    for column in overlap.T:
        best = column.max()
        match.append(int(column.argmax()) if best >= positive else NEGATIVE if best < negative else IGNORED)
    if low_quality is not None:
        for number, row in enumerate(overlap):
            if row.max() >= low_quality:
                for box in torch.where(row == row.max())[0].tolist():
                    match[box] = number
    return match


@pytest.mark.parametrize("rule", [(0.7, 0.3, 0.3), (0.5, 0.5, 0.5), (0.6, 0.6, None)])
@pytest.mark.parametrize("seed", range(3))
def test_matching_follows_its_rule(rule, seed):
    truth, boxes = random_boxes(7, seed=seed), random_boxes(200, seed=seed + 10)
    # The same box twice in the ground truth, and among the boxes: the later one has it.
    truth, boxes = torch.cat([truth, truth[:1]]), torch.cat([boxes, truth[:3], truth[:3]])
    found = MaxIoUMatcher(rule[0], rule[1], low_quality=rule[2])(truth, boxes)
    assert found.tolist() == by_loops(truth, boxes, *rule)


def test_matching_without_boxes():
    matcher, none, some = MaxIoUMatcher(0.5, 0.5, low_quality=0.5), torch.zeros(0, 4), random_boxes(3)
    assert matcher(none, some).tolist() == [NEGATIVE] * 3
    assert matcher(some, none).shape == (0,)


def test_background_fills_what_matched_boxes_leave():
    match = torch.full((1000,), NEGATIVE)
    match[300:400] = IGNORED
    for num_matched, expected in ((300, 128), (20, 20)):
        match[:300] = NEGATIVE
        match[:num_matched] = 2
        positive, negative = RandomSampler(512, 0.25)(match)
        assert (len(positive), len(negative)) == (expected, 512 - expected)
        assert (match[positive] == 2).all()
        assert (match[negative] == NEGATIVE).all()
        assert len(torch.cat([positive, negative]).unique()) == 512


def test_a_mask_of_ones_is_drawn_as_its_box():
    boxes = torch.tensor([[2.0, 3.0, 9.0, 7.0], [-5.0, -5.0, 4.0, 4.0], [5.0, 5.0, 5.0, 5.0], [20.0, 20.0, 30.0, 30.0]])
    drawn = paste_masks(torch.ones(4, 28, 28), boxes, (10, 12))
    assert drawn.shape == (4, 10, 12)
    assert drawn[0].nonzero().aminmax(dim=0).min.tolist() == [3, 2]
    assert drawn[0].sum() == 7 * 4
    assert drawn[1].sum() == 4 * 4
    assert drawn[1, :4, :4].all()
    assert drawn[3].sum() == 0
    assert paste_masks(torch.ones(0, 28, 28), torch.zeros(0, 4), (10, 12)).shape == (0, 10, 12)


def test_a_cropped_mask_is_drawn_back():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = ((x - 30) ** 2 + (y - 33) ** 2 < 20**2).to(torch.uint8)
    box = torch.tensor([[8.0, 12.0, 52.0, 56.0]])
    crops = crop_masks(torch.stack([torch.zeros_like(disc), disc]), torch.tensor([1]), box, 28)
    drawn = paste_masks(crops.float(), box, (64, 64))[0]
    # Cells of 1.6 px: only pixels on the rim, 2 pi 20 of them, may change.
    assert (drawn != disc.bool()).sum() < math.pi * 20


def test_the_pyramid_fits_features_of_odd_sizes():
    sizes = [(9, 13), (5, 7), (3, 4)]
    features = [torch.randn(2, width, *size) for width, size in zip((4, 6, 8), sizes, strict=True)]
    levels = FPN((4, 6, 8), 16)(features)
    assert [tuple(level.shape) for level in levels] == [(2, 16, *size) for size in [*sizes, (2, 2)]]
    assert levels[3].equal(levels[2][:, :, ::2, ::2])


def test_batch_norm_that_cannot_be_synchronised_says_so_and_works():
    ours, plain, x = SyncBatchNorm(3), torch.nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    with pytest.warns(UserWarning, match="SyncBatchNorm: 1 process on cpu"):
        assert ours(x).equal(plain(x))
    assert ours.running_var.equal(plain.running_var)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.eval()(x).equal(plain.eval()(x))
