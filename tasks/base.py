"""What every task shares: optimizer and schedule, frozen stages, compilation, and the weights it starts from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from internimage import Backbone
from internimage.checkpoints import CheckpointError, HeadOption, Report, load_checkpoint
from tasks.optim import is_sampling_parameter, layer_lr_scales, parameter_groups
from tasks.schedules import COSINE, Schedule, with_warmup


@dataclass(frozen=True, kw_only=True)
class InitCheckpoint:
    """Weights to start from; see `internimage.checkpoints.load_checkpoint`.

    Args:
        source: A path, or `hub:NAME` to download a published file.
        head: What becomes of the classifier's last layer: `load` the file's, keep the model's `new` one, or `map`.
        label_map: For `map`: a text file with the row of the file's layer for each class, one a line.
        new_head_scale: For `new`: factor on the initial weights of the last layer.
        allow_missing: Patterns, as of file names, for keys of the model that may keep their values.
        allow_unexpected: Patterns for keys of the file that may be left out.
    """

    source: str
    head: HeadOption = "load"
    label_map: str | None = None
    new_head_scale: float = 1.0
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()


class Task(LightningModule):
    """Base of every task.

    A subclass builds its model, hands it to this constructor, and defines the steps. It logs `train/loss` in each step
    and `headline` in each validation.

    Args:
        model: Has the backbone as its attribute `backbone`.
        optimizer: Called with parameter groups. The learning rate and weight decay it holds are those of the head's
            matrices; norms, biases and layer scales get no weight decay.
        schedule: Of the learning rate, over `trainer.max_steps`.
        warmup_steps: Optimizer steps of linear warm-up.
        warmup_lr_ratio: Learning rate at the first step, as a fraction of the optimizer's.
        layer_decay: Factor on the learning rate from one block to the block before it; 1 trains all layers alike.
        backbone_lr_multiplier: Factor on the learning rate of the whole backbone.
        dcn_lr_multiplier: Factor on the learning rate of DCNv3's offsets and centre feature scale.
        frozen_stages: Stages of the backbone, counted from the input, that stay as they are, together with the stem.
            0 trains everything.
        compile: Compile the backbone with `torch.compile`, for each image size anew. Further sizes than the first eight
            run as they are (`torch._dynamo.config.recompile_limit`), so it serves where sizes are few.
        init_checkpoint: Weights to start `fit` from. A resumed run takes its own weights instead.

    Raises:
        ValueError: An argument is out of its range.
    """

    headline: ClassVar[str]
    # Which of the authors' two rules of layer-wise learning rates holds; see `layer_lr_scales`.
    dense: ClassVar[bool] = False
    # Attributes of the datamodule that the task takes over, and keeps in its checkpoints: predictions have names then
    # where the training data is not at hand. None where the data does not tell.
    data_attributes: ClassVar[tuple[str, ...]] = ("class_names",)
    class_names: list[str] | None

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerCallable,
        schedule: Schedule = COSINE,
        warmup_steps: int = 0,
        warmup_lr_ratio: float = 0.0,
        layer_decay: float = 1.0,
        backbone_lr_multiplier: float = 1.0,
        dcn_lr_multiplier: float = 1.0,
        frozen_stages: int = 0,
        compile: bool = False,
        init_checkpoint: InitCheckpoint | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= warmup_lr_ratio <= 1:
            raise ValueError(
                f"{type(self).__name__}: warmup_lr_ratio is {warmup_lr_ratio}, expected a share of lr from 0 to 1."
            )
        self.model = model
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.lr_factor = partial(
            with_warmup, schedule=schedule, warmup_steps=warmup_steps, warmup_lr_ratio=warmup_lr_ratio
        )
        self.layer_decay = layer_decay
        self.backbone_lr_multiplier = backbone_lr_multiplier
        self.dcn_lr_multiplier = dcn_lr_multiplier
        self.compile_backbone = compile
        self.init_checkpoint = init_checkpoint
        self._take_from({})
        self.frozen = self._freeze(frozen_stages)
        self.train()  # Lightning keeps the modes that it finds

    @property
    def backbone(self) -> Backbone:
        """The model's backbone."""
        backbone = self.model.backbone
        assert isinstance(backbone, Backbone)
        return backbone

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        # Drop path and running statistics of a frozen stage must not move either.
        for name in self.frozen:
            self.backbone.get_submodule(name).eval()
        return self

    def setup(self, stage: str) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        self._take_from({name: getattr(datamodule, name, None) for name in self.data_attributes})
        if stage == "fit":
            # A resumed run overwrites these weights a moment later, when Lightning restores its checkpoint.
            if self.init_checkpoint is not None:
                rank_zero_info(f"{type(self).__name__}: {self.load_weights(self.init_checkpoint)}")
            # In place: the module keeps its class and its state-dict keys. Size by size, since torch 2.14 fails on a
            # graph for all sizes (a symbolic stride that it cannot order).
            if self.compile_backbone:
                self.backbone.compile(dynamic=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {name: getattr(self, name) for name in self.data_attributes}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # What the model was trained on counts, not the data that it is evaluated on.
        self._take_from(checkpoint)

    def log_step(self, loss: Tensor, batch_size: int) -> None:
        """Log the loss of a training step and the highest learning rate."""
        self.log("train/loss", loss, prog_bar=True, batch_size=batch_size)
        self.log("lr", max(group["lr"] for group in self.trainer.optimizers[0].param_groups), batch_size=batch_size)

    def load_weights(self, init: InitCheckpoint) -> Report:
        """Load what `init_checkpoint` names into the model; a task with another loader overrides this."""
        return load_checkpoint(
            self.model,
            init.source,
            head=init.head,
            label_map=init.label_map,
            new_head_scale=init.new_head_scale,
            allow_missing=init.allow_missing,
            allow_unexpected=init.allow_unexpected,
        )

    def load_dense(self, init: InitCheckpoint, load: Callable[..., Report] | None) -> Report:
        """Load what `init` names into a detector or a segmentor by `load`; None loads the backbone alone.

        Raises:
            CheckpointError: `init` asks for what is there for classifiers only.
        """
        if init.head == "map" or init.new_head_scale != 1:
            raise CheckpointError(
                f"{type(self).__name__}: init_checkpoint has head={init.head!r} and new_head_scale="
                f"{init.new_head_scale}, expected head='load' or 'new', and no scale: those are for classifiers."
            )
        allowed: dict[str, Any] = {"allow_missing": init.allow_missing, "allow_unexpected": init.allow_unexpected}
        if load is None:
            return load_checkpoint(self.backbone, init.source, **allowed)
        return load(self.model, init.source, head=init.head, **allowed)

    def lr_scales(self) -> dict[str, float]:
        """Return the factor on the learning rate of each parameter that has one, by its name in the task."""
        scales = layer_lr_scales(self.backbone.layer_groups(), self.layer_decay, dense=self.dense)
        return {
            f"model.backbone.{name}": scale
            * self.backbone_lr_multiplier
            * (self.dcn_lr_multiplier if is_sampling_parameter(name) else 1.0)
            for name, scale in scales.items()
        }

    def is_undecayed(self, name: str) -> bool:
        """Tell whether a matrix gets no weight decay, as vectors get none."""
        return False

    def prediction_writer(self, folder: Path) -> BasePredictionWriter:
        """Return the callback with which the command `predict` writes to `folder` what `predict_step` returns."""
        raise NotImplementedError(
            f"{type(self).__name__}: it has no `prediction_writer`, so `predict` would lose its results. Define "
            "one, or name a BasePredictionWriter in trainer.callbacks."
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        total_steps = self.trainer.max_steps
        if total_steps < 1:
            raise ValueError(
                f"{type(self).__name__}: trainer.max_steps is {total_steps}, expected the number of optimizer steps of "
                "the whole run: the learning-rate schedule ends there. Set it, also where max_epochs is set."
            )
        if self.warmup_steps > total_steps:
            raise ValueError(
                f"{type(self).__name__}: warmup_steps is {self.warmup_steps}, expected at most the {total_steps} of "
                "trainer.max_steps. Scale both for a shorter run."
            )
        scales = self.lr_scales()
        groups = parameter_groups(self.named_parameters(), lambda name: scales.get(name, 1.0), self.is_undecayed)
        optimizer = self.optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        schedule = LambdaLR(optimizer, partial(self.lr_factor, total_steps=total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _take_from(self, values: Mapping[str, Any]) -> None:
        """Take over the data's attributes that `values` has."""
        for name in self.data_attributes:
            if values.get(name) is not None or not hasattr(self, name):
                setattr(self, name, values.get(name))

    def _freeze(self, num_stages: int) -> tuple[str, ...]:
        """Freeze the stem and the first stages; return their names in the backbone."""
        if num_stages == 0:
            return ()
        available = len(self.backbone.widths)
        if not 0 < num_stages <= available:
            raise ValueError(
                f"{type(self).__name__}: frozen_stages is {num_stages}, expected 0 (train all) to {available}."
            )
        frozen = ("stem", *(f"stages.{stage}" for stage in range(num_stages)))
        for name in frozen:
            self.backbone.get_submodule(name).requires_grad_(False)
        return frozen
