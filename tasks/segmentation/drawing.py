"""Pictures of class maps.

Shapes: H W size of the image.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datamodules.batch import Array
from tasks.detection.drawing import Colour

_OPACITY = 0.55
_PAPER, _INK, _FRAME = "white", "black", "#808080"
# A smaller picture is enlarged by a whole number, so that its legend has room.
_MIN_SIDE = 320
# Side of a square image in pixels for each pixel of a letter's height.
_FONT_SCALE = 42
_SMALLEST_FONT = 13
_MAX_COLUMNS = 3


def draw_classes(
    image: Image.Image, labels: Array, class_names: Sequence[str], colours: Sequence[Colour]
) -> Image.Image:
    """Draw a map of classes over an image, and beside it the classes in it with their share, the largest first.

    Args:
        image: RGB.
        labels: `(H, W)` uint8 of the image's size, class numbers.
        class_names: Of all classes.
        colours: Of all classes.

    Returns:
        A new image, wider than `image`; one whose longer side is below 320 pixels is enlarged.
    """
    table = np.array(colours, np.uint8)
    drawn = Image.blend(image, Image.fromarray(table[labels]), _OPACITY)
    factor = -(-_MIN_SIDE // max(drawn.size))
    if factor > 1:
        drawn = drawn.resize((factor * drawn.width, factor * drawn.height), Image.Resampling.NEAREST)
    area = np.bincount(labels.ravel(), minlength=len(class_names))
    present = [int(label) for label in np.argsort(-area, kind="stable") if area[label]]
    rows = [(_percent(area[label] / labels.size), class_names[label], colours[label]) for label in present]
    legend = _legend(rows, drawn.height, max(_SMALLEST_FONT, round((drawn.width * drawn.height) ** 0.5 / _FONT_SCALE)))
    sheet = Image.new("RGB", (drawn.width + legend.width, drawn.height), _PAPER)
    sheet.paste(drawn, (0, 0))
    sheet.paste(legend, (drawn.width, 0))
    return sheet


def _legend(rows: Sequence[tuple[str, str, Colour]], height: int, letters: int) -> Image.Image:
    """Draw (share, name, colour) below one another, in columns as high as the image, in letters of this height."""
    font: Any = ImageFont.load_default(letters)
    pad = letters // 2
    line = letters + pad
    per_column = max(1, (height - pad) // line)
    shown = list(rows[: per_column * _MAX_COLUMNS])
    if left := len(rows) - len(shown):
        shown.pop()
    columns = [shown[start : start + per_column] for start in range(0, len(shown), per_column)]
    note = f"{left + 1} more" if left else ""
    share_width = max(round(font.getlength(share)) for share, _, _ in rows)
    name_widths = [max(round(font.getlength(name)) for _, name, _ in column) for column in columns]
    name_widths[-1] = max(name_widths[-1], round(font.getlength(note)))
    widths = [pad + letters + pad + share_width + pad + name_width + pad for name_width in name_widths]
    legend = Image.new("RGB", (sum(widths), height), _PAPER)
    draw = ImageDraw.Draw(legend)
    for number, column in enumerate(columns):
        left_edge = sum(widths[:number]) + pad
        for row, (share, name, colour) in enumerate(column):
            top = pad + row * line
            middle = top + letters / 2
            draw.rectangle((left_edge, top, left_edge + letters - 1, top + letters - 1), fill=colour, outline=_FRAME)
            share_right = left_edge + letters + pad + share_width
            draw.text((share_right, middle), share, fill=_INK, font=font, anchor="rm")
            draw.text((share_right + pad, middle), name, fill=_INK, font=font, anchor="lm")
    if note:
        place = sum(widths[:-1]) + 3 * pad + letters + share_width, pad + len(columns[-1]) * line + letters / 2
        draw.text(place, note, fill=_INK, font=font, anchor="lm")
    return legend


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "<0.1%"
