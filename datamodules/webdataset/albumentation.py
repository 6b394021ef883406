"""A user's pipeline of albumentations on images of shards."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.webdataset.decode import MAX_PIXELS, EncodedImage
from datamodules.webdataset.records import Draw
from datamodules.webdataset.writers import WHOLE, View

# As in `datamodules.pipeline`.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
import albumentations as A


class AlbumentationsWriter:
    """Run a pipeline on each image: see `datamodules.webdataset.transforms.Albumentations`.

    Args:
        transform: The pipeline in the form of `A.to_dict`, or its JSON or YAML file.
        image_size: Side that it must leave, pixels.
        max_pixels: Larger images are bad.

    Raises:
        ValueError: It leaves another size or type.
    """

    num_views = 1

    def __init__(self, transform: dict[str, Any] | Path, image_size: int, *, max_pixels: int = MAX_PIXELS) -> None:
        self.image_size, self.max_pixels = image_size, max_pixels
        self._steps = A.Compose([_load(transform)])
        # Tried on a blank image, so that a mistake shows before training and not in a worker.
        self.dtype = self._run(np.zeros((2 * image_size, 3 * image_size, 3), np.uint8)).dtype

    def write(self, data: memoryview, draw: Draw, rows: list[Tensor]) -> list[View]:
        """Fill the row: see `datamodules.webdataset.writers.ImageWriter`."""
        pixels = EncodedImage(data, max_pixels=self.max_pixels).decode()
        seed = int(draw.sequence().generate_state(1)[0])
        # One generator shared by all steps, as in `datamodules.pipeline`.
        self._steps.set_random_state(np.random.default_rng(seed), random.Random(seed))
        rows[0].copy_(self._run(pixels))
        return [WHOLE]

    def _run(self, pixels: Any) -> Tensor:
        image = self._steps(image=pixels)["image"]
        image = image if isinstance(image, Tensor) else torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        if image.shape != (3, self.image_size, self.image_size):
            raise ValueError(
                f"Albumentations: the pipeline makes {tuple(image.shape)} of {pixels.shape}, expected "
                f"(3, {self.image_size}, {self.image_size}). End it with a crop or a resize to image_size."
            )
        return image if image.dtype == torch.uint8 else image.float()


def _load(transform: dict[str, Any] | Path) -> A.BasicTransform | A.BaseCompose:
    if isinstance(transform, dict):
        return A.from_dict(transform)
    return A.load(transform, data_format="json" if Path(transform).suffix == ".json" else "yaml")
