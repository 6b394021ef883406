"""Classification by what classes are called: the class whose prompts are most similar to an image.

Shapes: B batch, C classes, T prompts of a class, L tokens of a prompt, D length of an embedding.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from tasks.pretraining.towers import Towers

# Prompts that are encoded at a time.
_CHUNK = 256


class ZeroShot(Metric):
    """Share of images whose class is the most similar one, and among the five most similar, over all ranks."""

    full_state_update = False
    top1: Tensor
    top5: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("top1", "top5", "total"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, image: Tensor, classes: Tensor, label: Tensor, valid: Tensor) -> None:
        """Count a batch.

        Args:
            image: Unit vectors, `(B, D)`.
            classes: Unit vectors, `(C, D)`.
            label: `(B,)` int64; below 0 where there is none.
            valid: `(B,)` bool; images that are not do not count, nor do those without a label.
        """
        # In float32 whatever the precision of the step: bfloat16 makes classes equal that are not.
        with torch.autocast(image.device.type, enabled=False):
            best = (image @ classes.T).topk(min(5, len(classes))).indices
        hit = (best == label[:, None]) & (valid & (label >= 0))[:, None]
        self.top1 += hit[:, 0].sum()
        self.top5 += hit.sum()
        self.total += (valid & (label >= 0)).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return `zero_shot_top1` and `zero_shot_top5`, shares from 0 to 1; nothing where no image has a label."""
        if not self.total:
            return {}
        return {"zero_shot_top1": self.top1 / self.total, "zero_shot_top5": self.top5 / self.total}


@torch.no_grad()
def encode_classes(towers: Towers, prompts: Tensor, length: Tensor) -> Tensor:
    """Return for each class the direction of the mean over its prompts' unit vectors, `(C, D)` of length 1.

    Args:
        towers: In evaluation mode.
        prompts: Token ids, `(C, T, L)` int64, on the device of `towers`.
        length: Tokens of each prompt, `(C, T)` int64.
    """
    ids, lengths = prompts.flatten(0, 1), length.flatten()
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(ids), _CHUNK)]
    vectors = torch.cat([towers.encode_text(ids[chunk], lengths[chunk]) for chunk in chunks])
    return towers.unit(vectors.view(*length.shape, -1).mean(1))
