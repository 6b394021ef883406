import warnings

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from tasks.segmentation import metrics
from tasks.segmentation.metrics import SegmentationMetric, class_table


def maps(num_images=5, num_classes=9, absent=(), seed=0):
    """Random predictions and truths of several sizes; a tenth of the truth is ignored, some classes are absent."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.tensor([number for number in range(num_classes) if number not in absent])
    found, truth = [], []
    for number in range(num_images):
        size = (7 + number, 11 + 2 * number)
        draw = [present[torch.randint(len(present), size, generator=generator)] for _ in range(2)]
        agree = torch.rand(size, generator=generator) < 0.5
        target = torch.where(agree, draw[0], draw[1])
        target[torch.rand(size, generator=generator) < 0.1] = 255
        found.append(draw[0])
        truth.append(target)
    return found, truth


def scores_of(found, truth, num_classes=9):
    metric = SegmentationMetric(num_classes)
    metric.update(found, truth)
    return metric.compute()


def areas(found, truth, num_classes):
    """Pixels of each class in the intersection, the prediction and the truth, counted class by class."""
    found, truth = (np.concatenate([one.numpy().ravel() for one in many]) for many in (found, truth))
    found, truth = found[truth != 255], truth[truth != 255]
    pairs = [(found == number, truth == number) for number in range(num_classes)]
    return np.array([(a & b).sum() for a, b in pairs]), *(np.array([p[i].sum() for p in pairs]) for i in (0, 1))


@pytest.mark.parametrize("absent", [(), (0, 4)])
def test_scores_are_the_shares_of_the_areas_over_all_images(absent):
    found, truth = maps(absent=absent)
    both, predicted, labelled = areas(found, truth, 9)
    scores = scores_of(found, truth)
    kept = [number for number in range(9) if number not in absent]
    iou, accuracy = both[kept] / (predicted + labelled - both)[kept], both[kept] / labelled[kept]
    np.testing.assert_allclose(scores["class_iou"][kept], iou)
    np.testing.assert_allclose(scores["class_accuracy"][kept], accuracy)
    assert scores["class_iou"].isnan().nonzero().flatten().tolist() == list(absent)
    np.testing.assert_allclose(
        [scores[key].item() for key in ("miou", "macc", "aacc")],
        [iou.mean(), accuracy.mean(), both.sum() / labelled.sum()],
    )


def test_miou_is_that_of_torchmetrics():
    found, truth = maps()
    reference = MulticlassJaccardIndex(9, ignore_index=255)
    reference.update(torch.cat([one.flatten() for one in found]), torch.cat([one.flatten() for one in truth]))
    # Theirs is float32.
    assert scores_of(found, truth)["miou"].item() == pytest.approx(reference.compute().item(), rel=1e-6)


def test_a_class_that_is_only_predicted_has_no_intersection_and_no_accuracy():
    scores = scores_of([torch.tensor([[0, 0, 1, 2]])], [torch.tensor([[0, 0, 1, 1]])], num_classes=4)
    np.testing.assert_equal(scores["class_iou"].numpy(), [1, 0.5, 0, np.nan])
    np.testing.assert_equal(scores["class_accuracy"].numpy(), [1, 0.5, np.nan, np.nan])
    assert [scores[key].item() for key in ("miou", "macc", "aacc")] == [0.5, 0.75, 0.75]


def test_ignored_pixels_do_not_count():
    truth = torch.tensor([[0, 1, 255, 255]])
    for ignored in ([0, 1], [2, 2]):
        scores = scores_of([torch.tensor([[0, 1, *ignored]])], [truth], num_classes=3)
        assert scores["miou"] == scores["macc"] == scores["aacc"] == 1
    assert scores["class_iou"].isnan().tolist() == [False, False, True]


def test_types_and_batches_do_not_matter():
    found, truth = torch.randint(9, (2, 3, 6, 7), generator=torch.Generator().manual_seed(0))
    expected = scores_of(list(found), list(truth))
    torch.testing.assert_close(scores_of(found.to(torch.uint8), truth.to(torch.int16)), expected, rtol=0, atol=0)


def test_processes_with_unequal_shares_add_up_to_one():
    found, truth = maps()
    other = SegmentationMetric(9)
    other.update(found[:1], truth[:1])
    shared = SegmentationMetric(
        9,
        dist_sync_fn=lambda counts, group: [counts, other.counts],
        distributed_available_fn=lambda: True,
    )
    shared.update(found[1:], truth[1:])
    torch.testing.assert_close(shared.compute(), scores_of(found, truth), rtol=0, atol=0)


def test_counts_go_past_what_float32_holds():
    metric = SegmentationMetric(2)
    metric.counts[0] += 2**24
    metric.update([torch.tensor([[0]])], [torch.tensor([[0]])])
    assert metric.counts[0] == 2**24 + 1


@pytest.mark.parametrize("unknown", [9, 254, -1])
def test_an_unknown_class_number_is_reported(unknown):
    truth = torch.zeros(2, 3, dtype=torch.int64)
    truth[0, 1] = unknown
    with pytest.raises(ValueError, match=r"1 pixels of the targets have a class number .* num_classes=9"):
        scores_of([torch.zeros_like(truth)], [truth])


def test_another_size_is_refused():
    with pytest.raises(ValueError, match=r"prediction 0 has shape \(2, 3\), expected that of its target \(3, 2\)"):
        scores_of([torch.zeros(2, 3)], [torch.zeros(3, 2)])
    with pytest.raises(ValueError, match="num_classes is 256, expected 1 to 255"):
        SegmentationMetric(256)


def test_the_table_has_a_line_for_each_class():
    scores = scores_of([torch.tensor([[0, 0, 1, 2]])], [torch.tensor([[0, 0, 1, 1]])], num_classes=4)
    assert class_table(scores, ["sky", "a road", "sea", "moon"]).splitlines() == [
        "class      IoU     acc",
        "sky     100.00  100.00",
        "a road   50.00   50.00",
        "sea       0.00       -",
        "moon         -       -",
    ]
    assert class_table(scores).splitlines()[1] == "0      100.00  100.00"


def test_images_of_several_processes_are_told(monkeypatch):
    def share(shares, own):
        shares[:] = [own, {"b", "c"}]

    monkeypatch.setattr(metrics.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(metrics.dist, "all_gather_object", share)
    with pytest.warns(UserWarning, match="1 images were evaluated by more than one process"):
        metrics._warn_of_repeats({"a", "b"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics._warn_of_repeats({"a"})


def test_outputs_beside_the_classes_of_the_data_are_wrong_but_not_in_the_means():
    found, truth = maps(num_classes=3)
    found[0][0, 0], truth[0][0, 0] = 7, 1
    found[0][0, 1], truth[0][0, 1] = 8, 2
    metric = SegmentationMetric(9)
    metric.num_used = 3
    metric.update(found, truth)
    scores = metric.compute()
    intersection, _, labelled = areas(found, truth, 3)
    # mmseg's histogram over three classes does not see a prediction of another one, nor its union.
    pairs = list(zip(found, truth, strict=True))
    predicted = np.array([sum(((one == k) & (other != 255)).sum().item() for one, other in pairs) for k in range(3)])
    expected = (intersection / (labelled + predicted - intersection)).mean()
    assert scores["miou"].item() == pytest.approx(expected, rel=1e-12)
    assert scores["class_iou"][3:].isnan().all()
    assert scores["aacc"].item() == pytest.approx(intersection.sum() / labelled.sum(), rel=1e-12)
