"""The authors' Mask2Former of the stored numbers, built with our code; the image, the target and the random points."""

import golden
import numpy as np
import torch

from internimage import InternImage, InternImageConfig
from tasks.segmentation.mask2former import Mask2Former
from tasks.segmentation.mask2former_keys import mask2former_official_to_ours, mask2former_ours_to_official
from tasks.segmentation.mask2former_losses import masks_of_classes

FILE = "seg/mask2former_hmini.npz"
BACKBONE = InternImageConfig(
    channels=64,
    depths=(1, 1, 4, 1),
    groups=(4, 8, 16, 32),
    res_post_norm=True,
    post_norm_blocks=(1, 3),
    center_feature_scale=True,
    dw_kernel_size=5,
    strict=False,
)
NUM_CLASSES = 19
# The class layer and the embeddings were filled by rules of their own.
CLASS_GAIN, EMBEDDING_SCALE = 2.0, 0.5
EMBEDDINGS = ("query_embed.weight", "query_feat.weight", "level_embed.weight", "pixel_decoder.level_encoding.weight")


def segmentor():
    """Build the segmentor with the weights of the stored numbers, in evaluation mode."""
    with torch.device("meta"):
        model = Mask2Former(InternImage(BACKBONE), NUM_CLASSES)
    model = model.to_empty(device="cpu")
    filled = golden.load(model, lambda key: mask2former_ours_to_official(key, BACKBONE))
    assert len(filled) == len(model.state_dict())
    with torch.no_grad():
        model.decoder.class_predictor.weight *= CLASS_GAIN
        for name in EMBEDDINGS:
            key = f"decode_head.{name}"
            tensor = model.get_parameter(mask2former_official_to_ours(key, BACKBONE))
            tensor.copy_(EMBEDDING_SCALE * golden.noise(key, tuple(tensor.shape), torch.float64))
    return model.eval()


def stored():
    """Return the file of stored numbers as it is."""
    return np.load(golden.FOLDER / FILE)


def images():
    """Return the two images."""
    return golden.image("seg", (2, 3, 128, 160))


def targets():
    """Return the masks of the two images that the stored losses belong to."""
    return masks_of_classes(torch.from_numpy(stored()["gt_semantic"]))


def stored_points(monkeypatch):
    """Make the losses draw the random points of the stored run; return the list that counts the draws."""
    calls = []

    def rand(*shape, device=None):
        calls.append(shape)
        values = golden.noise(f"m2f/{len(calls)}/rand", shape, torch.float64)
        return ((values / 3**0.5 + 1) / 2).float().to(device)

    monkeypatch.setattr(torch, "rand", rand)
    return calls


def official_loss(ours):
    """The authors' name of a loss."""
    layer, what = ours.removeprefix("layer").split("_")
    prefix = "decode" if layer == "9" else f"decode.d{layer}"
    return f"{prefix}.loss_{'cls' if what == 'class' else what}"
