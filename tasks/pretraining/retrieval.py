"""How often the text of an image is found among all texts, and the image of a text among all images.

Shapes: N pairs, D length of an embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

RANKS = (1, 5, 10)
# Rows that are compared with all columns at a time.
_CHUNK = 1024


class Retrieval(Metric):
    """Recall among the k most similar, both ways, over the pairs of all ranks; options go to `Metric`."""

    full_state_update = False
    image: list[Tensor]
    text: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("image", [], dist_reduce_fx="cat")
        self.add_state("text", [], dist_reduce_fx="cat")

    def update(self, image: Tensor, text: Tensor, valid: Tensor) -> None:
        """Take unit vectors of images and of their texts, `(B, D)`, where `valid` `(B,)`."""
        self.image.append(image[valid])
        self.text.append(text[valid])

    def compute(self) -> dict[str, Tensor]:
        """Return `image_to_text_r<k>`, `text_to_image_r<k>` and their mean `retrieval_r<k>`, shares from 0 to 1."""
        image, text = dim_zero_cat(self.image), dim_zero_cat(self.text)
        if not len(image):
            return {}
        there, back = recall(image, text, RANKS), recall(text, image, RANKS)
        values = {f"image_to_text_r{k}": there[k] for k in RANKS} | {f"text_to_image_r{k}": back[k] for k in RANKS}
        return values | {f"retrieval_r{k}": (there[k] + back[k]) / 2 for k in RANKS}


def recall(query: Tensor, answer: Tensor, ranks: Sequence[int]) -> dict[int, Tensor]:
    """Return the share of queries whose own answer is among the k most similar ones, for each k of `ranks`.

    Answers of equal similarity, as of captions that are alike, count as if drawn in random order: an encoder that gives
    all inputs the same vector finds k of N.

    Args:
        query: `(N, D)` float32.
        answer: Answers in the order of the queries, `(N, D)`.
        ranks: Each at least 1.
    """
    hits = {k: query.new_zeros((), dtype=torch.float64) for k in ranks}
    for start in range(0, len(query), _CHUNK):
        similarity = query[start : start + _CHUNK] @ answer.T
        rows = torch.arange(len(similarity), device=query.device)
        own = similarity[rows, start + rows, None]
        # What is not a number counts as better, and finds nothing: a run that diverged is not the best one.
        better, equal = (~(similarity <= own)).sum(1), (similarity == own).sum(1).clamp(min=1)
        for k in ranks:
            hits[k] += ((k - better) / equal).clamp(0, 1).double().sum()
    return {k: (count / len(query)).float() for k, count in hits.items()}
