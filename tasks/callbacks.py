"""What happens around training steps: averaged weights, the last checkpoint, repeatable randomness, a check."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor


class EMA(Callback):
    """Exponential moving average of the weights, which is what is validated and saved.

    Averages and updates are float32 whatever the training precision, one update for each optimizer step. Floating-point
    buffers (running statistics of batch norms) are averaged too, as the authors do; counters are copied. A checkpoint
    holds the averages as its `state_dict`, so whatever loads it gets the weights that were validated, and the weights
    in training as `current_state_dict`, from which a resumed run continues.

    Args:
        decay: Share of the old average that an update keeps, in [0, 1). It looks back about `1 / (1 - decay)` steps.
        ramp_steps: Keep less at first: after step t the new weights count `exp(-t / ramp_steps)` more of the way. The
            authors' detectors take 2000, their classifiers 0, which is off.

    Raises:
        ValueError: An argument is out of its range, or the strategy splits weights over ranks.
    """

    def __init__(self, decay: float, ramp_steps: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay is {decay}, expected a number in [0, 1), for example 0.9999.")
        if ramp_steps < 0:
            raise ValueError(f"EMA: ramp_steps is {ramp_steps}, expected a number of steps, or 0 for none.")
        self.decay = decay
        self.ramp_steps = ramp_steps
        self.average: dict[str, Tensor] | None = None
        self._training: dict[str, Tensor] | None = None  # the weights in training while the average is in the model
        self._updates = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = type(trainer.strategy).__name__
        if stage == "fit" and strategy in ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"):
            raise ValueError(
                f"EMA: {strategy} keeps or saves weights in pieces, which this callback does not see. "
                "Train with ddp, or take EMA out of trainer.callbacks."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        self.average = _float32(checkpoint["state_dict"])
        if "current_state_dict" in checkpoint:
            pl_module.load_state_dict(checkpoint["current_state_dict"])
        else:
            rank_zero_info("EMA: the checkpoint holds no averages; they start from its weights.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Late, so that `init_checkpoint` is in the model.
        average = self.average if self.average is not None else _float32(pl_module.state_dict())
        self.average = {name: tensor.to(pl_module.device) for name, tensor in average.items()}
        self._updates = trainer.global_step
        rank_zero_info(f"EMA: validating and saving the averaged weights (decay {self.decay}).")

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._updates:  # accumulating
            return
        self._updates = trainer.global_step
        assert self.average is not None
        averages, weights = [], []
        for name, tensor in pl_module.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.average[name])
                weights.append(tensor.float())
            else:
                self.average[name].copy_(tensor)
        early = math.exp(-self._updates / self.ramp_steps) if self.ramp_steps else 0.0
        torch._foreach_lerp_(averages, weights, (1 - self.decay) + self.decay * early)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.average is not None:
            self._training = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
            _copy(self.average, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.average is not None:
            checkpoint["current_state_dict"] = self._training or checkpoint["state_dict"]
            checkpoint["state_dict"] = self.average

    def _restore(self, pl_module: LightningModule) -> None:
        if self._training is not None:
            _copy(self._training, pl_module)
            self._training = None


class LastCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that keeps the newest state only, and saves it when training ends as well.

    The arguments say when else: by default at each validation. Lightning's own would lose the steps after the last one.
    """

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last_global_step_saved != trainer.global_step and self.dirpath is not None:
            trainer.save_checkpoint(Path(self.dirpath) / f"{self.filename}{self.FILE_EXTENSION}")


class StepSeed(Callback):
    """Make the randomness of a training step a function of the seed, the rank, the epoch and the batch.

    Drop path, mixup and whatever else draws from torch's generators in the step then repeat exactly in a run that was
    killed and resumed, with nothing to save. The seed is that of `seed_everything`; without one, nothing is done.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (seed := os.environ.get("PL_GLOBAL_SEED")) is not None:
            key = [int(seed), trainer.global_rank, trainer.current_epoch, batch_idx]
            torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


class FiniteLoss(Callback):
    """Stop with an error once the loss is not a finite number.

    Looked at every `trainer.log_every_n_steps` steps, when the loss is read for the loggers anyway: reading it waits
    for the device.

    Raises:
        FloatingPointError: The loss is infinite or not a number.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % max(1, getattr(trainer, "log_every_n_steps", 1)):
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{type(pl_module).__name__}: train/loss is {loss.item()} at step {trainer.global_step} (epoch "
                f"{trainer.current_epoch}, batch {batch_idx}, rank {trainer.global_rank}). Lower the learning rate, "
                "lengthen the warm-up, set trainer.gradient_clip_val, or train in bf16-mixed instead of 16-mixed; then "
                "start again from the last checkpoint."
            )


def _float32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a state dict, its floating-point tensors as float32."""
    return {
        name: tensor.detach().to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in state.items()
    }


@torch.no_grad()
def _copy(state: dict[str, Tensor], pl_module: LightningModule) -> None:
    # In place: the optimizer, DDP and compiled code hold on to these tensors.
    for name, tensor in pl_module.state_dict().items():
        tensor.copy_(state[name])
