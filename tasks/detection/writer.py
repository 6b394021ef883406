"""What `predict` leaves behind for a detector: COCO's list of results, and a picture of each image."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from hotcoco import mask
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torchvision.ops import box_convert

from datamodules.batch import ViewBatch
from tasks.detection.drawing import draw_detections
from tasks.detection.postprocess import Detections
from tasks.detection.tta import DetectionPrediction, select
from tasks.writing import in_order, original_picture, output_name


class Segmentation(TypedDict):
    """A mask as COCO's compressed run lengths, in JSON."""

    size: list[int]  # height, width
    counts: str


class Result(TypedDict):
    """One detection in `predictions.json`."""

    image_id: int | str
    category_id: int
    bbox: list[float]  # left, top, width, height
    score: float
    segmentation: NotRequired[Segmentation]


class DetectionWriter(BasePredictionWriter):
    """Write `predictions.json`, and each image with what was found in it to `images/`.

    `predictions.json` is COCO's list of results, all of them, whatever their scores. `images.json` has the id, file
    and size of every image, and `categories.json` the ids and names of the classes where the task has `class_names`
    (and `category_ids`; labels are the ids otherwise). All are in the order of the data, whatever the number of ranks.
    A picture is drawn on the file where that can be read, and otherwise on what the detector was fed.

    Args:
        folder: Where to; made if it does not exist.
        min_score: Smallest score that is drawn, 0 to 1.

    Raises:
        ValueError: `min_score` is out of its range.
    """

    def __init__(self, folder: Path, *, min_score: float = 0.3) -> None:
        if not 0 <= min_score <= 1:
            raise ValueError(f"DetectionWriter: min_score is {min_score}, expected 0 to 1.")
        super().__init__(write_interval="batch")
        self.folder = Path(folder)
        self.min_score = min_score
        # Of each image: its entry in `images.json`, and its results.
        self._found: list[tuple[dict[str, Any], list[Result]]] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: DetectionPrediction,
        batch_indices: Sequence[int] | None,
        batch: ViewBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        names, ids = (getattr(pl_module, name, None) for name in ("class_names", "category_ids"))
        rows = zip(*(prediction[key] for key in ("path", "image_id", "original_size", "detections")), strict=True)
        for place, (path, image_id, (height, width), found) in enumerate(rows):
            entry = {"id": image_id, "file_name": path, "height": height, "width": width}
            self._found.append((entry, coco_results(found, image_id, ids)))
            image = original_picture(batch, place)
            drawn = draw_detections(image, select(found, found["scores"] >= self.min_score), names)
            target = self.folder / "images" / f"{output_name(path, image_id)}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            # Full colour resolution: thin lines and letters would bleed.
            drawn.save(target, quality=92, subsampling=0)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found, self._found = in_order(self._found), []
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        results = [result for _, of_image in found for result in of_image]
        self._dump("predictions.json", results)
        self._dump("images.json", [entry for entry, _ in found])
        if names := getattr(pl_module, "class_names", None):
            ids = getattr(pl_module, "category_ids", None) or range(len(names))
            self._dump("categories.json", [{"id": id, "name": name} for id, name in zip(ids, names, strict=True)])
        rank_zero_info(
            f"{len(results)} detections in {len(found)} images: {self.folder / 'predictions.json'} "
            f"{self.folder / 'images'}"
        )

    def _dump(self, name: str, content: list[Any]) -> None:
        (self.folder / name).write_text(json.dumps(content), encoding="utf-8")


def coco_results(detections: Detections, image_id: int | str, category_ids: Sequence[int] | None) -> list[Result]:
    """Write detections on the original image as COCO's results.

    Args:
        detections: Masks, where there are any, `(N, H, W)` bool.
        image_id: The image's.
        category_ids: Id of each label; labels are written as they are without it.
    """
    boxes = box_convert(detections["boxes"].cpu().double(), "xyxy", "xywh").tolist()
    rows = zip(boxes, detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
    results = [
        Result(
            image_id=image_id,
            category_id=category_ids[label] if category_ids else label,
            bbox=[round(number, 2) for number in box],
            score=round(score, 6),
        )
        for box, label, score in rows
    ]
    if "masks" in detections:
        for result, image in zip(results, detections["masks"].cpu().numpy(), strict=True):
            lengths = mask.encode(image)
            result["segmentation"] = {"size": lengths["size"], "counts": lengths["counts"].decode("ascii")}
    return results
