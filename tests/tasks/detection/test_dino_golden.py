"""DINO and CB-DINO against the authors' numbers, on their weights."""

from types import SimpleNamespace

import golden
import golden_dino
import numpy as np
import pytest
import torch
from golden_dino import BACKBONES, NUM_QUERIES, SIZES

from tasks.detection.composite import CompositeDINO
from tasks.detection.dino_keys import dino_official_to_ours
from tasks.detection.dino_losses import Truth
from tasks.detection.postprocess import to_original

# Float32 rounding of two correct models differs by about 1e-5 of an entry's standard deviation.
TOLERANCE = 1e-4
# Pixels of a box, and at the same time the score's difference.
BOX_TOLERANCE = 1e-3
ORIGINAL_SIZES = [(128, 160), (240, 300)]
IMAGE_SIZE = SIZES[0]
# Relative to a parameter's gradient. Rectifiers and sampling cells that rounding flips change single pixels' gradients,
# so that projections differ by more than norms.
NORM_TOLERANCE, MEDIAN_PROJECTION, WORST_PROJECTION = 5e-3, 1e-3, 3e-2


@pytest.fixture(scope="module", params=["dino_t", "cbdino_hmini"])
def case(request):
    """Everything that the detector computes from the two images, with its stored numbers."""
    name = request.param
    model = golden_dino.detector(name)
    transformer = model.transformer
    states = []
    hook = transformer.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    with torch.no_grad(), pytest.MonkeyPatch.context() as monkeypatch:
        golden_dino.stored_order(monkeypatch, name)
        image = golden_dino.images()
        if isinstance(model, CompositeDINO):
            streams = model.backbone.streams(image)
            features, backbone = streams[1], [*streams[0], *streams[1]]
        else:
            features = backbone = model.backbone(image)
        levels = model.neck(features)
        memory = transformer.encode(levels, SIZES, IMAGE_SIZE)
        proposals = transformer.propose(memory)
        predictions, references = transformer.decode(memory, transformer.content(memory), proposals.prediction.boxes)
    hook.remove()
    return SimpleNamespace(
        name=name,
        stored=golden.Golden(f"det/{name}.npz"),
        raw=raw(name),
        model=model,
        backbone=backbone,
        levels=levels,
        memory=memory,
        proposals=proposals,
        predictions=predictions,
        references=references,
        states=states,
    )


def raw(name):
    return np.load(golden.FOLDER / "det" / f"{name}.npz")


def test_backbone_pyramid_and_memory_are_the_authors(case):
    for entry, maps in {"backbone": case.backbone, "neck": case.levels}.items():
        for level, tensor in enumerate(maps):
            case.stored.check(f"{entry}/{level}", tensor, TOLERANCE)
    case.stored.check("memory", case.memory.tokens, TOLERANCE)


def test_proposals_are_the_authors(case):
    # `stored_order` has compared their positions.
    case.stored.check("enc_topk_score", case.proposals.prediction.logits, TOLERANCE)
    case.stored.check("enc_topk_anchor", case.proposals.prediction.boxes, TOLERANCE)


def test_every_decoder_layer_is_the_authors(case):
    assert len(case.predictions) == 6
    for layer, prediction in enumerate(case.predictions):
        case.stored.check(f"cls/{layer}", prediction.logits, TOLERANCE)
        case.stored.check(f"box/{layer}", prediction.boxes, TOLERANCE)
    case.stored.check("references", torch.stack(case.references), TOLERANCE)
    case.stored.check("hs_last", case.states[-1], TOLERANCE)


@pytest.mark.parametrize("rescale", [0, 1])
def test_detections_are_the_authors(case, rescale, monkeypatch):
    golden_dino.stored_order(monkeypatch, case.name)
    with torch.no_grad():
        detections = case.model(golden_dino.images(), SIZES)
    for number, found in enumerate(detections):
        entry = f"det_rescale{rescale}/{number}"
        boxes, labels = (torch.from_numpy(case.raw[f"{entry}/{what}"]) for what in ("boxes", "labels"))
        found = to_original(found, SIZES[number], ORIGINAL_SIZES[number] if rescale else SIZES[number])
        assert found["boxes"].shape == (len(boxes), 4)
        # As sets: two scores that differ by rounding may change places.
        difference = torch.cdist(found["boxes"], boxes[:, :4], p=float("inf"))
        difference += (found["scores"][:, None] - boxes[:, 4]).abs()
        nearest, match = difference.masked_fill(found["labels"][:, None] != labels, float("inf")).min(1)
        assert nearest.max() < BOX_TOLERANCE
        assert len(match.unique()) == len(boxes)


@pytest.fixture(params=["nonoise", "hashnoise"])
def noise(request, case, monkeypatch):
    """Run with the objects as they are, then with the stored noise; the name of the run."""
    if request.param == "nonoise":
        monkeypatch.setattr(case.model.denoising, "label_noise", 0.0)
        monkeypatch.setattr(case.model.denoising, "box_noise", 0.0)
    else:
        golden_dino.stored_noise(monkeypatch)
    return request.param


@torch.no_grad()
def test_denoising_queries_are_the_authors(case, noise):
    targets = golden_dino.targets(case.name)
    truth = [Truth.from_target(one, size) for one, size in zip(targets, SIZES, strict=False)]
    truth *= 2 // len(truth)
    queries = case.model.denoising(truth, NUM_QUERIES)
    assert queries.num_groups == case.raw[f"{noise}/num_dn_group"]
    assert queries.content.shape[1] == case.raw[f"{noise}/pad_size"]
    case.stored.check(f"{noise}/dn_label_query", queries.content, 1e-6)
    case.stored.check(f"{noise}/dn_bbox_query", queries.boxes, 1e-5)
    shape = case.raw[f"{noise}/attn_mask_shape"]
    hidden = np.unpackbits(case.raw[f"{noise}/attn_mask"])[: shape.prod()].reshape(shape)
    np.testing.assert_array_equal(queries.hidden.numpy(), hidden.astype(bool))


def official_loss(ours):
    """The authors' name of a loss."""
    stream, _, rest = ours.partition("_") if ours.startswith(("assist_", "lead_")) else ("", "", ours)
    part, _, what = rest.partition("_")
    suffix = {"": "", "assist": "0_w0.5", "lead": "1"}[stream]
    what = {"class": "cls", "box": "bbox", "giou": "iou"}[what]
    if part == "proposal":
        return f"interm_loss_{what}{suffix}"
    kind, layer = part.rstrip("0123456789"), int(part.lstrip("layerdnoisg"))
    prefix = "" if layer == 5 else f"d{layer}."
    return f"{prefix}{'dn_' if kind == 'denoising' else ''}loss_{what}{suffix}"


def test_losses_and_gradients_are_the_authors(case, noise, monkeypatch):
    golden_dino.stored_order(monkeypatch, case.name, training=True)
    model, values = case.model, case.raw
    targets = golden_dino.targets(case.name)
    model.zero_grad()
    losses = model.train()(golden_dino.images()[: len(targets)], SIZES[: len(targets)], targets)
    model.eval()
    named = {official_loss(key): value for key, value in losses.items()}
    expected = {key.removeprefix(f"{noise}/loss/") for key in values.files if key.startswith(f"{noise}/loss/")}
    assert named.keys() == expected - {"total"}
    for key, value in named.items():
        np.testing.assert_allclose(value.item(), values[f"{noise}/loss/{key}"], rtol=TOLERANCE, err_msg=key)
    total = sum(losses.values())
    np.testing.assert_allclose(total.item(), values[f"{noise}/loss/total"], rtol=TOLERANCE)

    total.backward()
    parameters = dict(model.named_parameters())
    names = values[f"{noise}/grad_names"].tolist()
    found = []
    for key in names:
        ours = dino_official_to_ours(key, BACKBONES[case.name], composite=case.name.startswith("cb"))
        gradient = parameters.pop(ours).grad.double()
        found.append(
            (gradient.norm(), (gradient * golden.noise(f"proj/{key}", tuple(gradient.shape), torch.float64)).sum())
        )
    assert not parameters
    norms, projections = np.array(found, dtype=np.float64).T
    scale = np.maximum(values[f"{noise}/grad_norm"], 1e-3)
    error, error_projected = (
        np.abs(got - values[f"{noise}/{what}"]) / scale
        for what, got in (("grad_norm", norms), ("grad_proj", projections))
    )
    worst = [(names[index], error[index], error_projected[index]) for index in error_projected.argsort()[-5:]]
    assert error.max() < NORM_TOLERANCE, worst
    assert np.median(error_projected) < MEDIAN_PROJECTION, worst
    assert error_projected.max() < WORST_PROJECTION, worst
