import copy
import math

import pytest
import torch

from internimage import internimage_debug
from internimage.init import materialise
from tasks.segmentation import mask2former_losses
from tasks.segmentation.mask2former import Mask2Former
from tasks.segmentation.mask2former_inference import instances, panoptic, semantic_scores
from tasks.segmentation.mask2former_layers import MaskPrediction, PositionCode
from tasks.segmentation.mask2former_losses import MaskLosses, masks_of_classes

NUM_CLASSES, NUM_QUERIES, SIZE = 3, 10, (64, 96)
# A logit whose probability is 1 in float32.
SURE = 40.0


def build(**options):
    options = {
        "num_queries": NUM_QUERIES,
        "dim": 32,
        "num_heads": 4,
        "encoder_hidden_dim": 48,
        "hidden_dim": 64,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "num_points": 100,
    } | options
    torch.manual_seed(1)
    return Mask2Former(internimage_debug(), NUM_CLASSES, **options)


def images():
    torch.manual_seed(0)
    return torch.randn(2, 3, *SIZE)


def label_map():
    """Classes 0 and 2 in the first image, 1 in the second, parts ignored."""
    label = torch.full((2, *SIZE), 255)
    label[0, :40, :50], label[0, 40:, 10:], label[1, 10:30] = 0, 2, 1
    return label


def empty():
    return {"labels": torch.empty(0, dtype=torch.long), "masks": torch.zeros(0, *SIZE, dtype=torch.bool)}


MAP = label_map()
OBJECTS = masks_of_classes(MAP)
STRIPES = (torch.arange(SIZE[1]) // 32).expand(2, *SIZE)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def total(losses):
    return sum(losses.values())


@pytest.mark.parametrize(
    "target",
    [MAP, OBJECTS, [OBJECTS[0], empty()], [empty(), empty()], torch.full_like(MAP, 255)],
    ids=["map", "objects", "one empty", "both empty", "all ignored"],
)
def test_every_parameter_is_trained_whatever_the_images_hold(target):
    model = build()
    losses = model(images(), target)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert len(losses) == 3 * (1 + 3)
    total(losses).backward()
    # DDP waits for a gradient of each.
    assert [name for name, grad in gradients(model).items() if grad is None or not grad.isfinite().all()] == []


def test_a_segmentor_learns_one_batch():
    model, image = build(), images()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        total(model(image, MAP)).backward()
        optimizer.step()
    known = MAP != 255
    with torch.no_grad():
        found = model.eval().scores(image).argmax(1)
    assert (found == MAP)[known].float().mean() > 0.95


def test_a_map_becomes_one_mask_for_each_class_present():
    first, second = masks_of_classes(MAP)
    assert first["labels"].tolist() == [0, 2]
    assert second["labels"].tolist() == [1]
    assert first["masks"].sum((1, 2)).tolist() == [40 * 50, 24 * 86]
    assert first["masks"][1].nonzero().amin(0).tolist() == [40, 10]
    (nothing,) = masks_of_classes(torch.full((1, *SIZE), 255, dtype=torch.uint8))
    assert nothing["masks"].shape == (0, *SIZE)


def test_objects_of_one_class_are_masks_of_their_own():
    """Each has a query of its own, whichever draws it; a mask over both costs more."""
    left, right = torch.zeros(2, *SIZE, dtype=torch.bool)
    left[:, :32], right[:, 64:] = True, True
    target = [{"labels": torch.tensor([1, 1]), "masks": torch.stack([left, right])}]
    masks = torch.full((1, 4, *SIZE), -SURE)
    masks[0, 3, left], masks[0, 1, right] = SURE, SURE
    classes = torch.full((1, 4, 4), 0.0)
    classes[0, [1, 3], 1], classes[0, [0, 2], 3] = SURE, SURE
    criterion = MaskLosses(NUM_CLASSES, num_points=500)
    torch.manual_seed(0)
    right_ones = criterion([MaskPrediction(classes, masks)], target)
    assert right_ones["layer0_class"].item() == pytest.approx(0, abs=1e-6)
    (pairs,) = criterion.match(MaskPrediction(classes, masks), target)
    assert dict(zip(pairs.query.tolist(), pairs.object.tolist(), strict=True)) == {3: 0, 1: 1}
    masks[0, 3, right] = SURE
    wrong_one = criterion([MaskPrediction(classes, masks)], target)
    # What the right masks cost is at their edges, where points lie between pixels.
    assert wrong_one["layer0_mask"] > 5 * right_ones["layer0_mask"]
    assert wrong_one["layer0_dice"] > 5 * right_ones["layer0_dice"]


def test_masks_are_counted_over_all_processes(monkeypatch):
    model, image = build().eval(), images()
    torch.manual_seed(0)
    alone = model(image, MAP)
    counted = []

    def twice_as_many_elsewhere(counts, device):
        counted.append(counts)
        return 2 * torch.tensor(counts, device=device)

    monkeypatch.setattr(mask2former_losses, "mean_counts", twice_as_many_elsewhere)
    torch.manual_seed(0)
    among_others = model(image, MAP)
    assert counted == [[3]]
    for name, loss in alone.items():
        share = 1.0 if name.endswith("class") else 0.5
        torch.testing.assert_close(among_others[name], loss * share, msg=name)


# Classes of the masks of each image, for each of two processes.
SHARES = [[[0, 1, 0]], [[], [1]]]


def losses_of(classes):
    """Compare queries with masks of the whole image, at the centre only: what processes draw must not matter."""
    prediction = MaskPrediction(
        torch.zeros(len(classes), 4, 3),
        torch.tensor([1.0, -2.0, 0.5, -1.0]).view(1, 4, 1, 1).expand(len(classes), -1, 4, 4),
    )
    targets = [{"labels": torch.tensor(one, dtype=torch.long), "masks": torch.ones(len(one), 8, 8)} for one in classes]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "rand", lambda *shape, device: torch.full(shape, 0.5, device=device))
        losses = MaskLosses(2, num_points=20)([prediction], targets)
    return losses["layer0_mask"], losses["layer0_dice"]


def rank_losses(rank, folder):
    """Rank 0 has an image of three masks, rank 1 one without any and one of one."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(losses_of(SHARES[rank]), folder / str(rank))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_uneven_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(rank_losses, (tmp_path,), nprocs=2)
    shares = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    # As DDP averages gradients.
    for *parts, alone in zip(*shares, losses_of(SHARES[0] + SHARES[1]), strict=True):
        torch.testing.assert_close(sum(parts) / 2, alone)


def test_more_masks_than_queries_are_matched_as_far_as_they_go():
    losses = build(num_queries=2)(images(), STRIPES)
    assert all(loss.isfinite() for loss in losses.values())


def test_matching_survives_a_diverged_model():
    broken = MaskPrediction(torch.full((2, 4, 4), math.nan), torch.full((2, 4, 16, 24), math.nan))
    pairs = MaskLosses(NUM_CLASSES, num_points=10).match(broken, OBJECTS)
    assert [len(pair.query) for pair in pairs] == [2, 1]


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "all of the model"])
def test_predictions_and_losses_are_float32_in_bfloat16(whole):
    model, image = build(), images()
    if whole:
        model, image = model.bfloat16(), image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        losses = model(image, MAP)
        with torch.no_grad():
            found, scores = model(image), model.scores(image)
    assert found.classes.dtype == found.masks.dtype == scores.dtype == torch.float32
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    total(losses).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_position_codes_are_exact_in_bfloat16():
    code, shape = PositionCode(16, normalize=True), torch.Size((1, 32, 3, 500))
    expected = code(shape, "cpu", torch.float32)
    found = code(shape, "cpu", torch.bfloat16)
    # Values up to 1 round by 2^-9.
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=2**-9)
    # Row 2 of 3 is at 2/3 of a turn: first sine of the first half of the channels.
    torch.testing.assert_close(expected[0, 0, 1], torch.full((500,), math.sin(4 * math.pi / 3)), rtol=0, atol=1e-5)


def test_the_network_reads_no_values():
    """Values on the meta device do not exist: a layer that looked at them would make the CPU wait for a GPU."""
    with torch.device("meta"):
        model = build()
        layers = model.layers(model.backbone(torch.empty(2, 3, *SIZE)))
    assert model.training
    assert [layer.masks.shape for layer in layers] == [(2, NUM_QUERIES, 16, 24)] * 4


def test_training_follows_inference_on_the_same_size():
    """transformers keeps position codes, which must not come from inference mode."""
    model, image = build(), images()
    with torch.inference_mode():
        model(image)
    total(model(image, MAP)).backward()
    assert all(gradient is not None for gradient in gradients(model).values())


def test_a_copy_is_a_model_of_its_own():
    model, image = build().eval(), images()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model.scores(image)
        for parameter in model.parameters():
            parameter.zero_()
        torch.testing.assert_close(twin.scores(image), expected, rtol=0, atol=0)


def test_compiling_the_backbone_changes_nothing():
    model, image = build().eval(), images()
    with torch.no_grad():
        expected = model.scores(image)
        model.backbone.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model.scores(image), expected, rtol=1e-5, atol=1e-5)


def test_a_segmentor_can_be_made_from_the_meta_device():
    with torch.device("meta"):
        model = build()
    materialise(model)
    reference = build()
    for name, parameter in model.named_parameters():
        expected = reference.get_parameter(name)
        if name.startswith("backbone."):
            continue
        assert parameter.isfinite().all(), name
        assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.35, abs=1e-6), name
    total(model(images(), MAP)).backward()


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"strides \(8, 16, 32\), expected \(4, 8, 16, 32\)"):
        Mask2Former(internimage_debug(out_indices=(1, 2, 3)), NUM_CLASSES)
    with pytest.raises(ValueError, match="dim=48, expected a multiple of num_heads=4 and of 32"):
        build(dim=48)
    model, image = build(), images()
    with pytest.raises(ValueError, match=r"targets have \[\(32, 96\), \(32, 96\)\] pixels"):
        model(image, MAP[:, :32])
    with pytest.raises(ValueError, match=r"targets have \[\(64, 96\)\] pixels"):
        model(image, OBJECTS[:1])
    with pytest.raises(ValueError, match=r"labels are \[0, 3\], expected 0 to 2"):
        model(image, MAP.where(MAP != 2, 3))
    with pytest.raises(ValueError, match=r"labels have shape \(1,\) and masks \(2, 64, 96\)"):
        model(image, [OBJECTS[0] | {"labels": torch.tensor([0])}, OBJECTS[1]])


def test_scores_sum_the_masks_of_a_class():
    torch.manual_seed(0)
    prediction = MaskPrediction(torch.randn(2, 5, 4), torch.randn(2, 5, 3, 4))
    found = semantic_scores(prediction, (3, 4))
    assert found.shape == (2, 3, 3, 4)
    classes, masks = prediction.classes[1].softmax(-1), prediction.masks[1].sigmoid()
    expected = sum(classes[query, 2] * masks[query, 1, 3] for query in range(5))
    assert found[1, 2, 1, 3].item() == pytest.approx(expected.item(), abs=1e-6)


def drawn(*queries, num_classes=3, size=(4, 8)):
    """One image: queries as (class or None, its probability, columns, probability inside them)."""
    classes, masks = torch.zeros(1, len(queries), num_classes + 1), torch.full((1, len(queries), *size), -SURE)
    for number, (label, probability, columns, inside) in enumerate(queries):
        rest = math.log((1 - probability) / num_classes)
        classes[0, number] = rest
        classes[0, number, num_classes if label is None else label] = math.log(probability)
        masks[0, number, :, columns] = torch.tensor(inside).logit()
    return MaskPrediction(classes, masks)


def test_instances_are_ranked_by_class_and_mask():
    prediction = drawn((1, 0.9, slice(0, 4), 0.6), (2, 0.7, slice(4, 8), 0.99), (None, 0.97, slice(0, 8), 0.9))
    (found,) = instances(prediction, (4, 8), limit=2)
    assert found["labels"].tolist() == [2, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([0.7 * 0.99, 0.9 * 0.6]), rtol=1e-4, atol=0)
    assert found["masks"].dtype == torch.bool
    assert found["masks"].any(1).long().tolist() == [[0] * 4 + [1] * 4, [1] * 4 + [0] * 4]
    assert found["boxes"].tolist() == [[4, 0, 8, 4], [0, 0, 4, 4]]
    (things,) = instances(prediction, (8, 16), limit=2, things=[1])
    assert things["labels"].tolist() == [1]
    assert things["masks"].shape == (1, 8, 16)
    (everything,) = instances(prediction, (4, 8))
    assert len(everything["scores"]) == 3 * 3
    (nothing,) = instances(drawn((1, 0.9, slice(0, 0), 0.9)), (4, 8), limit=1)
    assert nothing["scores"].tolist() == [0]
    assert nothing["boxes"].tolist() == [[0] * 4]


def test_each_pixel_gets_one_segment():
    prediction = drawn(
        (0, 0.95, slice(0, 2), 0.9),
        (0, 0.95, slice(2, 4), 0.9),
        # Stuff in two places is one segment.
        (2, 0.9, slice(4, 5), 0.9),
        (2, 0.85, slice(5, 6), 0.9),
        # Not sure enough; no object; mostly covered by others, so that nothing is left of it.
        (1, 0.7, slice(6, 7), 0.9),
        (None, 0.99, slice(6, 8), 0.9),
        (1, 0.9, slice(3, 5), 0.7),
    )
    (found,) = panoptic(prediction, (4, 8), things=[0, 1])
    assert found.segments.tolist() == [[1, 1, 2, 2, 3, 3, 0, 0]] * 4
    assert found.labels == [0, 0, 2]
    assert found.scores == pytest.approx([0.95, 0.95, 0.9])


def test_a_mask_that_others_cover_for_the_most_part_gets_no_segment():
    half_hidden = drawn((0, 0.99, slice(0, 4), 0.9), (1, 0.9, slice(2, 8), 0.9))
    (strict,) = panoptic(half_hidden, (4, 8), things=[0, 1])
    assert strict.segments[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    (lax,) = panoptic(half_hidden, (4, 8), things=[0, 1], overlap_threshold=0.6)
    assert lax.segments[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]


def test_nothing_found_is_no_segment():
    (found,) = panoptic(drawn((None, 0.9, slice(0, 8), 0.9)), (4, 8), things=[0])
    assert not found.segments.any()
    assert found.labels == found.scores == []
