"""From the values in mask files to labels.

Shapes: H W size of the mask.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.batch import Array
from datamodules.segmentation.records import IGNORE
from datamodules.sources import UNREADABLE

# What PIL calls images of one channel: bits, grey, palette, 16 and 32 bits.
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
# In a table: the value means nothing.
_UNKNOWN = -1


def label_table(
    num_classes: int,
    *,
    reduce_zero_label: bool = False,
    class_ids: Sequence[Sequence[int]] | None = None,
    ignore_value: int = IGNORE,
) -> Array:
    """Return what each value of a mask means, `(256,)` int16: a label, `IGNORE`, or less than 0 where nothing.

    Args:
        num_classes: Labels are less.
        reduce_zero_label: 0 is ignored and value v is label v - 1.
        class_ids: The values of each class; every other value is ignored. None: a value is its label.
        ignore_value: Is ignored, as is `IGNORE`.
    """
    table = np.full(256, _UNKNOWN if class_ids is None else IGNORE, dtype=np.int16)
    if class_ids is None:
        first = int(reduce_zero_label)
        table[:first] = IGNORE
        table[first : first + num_classes] = np.arange(num_classes)
    else:
        for label, ids in enumerate(class_ids):
            table[list(ids)] = label
    table[[ignore_value, IGNORE]] = IGNORE
    return table


def read_mask(file: Path | bytes, table: Array, name: str) -> Array:
    """Read a mask file and look its values up: `(H, W)` uint8 labels or `IGNORE`.

    Args:
        file: Path or content.
        table: Of `label_table`.
        name: Of the file, for messages.

    Raises:
        ValueError: It cannot be read, has colours, or has a value without a meaning.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            mode = image.mode
            # Without `convert`, which would replace the indices of a palette by colours.
            values = np.asarray(image)
    except UNREADABLE as error:
        raise ValueError(f"mask {name} cannot be read: {error}. Repair it, or remove it and its image.") from error
    if mode not in _INDEX_MODES:
        raise ValueError(
            f"mask {name} is an image of mode {mode}, expected one channel of class numbers (PIL's modes L, P or I). "
            "Replace its colours by the numbers of the classes."
        )
    values = values.astype(np.int64) if values.dtype != np.uint8 else values
    if values.dtype == np.int64 and (values.min(initial=0) < 0 or values.max(initial=0) > 255):
        raise ValueError(_unknown(name, values[(values < 0) | (values > 255)], table))
    labels: Array = table[values]
    if labels.min(initial=0) < 0:
        raise ValueError(_unknown(name, values[labels < 0], table))
    found: Array = labels.astype(np.uint8)
    return found


def mask_size(file: Path | bytes) -> tuple[int, int]:
    """Return height and width of a mask file, from its header."""
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        return image.height, image.width


def _unknown(name: str, values: Array, table: Array) -> str:
    found = [str(value) for value in np.unique(values)]
    shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
    known = np.flatnonzero((table >= 0) & (table != IGNORE))
    ignored = ", ".join(str(value) for value in np.flatnonzero(table == IGNORE)[-3:])
    return (
        f"mask {name} has the value {shown} at {values.size} pixels, expected {known[0]} to {known[-1]} for "
        f"{table[known[-1]] + 1} classes, or {ignored} to ignore a pixel. Check num_classes, reduce_zero_label and how "
        "the masks were made."
    )
