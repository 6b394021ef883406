"""What `predict` leaves behind: one JSON line for each image, and a contact sheet to look at."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from datamodules.batch import PredictBatch
from tasks.writing import in_order, picture

_SHEET_IMAGES = 32
_SHEET_COLUMNS = 4
# In pixels: side of an image, width of the bars beside it, height of a bar with its label, space around both.
_SIDE, _BARS, _ROW, _GAP = 140, 170, 28, 10
_PAPER, _INK, _BAR, _BEST_BAR = "white", "black", "#c8d4e6", "#7fa8f5"


class ClassPrediction(TypedDict):
    """The most probable classes of a batch, best first.

    Keys:
        path: Files, B of them.
        probability: `(B, k)` float32.
        label: `(B, k)` int64.
    """

    path: list[str]
    probability: Tensor
    label: Tensor


class Line(TypedDict):
    """One image's line in `predictions.jsonl`, best class first."""

    path: str
    labels: list[str]
    probabilities: list[float]


class PredictionWriter(BasePredictionWriter):
    """Write `predictions.jsonl`, and `predictions.png` with the first images beside their most probable classes.

    Lines are in the order of the data, whatever the number of ranks.

    Args:
        folder: Where to; made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self._lines: list[Line] = []
        self._images: list[Image.Image] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: ClassPrediction,
        batch_indices: Sequence[int] | None,
        batch: PredictBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        names = getattr(pl_module, "class_names", None)
        rows = zip(prediction["path"], prediction["label"].tolist(), prediction["probability"].tolist(), strict=True)
        for path, labels, probabilities in rows:
            self._lines.append(
                {
                    "path": path,
                    "labels": [names[label] if names else str(label) for label in labels],
                    "probabilities": [round(probability, 6) for probability in probabilities],
                }
            )
        for image in batch["image"][: max(0, _SHEET_IMAGES - len(self._images))]:
            self._images.append(picture(image))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lines, images = in_order(self._lines), in_order(self._images)
        self._lines, self._images = [], []
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        text, sheet = self.folder / "predictions.jsonl", self.folder / "predictions.png"
        text.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        contact_sheet(images[:_SHEET_IMAGES], lines[:_SHEET_IMAGES]).save(sheet)
        rank_zero_info(f"{len(lines)} predictions: {text} {sheet}")


def contact_sheet(images: Sequence[Image.Image], lines: Sequence[Line]) -> Image.Image:
    """Draw each image with its most probable classes beside it, a bar for each, as wide as its probability."""
    columns = max(1, min(_SHEET_COLUMNS, len(images)))
    cell = (_SIDE + _BARS + 3 * _GAP, max(_SIDE, _ROW * max((len(line["labels"]) for line in lines), default=0)) + _GAP)
    sheet = Image.new("RGB", (columns * cell[0], -(-max(1, len(images)) // columns) * cell[1] + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for place, (image, line) in enumerate(zip(images, lines, strict=True)):
        left, top = place % columns * cell[0] + _GAP, place // columns * cell[1] + _GAP
        # Small images keep their pixels visible.
        resample = Image.Resampling.NEAREST if image.width < _SIDE else Image.Resampling.BICUBIC
        sheet.paste(image.resize((_SIDE, _SIDE), resample), (left, top))
        left += _SIDE + _GAP
        for rank, (label, probability) in enumerate(zip(line["labels"], line["probabilities"], strict=True)):
            row = top + rank * _ROW
            width = max(1, round(_BARS * probability))
            draw.rectangle((left, row, left + width, row + _ROW - 4), fill=_BAR if rank else _BEST_BAR)
            draw.text((left + 4, row + 5), f"{probability:4.0%} {label}", fill=_INK, font=font)
    return sheet
