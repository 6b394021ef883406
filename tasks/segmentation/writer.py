"""What `predict` leaves behind for a segmentor: a map of classes for each image, and a picture of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor

from datamodules.batch import ViewBatch
from tasks.detection.drawing import Colour, class_colour
from tasks.segmentation.drawing import draw_classes
from tasks.writing import in_order, original_picture, output_name


class SegmentationPrediction(TypedDict):
    """What was found in the images of a batch, B of each."""

    path: list[str]
    image_id: list[int | str]
    original_size: list[tuple[int, int]]  # height, width
    maps: list[Tensor]  # (h, w) uint8, the class of each pixel of the original image


class SegmentationWriter(BasePredictionWriter):
    """Write a map of classes of each image to `maps/`, and the image under its map with a legend to `overlays/`.

    A map is a PNG of the image's size whose pixels are class numbers, as `classes.json` lists them with their names and
    colours; it has the colours as its palette, so that it can be looked at. `images.json` has the id, file, size and
    map of every image in the order of the data, whatever the number of ranks. An overlay is drawn on the file where
    that can be read, and otherwise on what the segmentor was fed.

    Args:
        folder: Where to; made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = Path(folder)
        self._images: list[dict[str, Any]] = []  # entries of `images.json`

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: SegmentationPrediction,
        batch_indices: Sequence[int] | None,
        batch: ViewBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        names, colours = _classes(pl_module)
        rows = zip(*(prediction[key] for key in ("path", "image_id", "original_size", "maps")), strict=True)
        for place, (path, image_id, (height, width), found) in enumerate(rows):
            name = output_name(path, image_id)
            labels = found.cpu().numpy().astype(np.uint8)
            overlay = draw_classes(original_picture(batch, place), labels, names, colours)
            # Full colour resolution: letters would bleed.
            overlay.save(self._target(f"overlays/{name}.jpg"), quality=92, subsampling=0)
            indexed = Image.fromarray(labels)
            indexed.putpalette([channel for colour in colours for channel in colour])
            indexed.save(self._target(f"maps/{name}.png"))
            entry = {"id": image_id, "file_name": path, "height": height, "width": width, "map": f"maps/{name}.png"}
            self._images.append(entry)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images, self._images = in_order(self._images), []
        if not trainer.is_global_zero:
            return
        classes = [
            {"id": label, "name": name, "color": list(colour)}
            for label, (name, colour) in enumerate(zip(*_classes(pl_module), strict=True))
        ]
        for name, content in (("images", images), ("classes", classes)):
            self._target(f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        rank_zero_info(f"{len(images)} maps: {self.folder / 'maps'} {self.folder / 'overlays'}")

    def _target(self, name: str) -> Path:
        """Return the path of a file to write, in a folder that exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _classes(module: LightningModule) -> tuple[list[str], list[Colour]]:
    """Return the names and colours of a task's classes: numbers and colours of our own where the data has none."""
    names: list[str] | None = getattr(module, "class_names", None)
    count = len(names) if names else int(module.num_classes)  # type: ignore[arg-type]
    palette: Sequence[Colour] | None = getattr(module, "palette", None)
    return names or [str(label) for label in range(count)], list(palette or map(class_colour, range(count)))
