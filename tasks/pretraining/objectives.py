"""What is minimised in pretraining: objectives, and the two that compare images with texts alone."""

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn

from datamodules.batch import ImageTextBatch
from tasks.pretraining.contrastive import clip_loss, siglip_loss
from tasks.pretraining.towers import Towers

Meters: TypeAlias = dict[str, Tensor | float]


class Objective(nn.Module):
    """Base of every objective. Modules and buffers of its own are trained, saved and resumed with the task's.

    Attributes:
        num_views: Random views of an image that it takes: 1, or 2 for `other_image` and `view` in the batch.
    """

    num_views: int = 1

    def build(self, towers: Towers, num_classes: int | None) -> None:
        """Make what depends on the towers: own modules, initial values. Called once, before weights are loaded.

        Args:
            towers: What is trained.
            num_classes: Classes that `label` of a batch is in, None where the data has none.

        Raises:
            ValueError: The objective cannot be had with these towers or this data.
        """

    def losses(self, towers: Towers, batch: ImageTextBatch) -> dict[str, Tensor]:
        """Return weighted terms, scalars, whose sum is the loss; logged as `train/<name>`.

        Each is this process's part: the mean over processes is the term of the whole batch.
        """
        raise NotImplementedError(f"{type(self).__name__}: define `losses`.")

    def after_step(self, towers: Towers, step: int, total_steps: int) -> None:
        """Do what follows an optimizer step, the first of which is number 1 of `total_steps`."""

    def meters(self) -> Meters:
        """Return what else is logged, of the last `losses`, as `train/<name>`."""
        return {}


class Contrastive(Objective):
    """An objective of unit vectors of images and of their texts."""

    def __init__(self) -> None:
        super().__init__()
        self._meters: Meters = {}

    def losses(self, towers: Towers, batch: ImageTextBatch) -> dict[str, Tensor]:
        image, text = towers.embed_image(batch["image"]), towers.embed_text(batch["text"], batch["text_length"])
        self._meters = {
            "scale": towers.scale().detach(),
            "image_norm": image.detach().norm(dim=-1).mean(),
            "text_norm": text.detach().norm(dim=-1).mean(),
        }
        return {"contrastive": self.compare(towers, towers.unit(image), towers.unit(text), batch["valid"])}

    def compare(self, towers: Towers, image: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        """Map unit vectors `(B, embed_dim)` of images and texts to the loss."""
        raise NotImplementedError(f"{type(self).__name__}: define `compare`.")

    def meters(self) -> Meters:
        return self._meters


class Clip(Contrastive):
    """Softmax over all texts for each image and over all images for each text; see `clip_loss`.

    Args:
        label_smoothing: Probability that is spread evenly over all answers, 0 to 1.
        initial_scale: First factor on cosine similarities, above 0; it is learnt.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, label_smoothing: float = 0.0, initial_scale: float = 1 / 0.07) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"Clip: label_smoothing is {label_smoothing}, expected 0 to 1.")
        _check_scale(type(self).__name__, initial_scale)
        self.label_smoothing = label_smoothing
        self.initial_scale = initial_scale

    def build(self, towers: Towers, num_classes: int | None) -> None:
        towers.start_scale(self.initial_scale)

    def compare(self, towers: Towers, image: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        return clip_loss(image, text, towers.scale(), valid, label_smoothing=self.label_smoothing)


class SigLip(Contrastive):
    """A decision for each image and each text alone; see `siglip_loss`.

    Args:
        initial_scale: First factor on cosine similarities, above 0; it is learnt.
        initial_bias: First value of what is added to them; low, since nearly all pairs are wrong. It is learnt.

    Raises:
        ValueError: `initial_scale` is out of its range.
    """

    def __init__(self, initial_scale: float = 10.0, initial_bias: float = -10.0) -> None:
        super().__init__()
        _check_scale(type(self).__name__, initial_scale)
        self.initial_scale = initial_scale
        self.initial_bias = initial_bias

    def build(self, towers: Towers, num_classes: int | None) -> None:
        towers.start_scale(self.initial_scale)
        towers.bias = nn.Parameter(torch.tensor(self.initial_bias))

    def compare(self, towers: Towers, image: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        assert towers.bias is not None
        return siglip_loss(image, text, towers.scale(), towers.bias, valid)


def _check_scale(name: str, scale: float) -> None:
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{name}: initial_scale is {scale}, expected a number above 0.")
