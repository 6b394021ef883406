import pytest
import torch

from internimage import internimage_debug
from tasks.detection.cascade import CascadeRCNN
from tasks.detection.mask_rcnn import MaskRCNN

SIZES = [(64, 96), (50, 96)]


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.randn(2, 3, 64, 96)


def target(*boxes):
    """Ground truth of one image: boxes of class 1 and masks that fill them."""
    masks = torch.zeros(len(boxes), 64, 96, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.ones(len(boxes), dtype=torch.long)
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": labels, "masks": masks}


@pytest.mark.parametrize("kind", [MaskRCNN, CascadeRCNN])
@pytest.mark.parametrize("truth", [[((8, 8, 40, 40),), ()], [(), ()]], ids=["one image empty", "both empty"])
def test_images_without_a_box_train_every_parameter(kind, truth, image):
    model = kind(internimage_debug(), 3).train()
    losses = model(image, SIZES, [target(*boxes) for boxes in truth])
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    # DDP waits for a gradient of each.
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_detections_lie_in_their_image_and_respect_the_limit(image):
    model = MaskRCNN(internimage_debug(), 3, score=0.0, limit=7).eval()
    with torch.no_grad():
        found = model(image, SIZES)
    for detections, (height, width) in zip(found, SIZES, strict=True):
        boxes = detections["boxes"]
        assert boxes.shape == (7, 4)
        assert detections["scores"].equal(detections["scores"].sort(descending=True).values)
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width
        assert boxes[:, 3].max() <= height


def test_a_detector_learns_one_image(image):
    model = MaskRCNN(internimage_debug(), 3).train()
    truth = [target((8, 8, 40, 40)), target((30, 5, 80, 45), (2, 20, 20, 44))]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    totals = []
    for _ in range(8):
        optimizer.zero_grad()
        total = sum(model(image, SIZES, truth).values())
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.7 * totals[0]


def test_a_target_without_masks_is_named(image):
    model = MaskRCNN(internimage_debug(), 3)
    bare = [{key: value for key, value in target((8, 8, 40, 40)).items() if key != "masks"}] * 2
    with pytest.raises(ValueError, match="MaskRCNN: a target has no `masks`"):
        model(image, SIZES, bare)
    assert "mask" not in MaskRCNN(internimage_debug(), 3, masks=False)(image, SIZES, bare)
