"""Pictures of detections.

Shapes: N detections, H W size of the image.
"""

import colorsys
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from tasks.detection.postprocess import Detections

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom

_MASK_OPACITY = 0.45
# Side of a square image, in pixels, for each pixel of a line's width and of a letter's height.
_LINE_SCALE, _FONT_SCALE = 320, 42
_SMALLEST_FONT = 11
# Hues of neighbouring classes are this part of the circle apart, which never repeats.
_GOLDEN = 0.6180339887


def draw_detections(
    image: Image.Image, detections: Detections, class_names: Sequence[str] | None = None
) -> Image.Image:
    """Draw boxes, masks, and labels with scores; lines and letters grow with the image.

    A pixel of several masks gets the colour of the best detection. A label stands above its box, or where it hides
    fewer others.

    Args:
        image: RGB.
        detections: Best first, in pixels of `image`; masks, where there are any, `(N, H, W)` bool.
        class_names: Of all classes. Numbers are written without them.

    Returns:
        A new image.
    """
    if len(detections["boxes"]) == 0:
        return image.copy()
    drawn = pil_to_tensor(image)
    labels = detections["labels"].tolist()
    colours = [class_colour(label) for label in labels]
    if "masks" in detections:
        drawn = draw_segmentation_masks(drawn, _disjoint(detections["masks"].cpu()), _MASK_OPACITY, colours)
    side = (image.width * image.height) ** 0.5
    limits = torch.tensor([image.width - 1, image.height - 1] * 2)
    boxes = detections["boxes"].cpu().round().long().clamp(min=0).minimum(limits)
    # The best last, on top of the others.
    drawn = draw_bounding_boxes(drawn, boxes.flip(0), colors=colours[::-1], width=max(1, round(side / _LINE_SCALE)))
    names = [class_names[label] if class_names else str(label) for label in labels]
    texts = [f"{name} {score:.2f}" for name, score in zip(names, detections["scores"].tolist(), strict=True)]
    picture = to_pil_image(drawn)
    _write(picture, texts, boxes.tolist(), colours, max(_SMALLEST_FONT, round(side / _FONT_SCALE)))
    return picture  # type: ignore[no-any-return]


def class_colour(label: int) -> Colour:
    """Return the colour of a class, the same in every picture and run."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * _GOLDEN) % 1, (0.85, 0.6)[label % 2], (0.9, 1.0)[label % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def _disjoint(masks: Tensor) -> Tensor:
    """Take from each mask `(N, H, W)` the pixels of those before it."""
    taken = torch.zeros_like(masks[0])
    parts = torch.empty_like(masks)
    for mask, part in zip(masks, parts, strict=True):
        torch.logical_and(mask, ~taken, out=part)
        taken |= mask
    return parts


def _write(
    picture: Image.Image, texts: Sequence[str], boxes: Sequence[Sequence[int]], colours: Sequence[Colour], height: int
) -> None:
    """Write a text at each box, dark or light on its colour."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(height)
    pad = max(1, height // 5)
    places: list[Rectangle] = []
    for text, box in zip(texts, boxes, strict=True):
        size = round(font.getlength(text)) + 2 * pad, height + 2 * pad
        places.append(_place(box, size, picture.size, places))
    for text, place, colour in reversed(list(zip(texts, places, colours, strict=True))):
        draw.rectangle(place, fill=colour)
        middle = (place[1] + place[3]) / 2
        ink = "black" if 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 128 else "white"
        draw.text((place[0] + pad, middle), text, fill=ink, font=font, anchor="lm")


def _place(
    box: Sequence[int], size: tuple[int, int], image_size: tuple[int, int], taken: Sequence[Rectangle]
) -> Rectangle:
    """Return where a label of `size` (width, height) covers the fewest pixels of those that are `taken`."""
    # Both corners of a rectangle are drawn.
    last_left, last_top = (whole - 1 - part for whole, part in zip(image_size, size, strict=True))
    left = max(0, min(box[0], last_left))
    # Above the box, inside at its top, inside at its bottom, below.
    tops = (box[1] - size[1], box[1], box[3] - size[1], box[3])
    spots = [(left, top, left + size[0], top + size[1]) for top in tops if 0 <= top <= last_top]
    spots = spots or [(left, 0, left + size[0], size[1])]
    return min(spots, key=lambda spot: sum(_overlap(spot, other) for other in taken))


def _overlap(one: Rectangle, other: Rectangle) -> int:
    width, height = (min(one[axis + 2], other[axis + 2]) - max(one[axis], other[axis]) for axis in (0, 1))
    return max(0, width) * max(0, height)
