"""What two towers are measured by, over one or several loaders of pairs and of labelled images."""

from typing import Any

import torch
from torch import Tensor

from tasks.pretraining.retrieval import Retrieval
from tasks.pretraining.towers import Towers
from tasks.pretraining.zero_shot import ZeroShot, encode_classes


class Evaluation:
    """Counts of one validation or test: retrieval on batches with texts, zero-shot classification on those with labels.

    Every rank has to see the same loaders.

    Args:
        towers: In evaluation mode, with the weights that are measured.
        prompts: Token ids `(C, T, L)` of T prompts for each of C classes, and their lengths `(C, T)`; None leaves
            zero-shot classification out.
    """

    def __init__(self, towers: Towers, prompts: tuple[Tensor, Tensor] | None) -> None:
        self.towers = towers
        self.prompts = prompts
        self._classes: Tensor | None = None
        self._retrieval: dict[int, Retrieval] = {}
        self._zero_shot: dict[int, ZeroShot] = {}

    @torch.no_grad()
    def update(self, batch: Any, loader: int) -> None:
        """Count a batch (`ImageTextBatch` or `ClassificationBatch`) of the loader with this number."""
        image = self.towers.encode_image(batch["image"])
        valid = batch.get("valid")
        if valid is None:
            valid = torch.ones(len(image), dtype=torch.bool, device=image.device)
        if "text" in batch:
            text = self.towers.encode_text(batch["text"], batch["text_length"])
            if loader not in self._retrieval:
                self._retrieval[loader] = Retrieval().to(image.device)
            self._retrieval[loader].update(image, text, valid)
        if "label" in batch and self.prompts is not None:
            if loader not in self._zero_shot:
                self._zero_shot[loader] = ZeroShot().to(image.device)
            self._zero_shot[loader].update(image, self._class_vectors(image.device), batch["label"], valid)

    def compute(self) -> dict[str, Tensor]:
        """Return metrics over all ranks; from the second loader of a kind on, names end in `/dataloader_<number>`."""
        values: dict[str, Tensor] = {}
        for metrics in (self._retrieval, self._zero_shot):
            first = True
            for loader in sorted(metrics):
                measured: dict[str, Tensor] = metrics[loader].compute()
                ending = "" if first else f"/dataloader_{loader}"
                values |= {f"{name}{ending}": value for name, value in measured.items()}
                # A loader of pairs without labels does not take the name from one that has them.
                first = first and not measured
        return values

    def _class_vectors(self, device: torch.device) -> Tensor:
        if self._classes is None:
            assert self.prompts is not None
            ids, length = (part.to(device) for part in self.prompts)
            self._classes = encode_classes(self.towers, ids, length)
        return self._classes
