"""Changes to a checkpoint that make it fit a model it was not made for. Keys are the authors' (`internimage.keys`)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from internimage.weight_files import CheckpointError

HEAD_WEIGHT = "head.weight"
HEAD_BIAS = "head.bias"


def read_label_map(source: str | Path | Sequence[int], *, num_classes: int, num_rows: int) -> list[int]:
    """Read which row of the file's head becomes each class of the model, as in the authors' `map22kto1k.txt`.

    Args:
        source: The indices, or a text file with one of them a line. A row may be named twice.
        num_classes: Classes of the model: how many indices are expected.
        num_rows: Classes of the file: every index is in `[0, num_rows)`.

    Raises:
        CheckpointError: No such file, a line that is no number, another count, or an index out of range.
    """
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise CheckpointError(f"label_map: no such file {path}. Expected a text file with one index a line.")
        rows = []
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if line.strip():
                try:
                    rows.append(int(line))
                except ValueError as error:
                    raise CheckpointError(f"label_map: {path}:{number} is {line!r}, expected one index.") from error
    else:
        rows = list(source)
    if len(rows) != num_classes:
        raise CheckpointError(f"label_map has {len(rows)} indices, expected {num_classes}, the classes of the model.")
    outside = [row for row in rows if not 0 <= row < num_rows]
    if outside:
        raise CheckpointError(f"label_map: index {outside[0]} is not in [0, {num_rows}), the classes of the file.")
    return rows


def select_classes(tensors: dict[str, Tensor], rows: Sequence[int]) -> None:
    """Replace the last layer of the classifier in `tensors` by these rows of it."""
    index = torch.tensor(rows, dtype=torch.int64)
    for key in (HEAD_WEIGHT, HEAD_BIAS):
        tensors[key] = tensors[key].index_select(0, index)


def scale_linear(layer: nn.Linear, factor: float) -> None:
    """Shrink a new last layer so that fine-tuning starts near equal scores (the authors take 0.001)."""
    with torch.no_grad():
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)


def drop_center(tensors: dict[str, Tensor], num_points: int) -> list[str]:
    """Drop the central sampling point from offsets and masks, in place, for a model with `remove_center`.

    Args:
        tensors: Weights of a model that samples every point. Rows are ordered by group, point, and for offsets axis.
        num_points: Points of the full grid, 9 for a 3 x 3 kernel.

    Returns:
        The keys that were changed.

    Raises:
        CheckpointError: The rows do not divide into groups of `num_points`.
    """
    changed = []
    for key, tensor in tensors.items():
        if ".dcn.mask." not in key and ".dcn.offset." not in key:
            continue
        per_point = 2 if ".dcn.offset." in key else 1
        if tensor.shape[0] % (num_points * per_point):
            raise CheckpointError(
                f"{key} has {tensor.shape[0]} rows, expected a multiple of {num_points * per_point} "
                f"({num_points} sampling points a group), to drop the central one of."
            )
        points = tensor.reshape(-1, num_points, per_point, *tensor.shape[1:])
        middle = num_points // 2
        tensors[key] = torch.cat([points[:, :middle], points[:, middle + 1 :]], dim=1).flatten(0, 2)
        changed.append(key)
    return changed
