"""The authors' models on the same weights: features, logits and parameter gradients.

Their stored numbers come from the PyTorch form of their operator, which computes its sampling grid in float32 even for
float64 models. `float32_grid` has that property and nothing of our operator, so that with it the model around the
operator must agree to float64 rounding; with our operator, to what the float32 grid costs.
"""

import copy

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import classifier, config

import ops
from internimage.keys import official_to_ours

FILES = sorted(path.stem for path in (golden.FOLDER / "backbone").glob("*.npz"))
FORWARD = [name for name in FILES if not name.startswith("grad_")]
FORWARD_64 = [name for name in FORWARD if "logits64" in golden.Golden(f"backbone/{name}.npz", "_").names()]
GRADIENTS = [name for name in FILES if name.startswith("grad_")]

# Float32 rounding of two correct models differs by about 1e-5 of an entry's standard deviation, more where it is deep.
TOLERANCE = 1e-4
TOLERANCE_DEEP = 3e-4
# What a sampling grid rounded to float32 costs (2^-24 of the map's size per location) by the end of the network.
FLOAT32_GRID = 3e-5
# Sums of up to 1e5 terms in float64, through 30 blocks.
FLOAT64 = 1e-11


def float32_grid(x, offset, mask, *, groups, kernel_size, padding, offset_scale, remove_center, softmax):
    """DCNv3 of stride 1 by `grid_sample` on a zero-padded map, the grid in float32."""
    assert softmax
    batch, height, width, _ = x.shape
    points = kernel_size**2 - remove_center
    half = kernel_size // 2
    size = torch.tensor([width, height]) + 2.0 * padding
    steps = torch.arange(-half, half + 1.0)
    taps = torch.cartesian_prod(steps, steps)
    if remove_center:
        taps = taps[taps.abs().sum(1) > 0]
    rows, columns = (torch.arange(length) + half + 0.5 for length in (height, width))
    pixels = torch.cartesian_prod(rows, columns).flip(1).unsqueeze(1)
    grid = pixels / size + taps / size * offset_scale

    def by_group(tensor, *shape):
        return tensor.reshape(batch, height * width, groups, *shape).transpose(1, 2).flatten(0, 1)

    grid = grid + by_group(offset, points, 2) * offset_scale / size
    maps = F.pad(x, (0, 0, padding, padding, padding, padding)).permute(0, 3, 1, 2)
    maps = maps.unflatten(1, (groups, -1)).flatten(0, 1)
    samples = F.grid_sample(maps, 2 * grid - 1, align_corners=False)
    y = (samples * by_group(mask, points).softmax(-1).unsqueeze(1)).sum(-1)
    return y.unflatten(0, (batch, groups)).flatten(1, 2).transpose(1, 2).reshape(x.shape)


@pytest.fixture(params=["ours", "float32 grid"])
def tolerance_64(request, monkeypatch):
    """Run with our operator, then with the stand-in for the authors'; the tolerance in float64 goes with it."""
    if request.param == "ours":
        return FLOAT32_GRID
    monkeypatch.setattr(ops, "dcnv3", float32_grid)
    return FLOAT64


@pytest.fixture(scope="module", params=FORWARD)
def case(request):
    """One stored file: its name, the model and the images."""
    variant, size = request.param.rsplit("_", 1)
    batch, height, width = map(int, size.split("x"))
    return request.param, classifier(variant), golden.image(f"{variant}/{size}", (batch, 3, height, width))


@torch.no_grad()
def test_features_and_logits_are_the_authors(case):
    name, model, image = case
    stored = golden.Golden(f"backbone/{name}.npz", "_")
    tolerance = TOLERANCE_DEEP if name.startswith(("L_", "XL_")) else TOLERANCE
    features = model.backbone(image)
    embed = model.head.embed(features)
    for number, feature in enumerate(features, 1):
        stored.check(f"stage{number}", feature.permute(0, 2, 3, 1), tolerance)
    stored.check("embed", embed, tolerance)
    stored.check("logits", model.head.fc(embed), tolerance)


@pytest.mark.parametrize("case", FORWARD_64, indirect=True)
@torch.no_grad()
def test_features_and_logits_are_the_authors_in_float64(case, tolerance_64):
    name, model, image = case
    stored = np.load(golden.FOLDER / "backbone" / f"{name}.npz")
    model = copy.deepcopy(model).double()
    features = model.backbone(image.double())
    entries = {f"stage{number}_sub64": x.permute(0, 2, 3, 1) for number, x in enumerate(features, 1)}
    for entry, tensor in {**entries, "logits64": model.head(features)}.items():
        expected = stored[entry]
        found = golden.every(tensor.numpy(), expected.size).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance_64 * expected.std(), err_msg=entry)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_the_authors_in_float64(name, mode, tolerance_64):
    stored = np.load(golden.FOLDER / "backbone" / f"{name}.npz")
    variant = name.removeprefix("grad_").rsplit("_", 1)[0]
    model = classifier(variant).double().train(mode == "train")
    image = golden.image(f"grad/{variant}", tuple(stored["image_shape"].tolist())).double().requires_grad_()
    logits = model(image)
    loss = (logits * golden.noise(f"lossw/{variant}", tuple(logits.shape))).sum()
    loss.backward()

    np.testing.assert_allclose(loss.item(), stored[f"{mode}_loss"], rtol=tolerance_64)
    whole = golden.Golden(f"backbone/{name}.npz", "_")
    # Stored in float32, which rounds by up to 1e-6 of the standard deviation.
    whole.check(f"{mode}_logits", logits, max(tolerance_64, 1e-6))
    whole.check(f"{mode}_xgrad", image.grad, max(tolerance_64, 1e-6))

    parameters = dict(model.named_parameters())
    assert len(parameters) == len(stored["names"])
    for index, key in enumerate(stored["names"].tolist()):
        gradient = parameters[official_to_ours(key, config(variant))].grad
        norm, total, projection = (stored[f"{mode}_{what}"][index] for what in ("norm", "sum", "proj"))
        # A gradient that is zero by structure (a bias that a softmax or a batch norm cancels) leaves rounding only.
        scale = norm if norm > 1e-12 else 1.0
        found = [
            gradient.norm(),
            gradient.sum(),
            (gradient * golden.noise(f"proj/{key}", tuple(gradient.shape), torch.float64)).sum(),
        ]
        np.testing.assert_allclose(
            torch.stack(found).numpy(), [norm, total, projection], rtol=0, atol=tolerance_64 * scale, err_msg=key
        )
    for entry in (entry for entry in stored.files if entry.startswith(f"{mode}_after/")):
        statistic = model.state_dict()[official_to_ours(entry.split("/")[1], config(variant))]
        whole.check(entry, statistic, max(tolerance_64, 1e-6))
