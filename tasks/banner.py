"""What a run says about itself before the first step."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from ops import build
from tasks.base import Task


class StartBanner(Callback):
    """Print model, operator, precision, global batch, length and folder of a run, once, on the first rank.

    Args:
        tuned_batch: Images per optimizer step that the recipe was tuned for; another number warns.
    """

    def __init__(self, tuned_batch: int | None = None) -> None:
        self.tuned_batch = tuned_batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = {
            "model": _model(pl_module),
            "parameters": _parameters(pl_module),
            "operator": f"dcnv3: {_operator(trainer.strategy.root_device.type)}",
            "precision": f"{trainer.precision} on {trainer.world_size} x {trainer.strategy.root_device.type}",
            "global batch": self._global_batch(trainer),
            "length": _length(trainer),
            "folder": _folder(trainer),
        }
        rank_zero_info("\n".join(f"{name:<13} {value}" for name, value in rows.items()))

    def _global_batch(self, trainer: Trainer) -> str:
        batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        if batch_size is None:
            return "not known: the datamodule has no batch_size"
        devices = trainer.world_size // trainer.num_nodes
        factors = (devices, trainer.num_nodes, trainer.accumulate_grad_batches, batch_size)
        total = devices * trainer.num_nodes * trainer.accumulate_grad_batches * batch_size
        if self.tuned_batch not in (None, total):
            rank_zero_warn(
                f"The global batch is {total} and this recipe was tuned for {self.tuned_batch}. Change "
                "trainer.accumulate_grad_batches, data.batch_size or the number of devices to reach it, or scale the "
                f"learning rate by {total / self.tuned_batch:g} and trainer.max_steps by {self.tuned_batch / total:g}."
            )
        tuned = "" if self.tuned_batch is None else f", tuned for {self.tuned_batch}"
        return f"{total} = {' x '.join(map(str, factors))} (devices x nodes x accumulation x batch_size{tuned})"


def _model(pl_module: LightningModule) -> str:
    name = type(pl_module).__name__
    if not isinstance(pl_module, Task):
        return name
    config = getattr(pl_module.backbone, "config", None)
    shape = "" if config is None else f" (channels {config.channels}, depths {'-'.join(map(str, config.depths))})"
    return f"{name} with {type(pl_module.backbone).__name__}{shape}"


def _operator(device: str) -> str:
    if device in ("cpu", "cuda") and build.load("cuda" if device == "cuda" else "cpp"):
        return f"compiled {device.upper()} kernel"
    return "PyTorch reference"


def _parameters(module: nn.Module) -> str:
    total = sum(parameter.numel() for parameter in module.parameters())
    trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return f"{total:,}, {trainable:,} of them trained"


def _length(trainer: Trainer) -> str:
    batches = trainer.num_training_batches
    steps_per_epoch = batches / trainer.accumulate_grad_batches
    done = f", {trainer.global_step} of them done" if trainer.global_step else ""
    epochs = f" = {trainer.max_steps / steps_per_epoch:.4g} epochs of {batches} batches" if batches else ""
    return f"{trainer.max_steps} optimizer steps{epochs}{done}"


def _folder(trainer: Trainer) -> str:
    logs = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "none"
    checkpoints = "checkpoints/" if trainer.checkpoint_callbacks else "none"
    return f"{Path(trainer.default_root_dir)} (logs: {logs}; checkpoints: {checkpoints})"
