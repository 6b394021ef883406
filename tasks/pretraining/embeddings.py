"""What `predict` leaves behind after pretraining: the embeddings, under the names of their samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tasks.pretraining.towers import Towers

# Of one file: about 0.4 GB where an image and a text have 768 numbers each.
_ROWS = 65_536


class Embeddings(TypedDict):
    """The embeddings of a batch.

    Keys:
        key: Where each sample came from.
        image: Unit vectors, `(B, D)` float32.
        text: The same of texts, where the data has them.
    """

    key: list[str]
    image: Tensor
    text: NotRequired[Tensor]


def embed(towers: Towers, batch: Any) -> Embeddings:
    """Embed what is valid of an `ImageTextBatch` or a `PredictBatch`."""
    keys: list[str] = batch["key"] if "key" in batch else batch["path"]
    valid = batch.get("valid")
    vectors = {"image": towers.encode_image(batch["image"])}
    if "text" in batch:
        vectors["text"] = towers.encode_text(batch["text"], batch["text_length"])
    if valid is not None:
        vectors = {name: vector[valid] for name, vector in vectors.items()}
        keys = [key for key, counts in zip(keys, valid.tolist(), strict=True) if counts]
    embeddings: Embeddings = {"key": keys, "image": vectors["image"]}
    if "text" in vectors:
        embeddings["text"] = vectors["text"]
    return embeddings


class EmbeddingWriter(BasePredictionWriter):
    """Write `embeddings_<rank>_<part>.npz` with the arrays `key`, `image` and, where the data has texts, `text`.

    Each rank writes its own files, a new one when the last is full: nothing is gathered, and memory stays bounded.

    Args:
        folder: Where to; made if it does not exist.
        num_rows: Samples of a file.
    """

    def __init__(self, folder: Path, num_rows: int = _ROWS) -> None:
        super().__init__(write_interval="batch")
        self.folder = folder
        self.num_rows = num_rows
        self._keys: list[str] = []
        self._rows: dict[str, list[Any]] = {}
        self._num_parts = 0

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Embeddings,
        batch_indices: Sequence[int] | None,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        arrays = {name: prediction[name].cpu().numpy() for name in ("image", "text") if name in prediction}
        if self._rows and self._rows.keys() != arrays.keys():
            self._write(trainer.global_rank)
        for name, array in arrays.items():
            self._rows.setdefault(name, []).append(array)
        self._keys += prediction["key"]
        if len(self._keys) >= self.num_rows:
            self._write(trainer.global_rank)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._keys:
            self._write(trainer.global_rank)
        rank_zero_info(f"{self._num_parts} files of embeddings from rank 0: {self.folder}")
        self._num_parts = 0

    def _write(self, rank: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"embeddings_{rank:05d}_{self._num_parts:05d}.npz"
        arrays: dict[str, Any] = {name: np.concatenate(rows) for name, rows in self._rows.items()}
        np.savez(path, key=np.array(self._keys), **arrays)
        self._keys, self._rows = [], {}
        self._num_parts += 1
