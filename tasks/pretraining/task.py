"""Pretraining on images and their texts."""

from pathlib import Path
from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from datamodules.batch import ClassificationBatch, ImageTextBatch, PredictBatch
from internimage import Backbone, ClipProjectorHead, HeadFactory
from internimage.checkpoints import Report
from tasks.base import InitCheckpoint, Task
from tasks.pretraining.embeddings import Embeddings, EmbeddingWriter, embed
from tasks.pretraining.evaluation import Evaluation
from tasks.pretraining.objectives import Objective
from tasks.pretraining.text import ClipText
from tasks.pretraining.towers import TextFactory, Towers
from tasks.pretraining.weights import load_towers


class Pretraining(Task):
    """An image tower and a text tower, trained by an objective.

    Contrastive terms compare the samples of all devices in one step, so `trainer.accumulate_grad_batches` adds batches
    up without comparing them.

    Validation measures retrieval on batches with texts. On batches with labels it measures zero-shot classification
    where the datamodule has `class_prompts`: token ids `(C, T, L)` of T prompts for each class, and their lengths
    `(C, T)`. Metrics of a second loader of the same kind are named `val/<x>/dataloader_<number>`. Where no loader has
    texts, let checkpoint_best.monitor be `val/zero_shot_top1`.

    Args:
        backbone: Gives the features.
        optimizer: See `Task`. Scale and bias of similarities get no weight decay; embeddings of tokens and positions
            do, as in CLIP.
        objective: What is minimised.
        head: Makes the image head from `(backbone.widths, embed_dim)`. A classifier with the same head can start from
            this run with `init_checkpoint.head: new`.
        text: Makes the text tower from `embed_dim`.
        embed_dim: Length of the embeddings.
        num_classes: Classes of the labels, for objectives that use them. The command line takes it from the data; leave
            it out of YAML.
        **recipe: Optimizer, schedule, freezing and initial weights: see `Task`.

    Raises:
        ValueError: An argument is out of its range, or the data does not have what the objective needs.
    """

    headline = "val/retrieval_r1"

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable,
        objective: Objective,
        head: HeadFactory = ClipProjectorHead,
        text: TextFactory = ClipText,
        embed_dim: int = 768,
        num_classes: int | None = None,
        **recipe: Any,
    ) -> None:
        super().__init__(Towers(backbone, embed_dim, head, text), optimizer=optimizer, **recipe)
        self.num_classes = num_classes
        self.objective = objective
        self.objective.build(self.towers, num_classes)
        self._evaluation: Evaluation | None = None

    @property
    def towers(self) -> Towers:
        """The model."""
        assert isinstance(self.model, Towers)
        return self.model

    def forward(self, image: Tensor) -> Tensor:
        """Map `(B, 3, H, W)` images to unit vectors `(B, embed_dim)`, float32."""
        return self.towers.encode_image(image)

    def load_weights(self, init: InitCheckpoint) -> Report:
        return load_towers(self.towers, init)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        if self.objective.num_views > 1 and "other_image" not in batch:
            raise ValueError(
                f"{type(self.objective).__name__}: the batch has no `other_image`, expected two views of each image. "
                "Choose a training transform that makes two."
            )
        losses = self.objective.losses(self.towers, batch)
        loss = sum(losses.values())
        assert isinstance(loss, Tensor)
        size = len(batch["image"])
        self.log_step(loss, size)
        values = {name: value.detach() for name, value in losses.items()} | self.objective.meters()
        self.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=size)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.towers.limit_scale()
        # Lightning counts the step a moment later.
        self.objective.after_step(self.towers, self.trainer.global_step + 1, self.trainer.max_steps)

    def on_validation_epoch_start(self) -> None:
        self._evaluation = Evaluation(self.towers, self._prompts())

    def validation_step(
        self, batch: ImageTextBatch | ClassificationBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert self._evaluation is not None
        self._evaluation.update(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: ImageTextBatch | ClassificationBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: ImageTextBatch | PredictBatch, batch_idx: int, dataloader_idx: int = 0) -> Embeddings:
        return embed(self.towers, batch)

    def prediction_writer(self, folder: Path) -> EmbeddingWriter:
        return EmbeddingWriter(folder)

    def _log_evaluation(self, stage: str) -> None:
        assert self._evaluation is not None
        # Every rank has the same numbers.
        values = {f"{stage}/{name}": value for name, value in self._evaluation.compute().items()}
        self.log_dict({name: value for name, value in values.items() if name != f"{stage}/retrieval_r1"})
        if (headline := values.get(f"{stage}/retrieval_r1")) is not None:
            self.log(f"{stage}/retrieval_r1", headline, prog_bar=True)
        # Embeddings of a large data set do not stay in memory.
        self._evaluation = None

    def _prompts(self) -> tuple[Tensor, Tensor] | None:
        """Return the datamodule's prompts."""
        prompts = getattr(getattr(self.trainer, "datamodule", None), "class_prompts", None)
        if prompts is None:
            return None
        ids, length = prompts
        if ids.ndim != 3 or ids.shape[:2] != length.shape or self.num_classes not in (None, len(ids)):
            raise ValueError(
                f"Pretraining: class_prompts of the data are {tuple(ids.shape)} token ids and {tuple(length.shape)} "
                "lengths, expected (classes, prompts, tokens) and (classes, prompts)"
                + ("" if self.num_classes is None else f" with {self.num_classes} classes")
                + "."
            )
        return ids, length
