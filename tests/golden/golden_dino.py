"""The authors' DINO and CB-DINO of the stored numbers, built with our code; images, targets and noise."""

from dataclasses import replace

import golden
import numpy as np
import torch

from internimage import InternImage, InternImageConfig
from internimage.variants import CONFIGS
from tasks.detection import dino_denoising, dino_transformer
from tasks.detection.composite import CompositeDINO, CompositeInternImage
from tasks.detection.dino import DINO
from tasks.detection.dino_keys import dino_ours_to_official

BACKBONES = {
    "dino_t": replace(CONFIGS["T"], layer_scale=1.0),
    "cbdino_hmini": InternImageConfig(
        channels=64,
        depths=(1, 1, 4, 1),
        groups=(4, 8, 16, 32),
        res_post_norm=True,
        post_norm_blocks=(1, 3),
        center_feature_scale=True,
        dw_kernel_size=5,
        strict=False,
    ),
}
IMAGES = "det/dino"
SIZES = [(128, 160), (120, 150)]
NUM_QUERIES, DENOISING_QUERIES = 100, 40
LIMITS = {"dino_t": 100, "cbdino_hmini": 300}
# Of class logits, whose standard deviation is 2.
SCORE_TOLERANCE = 2e-4
# Class layers and embeddings were filled by rules of their own.
CLASS_GAIN, EMBEDDING_SCALE = 2.0, 0.5


def detector(name):
    """Build the detector `name` with the weights of the stored numbers, in evaluation mode."""
    config, composite = BACKBONES[name], name.startswith("cb")
    with torch.device("meta"):
        if composite:
            streams = (InternImage(config, out_indices=out) for out in ((0, 1, 2, 3), (1, 2, 3)))
            backbone, kind = CompositeInternImage(*streams), CompositeDINO
        else:
            backbone, kind = InternImage(config, out_indices=(1, 2, 3)), DINO
        model = kind(backbone, 80, num_queries=NUM_QUERIES, denoising_queries=DENOISING_QUERIES, limit=LIMITS[name])
    model = model.to_empty(device="cpu")

    def official(key):
        return dino_ours_to_official(key, config, composite=composite)

    filled = golden.load(model, official)
    assert len(filled) == len(model.state_dict())
    with torch.no_grad():
        for layer in model.transformer.classes:
            layer.weight *= CLASS_GAIN
        for key in ("transformer.query.weight", "transformer.level_embeds", "denoising.embedding.weight"):
            tensor = model.get_parameter(key)
            tensor.copy_(EMBEDDING_SCALE * golden.noise(official(key), tuple(tensor.shape), torch.float64))
    return model.eval()


def images():
    """Return the two images; the second is smaller and padded with zeros."""
    image = golden.image(IMAGES, (2, 3, *SIZES[0]))
    image[1, :, SIZES[1][0] :] = 0
    image[1, :, :, SIZES[1][1] :] = 0
    return image


def targets(name):
    """Return the ground truth of the images that were trained on: two, of CB-DINO the first only."""
    stored = np.load(golden.FOLDER / "det" / f"{name}.npz")
    return [
        {what: torch.from_numpy(stored[f"gt/{number}/{what}"]) for what in ("boxes", "labels")}
        for number in range(2)
        if f"gt/{number}/boxes" in stored
    ]


def stored_noise(monkeypatch):
    """Make the denoising draw the numbers of the stored runs, which count every draw; call before each batch."""
    draws = {"number": 0, "redrawn": None}

    def uniform(like):
        draws["number"] += 1
        values = golden.noise(f"dn/{draws['number']}/rand", tuple(like.shape), torch.float64)
        values = ((values / 3**0.5 + 1) / 2).float()
        draws["redrawn"] = values < dino_denoising.Denoising(1, 1).label_noise / 2
        return values

    def integers(like, high):
        draws["number"] += 1
        name = f"dn/{draws['number']}/randint"
        if like.ndim > 1:
            return golden.integers(name, tuple(like.shape), 0, high)
        # The authors draw new labels for those only that get one.
        values, redrawn = torch.zeros_like(like), draws["redrawn"]
        values[redrawn] = golden.integers(name, (int(redrawn.sum()),), 0, high)
        return values

    monkeypatch.setattr(dino_denoising, "uniform", uniform)
    monkeypatch.setattr(dino_denoising, "integers", integers)


def stored_order(monkeypatch, name, *, training=False):
    """Make the detector take its proposals in the authors' order, where theirs is one of ours up to rounding.

    Some scores differ by 1e-6, and a proposal's rank decides which query it becomes. There is no stored order of the
    assisting features that a composite is trained on, whose scores are further apart.
    """
    stored = torch.from_numpy(np.load(golden.FOLDER / "det" / f"{name}.npz")["topk_indices"])

    def highest(scores, number):
        best = scores.topk(number, 1)
        expected = torch.stack([best.indices[0], stored[0]]) if training and name.startswith("cb") else stored
        torch.testing.assert_close(scores.gather(1, expected), best.values, rtol=0, atol=SCORE_TOLERANCE)
        return expected

    monkeypatch.setattr(dino_transformer, "highest", highest)
