"""What every task shares: optimizer and schedule, frozen stages, compilation, and the weights it starts from."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from internimage import Backbone
from internimage.checkpoints import HeadOption, load_checkpoint
from tasks.optim import is_sampling_parameter, layer_lr_scales, parameter_groups, warmup_cosine


@dataclass(frozen=True, kw_only=True)
class InitCheckpoint:
    """Weights to start from; see `internimage.checkpoints.load_checkpoint`.

    Args:
        source: A path, or `hub:NAME` to download a published file.
        head: What becomes of the classifier's last layer: `load` the file's, keep the model's `new` one, or `map`.
        label_map: For `map`: a text file with the row of the file's layer for each class, one a line.
        new_head_scale: For `new`: factor on the initial weights of the last layer.
    """

    source: str
    head: HeadOption = "load"
    label_map: str | None = None
    new_head_scale: float = 1.0


class Task(LightningModule):
    """Base of every task.

    A subclass builds its model, hands it to this constructor, and defines the steps. It logs `train/loss` in each step
    and `headline` in each validation.

    Args:
        model: Has the backbone as its attribute `backbone`.
        optimizer: Called with parameter groups. The learning rate and weight decay it holds are those of the head's
            matrices; norms, biases and layer scales get no weight decay.
        warmup_steps: Optimizer steps of linear warm-up. The schedule ends at `trainer.max_steps`.
        warmup_lr_ratio: Learning rate at the first step, as a fraction of the optimizer's.
        min_lr_ratio: Learning rate at the last step, as a fraction of the optimizer's.
        layer_decay: Factor on the learning rate from one block to the block before it; 1 trains all layers alike.
        dcn_lr_multiplier: Factor on the learning rate of DCNv3's offsets and centre feature scale.
        frozen_stages: Stages of the backbone, counted from the input, that stay as they are, together with the stem.
            0 trains everything.
        compile: Compile the backbone with `torch.compile`.
        init_checkpoint: Weights to start `fit` from. A resumed run takes its own weights instead.

    Raises:
        ValueError: An argument is out of its range.
    """

    headline: ClassVar[str]

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: OptimizerCallable,
        warmup_steps: int = 0,
        warmup_lr_ratio: float = 0.0,
        min_lr_ratio: float = 0.0,
        layer_decay: float = 1.0,
        dcn_lr_multiplier: float = 1.0,
        frozen_stages: int = 0,
        compile: bool = False,
        init_checkpoint: InitCheckpoint | None = None,
    ) -> None:
        super().__init__()
        for name, ratio in (("warmup_lr_ratio", warmup_lr_ratio), ("min_lr_ratio", min_lr_ratio)):
            if not 0 <= ratio <= 1:
                raise ValueError(f"{type(self).__name__}: {name} is {ratio}, expected a share of lr from 0 to 1.")
        self.model = model
        self.optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.schedule = partial(
            warmup_cosine, warmup_steps=warmup_steps, warmup_lr_ratio=warmup_lr_ratio, min_lr_ratio=min_lr_ratio
        )
        self.layer_decay = layer_decay
        self.dcn_lr_multiplier = dcn_lr_multiplier
        self.compile_backbone = compile
        self.init_checkpoint = init_checkpoint
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
        if stage == "fit":
            # A resumed run overwrites these weights a moment later, when Lightning restores its checkpoint.
            if (init := self.init_checkpoint) is not None:
                report = load_checkpoint(
                    self.model,
                    init.source,
                    head=init.head,
                    label_map=init.label_map,
                    new_head_scale=init.new_head_scale,
                )
                rank_zero_info(f"{type(self).__name__}: {report}")
            # In place: the module keeps its class and its state-dict keys.
            if self.compile_backbone:
                self.backbone.compile()

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
        scales = {
            f"model.backbone.{name}": scale
            for name, scale in layer_lr_scales(self.backbone.layer_groups(), self.layer_decay).items()
        }

        def lr_scale(name: str) -> float:
            return scales.get(name, 1.0) * (self.dcn_lr_multiplier if is_sampling_parameter(name) else 1.0)

        optimizer = self.optimizer(parameter_groups(self.named_parameters(), lr_scale))
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        schedule = LambdaLR(optimizer, partial(self.schedule, total_steps=total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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
