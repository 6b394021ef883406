"""A callback that keeps what every rank of a run saw, since loggers keep rank 0's alone."""

from pathlib import Path

import torch
from lightning.pytorch import Callback


class RankRecord(Callback):
    """Write `rank_<n>.pt`: what was logged of each training step, and the last weights."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        self.steps.append({"step": trainer.global_step} | logged)

    def on_train_end(self, trainer, pl_module):
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = {"steps": self.steps, "weights": pl_module.state_dict()}
        torch.save(kept, self.folder / f"rank_{trainer.global_rank}.pt")
