"""The authors' Mask R-CNN and Cascade Mask R-CNN of the stored numbers, built with our code; images and targets."""

from dataclasses import replace

import golden
import numpy as np
import torch

from internimage import InternImage, InternImageConfig
from internimage.variants import CONFIGS
from tasks.detection.cascade import CascadeMaskRCNN
from tasks.detection.keys import rcnn_ours_to_official
from tasks.detection.mask_rcnn import MaskRCNN

BACKBONES = {
    "maskrcnn_t": replace(CONFIGS["T"], layer_scale=1.0),
    "cascade_lmini": InternImageConfig(
        channels=48,
        depths=(1, 1, 3, 1),
        groups=(3, 6, 12, 24),
        layer_scale=1.0,
        offset_scale=2.0,
        post_norm=True,
        strict=False,
    ),
}
IMAGES = "det/rcnn"
SIZES = [(128, 160), (120, 150)]
# Every sampler of the stored losses took all boxes.
ALL = 10**6
# Class layers were filled with larger weights, so that scores spread.
CLASS_GAIN, OBJECTNESS_GAIN = 6.0, 4.0


def detector(name):
    """Build the detector `name` with the weights of the stored numbers, in evaluation mode."""
    kind = MaskRCNN if name == "maskrcnn_t" else CascadeMaskRCNN
    config = BACKBONES[name]
    with torch.device("meta"):
        model = kind(InternImage(config), 80, rpn_samples=ALL, roi_samples=ALL)
    model = model.to_empty(device="cpu")
    stages = len(model.roi.stages)
    filled = golden.load(model, lambda key: rcnn_ours_to_official(key, config, num_stages=stages))
    assert len(filled) == len(model.state_dict())
    with torch.no_grad():
        model.rpn.objectness.weight *= OBJECTNESS_GAIN
        for head in model.roi.box_heads:
            head.classes.weight *= CLASS_GAIN
    return model.eval()


def images(name):
    """Return the two images; the second is smaller and padded with zeros."""
    image = golden.image(IMAGES, (2, 3, *SIZES[0]))
    image[1, :, SIZES[1][0] :] = 0
    image[1, :, :, SIZES[1][1] :] = 0
    return image


def targets(name):
    """Return the ground truth of the two images."""
    stored = np.load(golden.FOLDER / "det" / f"{name}.npz")
    found = []
    for number in range(2):
        boxes, labels = (torch.from_numpy(stored[f"gt/{number}/{what}"]) for what in ("boxes", "labels"))
        masks = np.unpackbits(stored[f"gt/{number}/masks_packed"])[: len(boxes) * SIZES[0][0] * SIZES[0][1]]
        found.append({"boxes": boxes, "labels": labels, "masks": torch.from_numpy(masks).view(len(boxes), *SIZES[0])})
    return found
