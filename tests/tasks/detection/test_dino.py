from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from internimage import internimage_debug
from internimage.init import materialise
from tasks.attention import FFN, ChunkedFFN
from tasks.detection import dino_denoising
from tasks.detection.dino import DINO
from tasks.detection.dino_denoising import Denoising
from tasks.detection.dino_layers import inverse_sigmoid
from tasks.detection.dino_losses import Truth, match, pair_costs
from tasks.detection.dino_transformer import Prediction

SIZES = [(64, 96), (50, 96)]
NUM_QUERIES = 20
NO_NOISE = {"label_noise": 0.0, "box_noise": 0.0}


def build(**options):
    options = {
        "num_queries": NUM_QUERIES,
        "denoising_queries": 6,
        "dim": 32,
        "hidden_dim": 64,
        "num_layers": 2,
    } | options
    torch.manual_seed(1)
    return DINO(internimage_debug(out_indices=(1, 2, 3)), 3, **options)


def images(sizes=SIZES):
    torch.manual_seed(0)
    image = torch.randn(len(sizes), 3, 64, 96)
    for one, (height, width) in zip(image, sizes, strict=True):
        one[:, height:] = 0
        one[:, :, width:] = 0
    return image


def target(*boxes):
    """Ground truth of one image: boxes of class 1."""
    labels = torch.ones(len(boxes), dtype=torch.long)
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": labels}


TARGETS = [target((8, 8, 40, 40)), target((30, 5, 80, 45), (2, 20, 20, 44))]


def truth(*boxes, labels=None):
    boxes = torch.tensor(boxes).float().reshape(-1, 4)
    labels = torch.arange(len(boxes)) if labels is None else torch.tensor(labels, dtype=torch.long)
    return Truth(boxes, labels, torch.tensor([96.0, 64.0, 96.0, 64.0]))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("targets", [TARGETS, [TARGETS[1], target()], [target(), target()]])
def test_every_parameter_is_trained_whatever_the_images_hold(targets):
    model = build()
    losses = model(images(), SIZES, targets)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert len(losses) == 3 * (1 + 2 * 2)
    sum(losses.values()).backward()
    # DDP waits for a gradient of each.
    assert [name for name, grad in gradients(model).items() if grad is None or not grad.isfinite().all()] == []


def test_detections_lie_in_their_image_and_respect_the_limit():
    model = build(limit=7).eval()
    with torch.no_grad():
        found = model(images(), SIZES)
    for detections, (height, width) in zip(found, SIZES, strict=True):
        boxes = detections["boxes"]
        assert boxes.shape == (7, 4)
        assert detections["scores"].equal(detections["scores"].sort(descending=True).values)
        assert 0 <= detections["labels"].min() <= detections["labels"].max() < 3
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width
        assert boxes[:, 3].max() <= height


def test_a_detector_learns_one_image():
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    totals = []
    for _ in range(30):
        optimizer.zero_grad()
        total = sum(model(images(), SIZES, TARGETS).values())
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.6 * totals[0]


def test_too_few_positions_are_named():
    with pytest.raises(ValueError, match="128 positions, expected at least num_queries=200"):
        build(num_queries=200)(images(), SIZES)


def test_queries_do_not_see_the_denoising_queries():
    """Training adds queries; the others must come out as in inference, and each group as if it were alone."""
    model = build(**NO_NOISE)
    transformer = model.transformer
    whole = [Truth.from_target(one, size) for one, size in zip(TARGETS, SIZES, strict=True)]
    with torch.no_grad():
        memory = transformer.encode(model.neck(model.backbone(images())), SIZES, (64, 96))
        boxes = transformer.propose(memory).prediction.boxes
        alone, _ = transformer.decode(memory, transformer.content(memory), boxes)
        noised = model.denoising(whole, NUM_QUERIES)
        content = torch.cat([noised.content, transformer.content(memory)], 1)
        together, _ = transformer.decode(memory, content, torch.cat([noised.boxes.sigmoid(), boxes], 1), noised.hidden)
    num_denoising = noised.content.shape[1]
    assert num_denoising == 2 * 2 * 3
    for before, after in zip(alone, together, strict=True):
        # Sums over another number of keys round differently.
        torch.testing.assert_close(after.logits[:, num_denoising:], before.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after.boxes[:, num_denoising:], before.boxes, rtol=1e-5, atol=1e-5)
        # Without noise all groups start alike.
        groups = after.boxes[:, :num_denoising].unflatten(1, (3, -1))
        torch.testing.assert_close(groups[:, 0], groups[:, 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("counts", "groups"), [((1, 2), 5), ((3, 0), 3), ((10, 1), 1), ((20, 4), 1), ((0, 0), 1)])
def test_denoising_groups_follow_the_number_of_objects(counts, groups):
    objects = [truth(*[(0.5, 0.5, 0.2, 0.2)] * count, labels=[0] * count) for count in counts]
    queries = Denoising(3, 8, num_queries=10)(objects, 4)
    width = 2 * groups * max(counts)
    assert queries.num_groups == groups
    assert queries.content.shape == (2, width, 8)
    assert queries.hidden.shape == (width + 4, width + 4)
    assert not queries.hidden[:, width:].any()


def test_noise_is_as_large_as_told(monkeypatch):
    drawn = []
    monkeypatch.setattr(dino_denoising, "uniform", lambda like: drawn.append(torch.rand(like.shape)) or drawn[-1])
    torch.manual_seed(0)
    objects = [truth(*[(0.5, 0.5, 0.2, 0.1)] * 50, labels=[2] * 50)]
    queries = Denoising(3, 8, num_queries=500, box_noise=0.5)(objects, 4)
    boxes = queries.boxes.sigmoid().view(10, 2, 50, 4)
    left = boxes[..., 0] - boxes[..., 2] / 2
    moved = (left - 0.4).abs() / 0.1 / 0.5
    # Of the objects to restore by up to 1, of those to reject by 1 to 2 times the noise.
    assert 0.9 < moved[:, 0].max() <= 1 + 1e-3
    assert 1 - 1e-3 <= moved[:, 1].min() < 1.1
    assert 1.9 < moved[:, 1].max() <= 2 + 1e-3
    # A quarter is drawn anew, a third of which falls on the old label.
    assert (drawn[0] < 0.25).float().mean() == pytest.approx(0.25, abs=0.05)


def test_matching_is_the_cheapest_assignment():
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 5, 3), torch.rand(2, 5, 4)
    objects = [truth((0.3, 0.4, 0.2, 0.2), (0.6, 0.5, 0.3, 0.4), (0.5, 0.5, 0.9, 0.9)), truth((0.1, 0.2, 0.1, 0.1))]
    pairs = match([Prediction(logits, boxes)], objects)
    assert len(pairs) == 1
    for image, (pair, one) in enumerate(zip(pairs[0], objects, strict=True)):
        cost = pair_costs(Prediction(logits[image], boxes[image]), one)
        columns = torch.arange(len(one.labels))
        cheapest = min(float(cost[list(rows), columns].sum()) for rows in permutations(range(5), len(columns)))
        assert float(cost[pair.query, pair.object].sum()) == pytest.approx(cheapest, abs=1e-6)


def test_costs_of_a_diverged_model_are_finite():
    cost = pair_costs(Prediction(torch.full((2, 3), torch.nan), torch.full((2, 4), torch.nan)), truth((0.5, 0.5, 1, 1)))
    assert cost.isfinite().all()


def test_more_objects_than_queries_are_matched_as_far_as_they_go():
    model = build(num_queries=2)
    losses = model(images(), SIZES, [target(*[(8, 8, 40, 40)] * 5), target()])
    assert all(loss.isfinite() for loss in losses.values())


def test_a_chunked_feed_forward_network_is_the_whole_one():
    torch.manual_seed(0)
    whole, chunked = FFN(8, 12).double(), ChunkedFFN(8, 12, 4).double()
    state = {"bias": whole.fc2.bias.detach()}
    for number in range(4):
        rows = slice(3 * number, 3 * number + 3)
        state[f"fc1.{number}.weight"], state[f"fc1.{number}.bias"] = whole.fc1.weight[rows], whole.fc1.bias[rows]
        state[f"fc2.{number}.weight"] = whole.fc2.weight[:, rows]
    chunked.load_state_dict(state)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    # Float64 rounding of sums of 12 terms.
    torch.testing.assert_close(chunked(x), whole(x), rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad(module(x).square().sum(), x)[0] for module in (whole, chunked))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(chunked(x), whole(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="num_chunks=5 does not divide hidden_dim=12"):
        ChunkedFFN(8, 12, 5)


def test_activation_checkpointing_changes_nothing():
    plain, saving = build(**NO_NOISE), build(**NO_NOISE, activation_checkpointing=True)
    for model in (plain, saving):
        sum(model(images(), SIZES, TARGETS).values()).backward()
    expected = gradients(plain)
    for name, gradient in gradients(saving).items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "all of the model"])
def test_boxes_and_losses_are_float32_in_bfloat16(whole):
    model, image = build(), images()
    if whole:
        model, image = model.bfloat16(), image.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        losses = model(image, SIZES, TARGETS)
        with torch.no_grad():
            found = model(image, SIZES)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(one["boxes"].dtype == one["scores"].dtype == torch.float32 for one in found)
    sum(losses.values()).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_padding_does_not_change_the_memory():
    """An image alone, or in the corner of a batch of larger ones, is the same to the encoder."""
    transformer = build().transformer
    torch.manual_seed(0)
    levels = [torch.randn(1, 32, 8 >> number, 16 >> number) for number in range(4)]
    # Whatever stands in the padding, it is to read as zero, like what is outside of the map.
    padded = [F.pad(level, (0, 16 >> number, 0, 8 >> number), value=7.0) for number, level in enumerate(levels)]
    with torch.no_grad():
        alone = transformer.encode(levels, [(64, 128)], (64, 128))
        within = transformer.encode(padded, [(64, 128)], (128, 256))
    # Locations are over another size, which rounds differently.
    torch.testing.assert_close(within.tokens[~within.padding], alone.tokens[0], rtol=0, atol=1e-5)


def test_a_detector_can_be_made_from_the_meta_device():
    with torch.device("meta"):
        model = build()
    materialise(model)
    reference = build()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    for name in ("transformer.boxes.0.4.weight", "transformer.classes.0.bias", "transformer.encoder.0.ffn.fc1.weight"):
        found, expected = model.get_parameter(name), reference.get_parameter(name)
        assert found.std().item() == pytest.approx(expected.std().item(), rel=0.1, abs=1e-6), name
        assert found.mean().item() == pytest.approx(expected.mean().item(), abs=0.01), name


def test_logits_of_boxes_are_finite_at_the_border():
    found = inverse_sigmoid(torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]))
    torch.testing.assert_close(found, torch.tensor([-6.9078, -6.9078, 0.0, 6.9078, 6.9078]), rtol=0, atol=1e-4)
