"""What the writers of predictions share: the order of the data over all ranks, pictures of it, and names of files."""

import re
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from datamodules.batch import IMAGENET_MEAN, IMAGENET_STD, ViewBatch

# What PIL raises for missing, unknown, broken and absurdly large files.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
# What some file system or shell does not take in a name.
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"\\|?*\[\]]')


def in_order(share: list[Any]) -> list[Any]:
    """Gather what all ranks hold; rank r has every r-th item."""
    if not (dist.is_available() and dist.is_initialized()):
        return share
    shares: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, share)
    return [share[place] for place in range(len(shares[0])) for share in shares if place < len(share)]


def picture(image: Tensor) -> Image.Image:
    """Undo the normalisation of one `(3, H, W)` image."""
    mean, std = (image.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return to_pil_image((image * std + mean).float().clamp(0, 1).cpu())  # type: ignore[no-any-return]


def original_picture(batch: ViewBatch, place: int) -> Image.Image:
    """Return an image of a batch at its original size: the file, or where that is unreadable what the model was fed."""
    height, width = batch["original_size"][place]
    image = _read(batch["path"][place], (width, height))
    if image is None:
        rows, columns = batch["valid"][place]
        image = picture(batch["image"][place, :, :rows, :columns]).resize((width, height), Image.Resampling.BICUBIC)
    return image


def output_name(path: str, image_id: int | str) -> str:
    """Return a name without suffix that no other image has: the id, with the file's name where that is another.

    An id with slashes gives a name with subfolders.
    """
    stem, number = Path(path).stem, str(image_id)
    *folders, last = (part for part in number.split("/") if part not in ("", ".", ".."))
    name = stem if stem.lstrip("0") == last.lstrip("0") else f"{last}_{stem}"
    return "/".join(_FORBIDDEN.sub("_", part) for part in (*folders, name))


def _read(path: str, size: tuple[int, int]) -> Image.Image | None:
    """Return the upright 8-bit image of `size` (width, height) at `path`, or None where there is none."""
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):  # more than 8 bits, which PIL would clip
                return None
            image = ImageOps.exif_transpose(file).convert("RGB")
    except _UNREADABLE:
        return None
    return image if image.size == size else None
