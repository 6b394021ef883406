"""Labelled images by index, before any transform: files, or arrays in memory."""

import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

# torchvision's list, in lower case.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageSource(Protocol):
    """What a data set is to the rest of this package. Its parts are shared with worker processes, so keep it lean."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """Return the RGB image. Any error that `UNREADABLE` lists marks it as corrupt."""

    def label(self, index: int) -> int:
        """Return the class, in [0, num_classes)."""

    def name(self, index: int) -> str:
        """Return where the image came from, for messages and predictions."""


# What PIL raises for missing, truncated, unknown, broken and absurdly large files; RuntimeError is AVIF's.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, Image.DecompressionBombError)


class FileSource:
    """Image files below a root.

    Paths are kept as one block of bytes: a list of 14 million strings takes gigabytes, and each worker process copies
    the pages whose reference counts it touches.

    Args:
        root: Joined with each path.
        files: Path, relative to `root` or absolute, and label of each image.
    """

    def __init__(self, root: Path, files: Iterable[tuple[str, int]]) -> None:
        self._root = root
        self._paths = bytearray()
        self._ends = array("q")
        self._labels = array("q")
        for path, label in files:
            self._paths += os.fsencode(path)
            self._ends.append(len(self._paths))
            self._labels.append(label)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> Image.Image:
        with Image.open(self.name(index)) as image:
            return to_rgb(image)

    def label(self, index: int) -> int:
        return self._labels[index]

    def name(self, index: int) -> str:
        start = 0 if index == 0 else self._ends[index - 1]
        return str(self._root / os.fsdecode(bytes(self._paths[start : self._ends[index]])))


class ArraySource:
    """Grey images in memory.

    Args:
        images: `(N, H, W)` uint8.
        labels: `(N,)` integers.
        name: What the images are called; the index is added.
    """

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], name: str) -> None:
        self._images, self._labels, self._name = images, labels, name

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index]).convert("RGB")

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to 8-bit RGB: alpha dropped, CMYK and palettes converted by PIL, 16-bit grey scaled (PIL would clip it).

    The EXIF orientation is not applied, as in the authors' evaluation.
    """
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 / 255
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def find_images(folder: Path) -> list[Path]:
    """Return all image files below `folder`, sorted, links followed."""
    found = [Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names]
    return sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
