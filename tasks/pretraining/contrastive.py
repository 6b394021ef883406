"""Losses that tell which text belongs to which image, over the batches of all processes.

Every process compares its own images and texts with those of all, so it holds `(b, B)` similarities and never `(B, B)`.
What it returns is its part of the loss: the mean of the parts over processes is the loss of the whole batch, and so is
the mean of their gradients, which is what DistributedDataParallel takes.

Shapes: b pairs of a process, the same number in all; B pairs of all processes; D length of an embedding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.utils.checkpoint import checkpoint

from tasks.pretraining.means import weighted_mean


def gather(x: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks, `(b, ...)` to `(B, ...)`.

    The gradient of a row is the sum of what all processes have for it. One process gets its input back.
    """
    if num_processes() == 1:
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


def num_processes() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def clip_loss(image: Tensor, text: Tensor, scale: Tensor, valid: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy of finding an image's text among all texts and a text's image among all images.

    CLIP (arXiv:2103.00020, figure 3). In float32 whatever the precision of the step.

    Args:
        image: Unit vectors, `(b, D)`.
        text: Unit vectors of the texts of these images, `(b, D)`.
        scale: Factor on cosine similarities, scalar.
        valid: `(b,)` bool; a pair that is not is neither asked for nor a wrong answer.
        label_smoothing: Probability that is spread evenly over all valid answers, 0 to 1.

    Returns:
        Scalar; 0 where no pair is valid.
    """
    with torch.autocast(image.device.type, enabled=False):
        all_images, all_texts, answers = gather(image), gather(text), gather(valid)
        first = distributed.get_rank() * len(image) if num_processes() > 1 else 0
        target = torch.arange(first, first + len(image), device=image.device)
        find_text, find_image = (
            _cross_entropy(scale * x @ candidates.T, target, answers, label_smoothing)
            for x, candidates in ((image, all_texts), (text, all_images))
        )
        return weighted_mean((find_text + find_image) / 2, valid)


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, valid: Tensor) -> Tensor:
    """Return the loss of telling for each image and each text alone whether they belong together.

    SigLIP (arXiv:2303.15343, algorithm 1): the sum over all pairs, divided by the number of images. It needs no sum
    over the batch inside a logarithm, so similarities are made, and made again for gradients, for the texts of one
    process at a time: `(b, b)` are held whatever the number of processes. In float32 whatever the precision of the
    step.

    Args:
        image: Unit vectors, `(b, D)`.
        text: Unit vectors of the texts of these images, `(b, D)`.
        scale: Factor on cosine similarities, scalar.
        bias: Added to them, scalar.
        valid: `(b,)` bool; a pair that is not has no part in the loss.

    Returns:
        Scalar; 0 where no pair is valid.
    """
    with torch.autocast(image.device.type, enabled=False):
        texts, counted = gather(text).chunk(num_processes()), gather(valid).chunk(num_processes())
        own = distributed.get_rank() if num_processes() > 1 else 0
        per_image = sum(
            checkpoint(_sigmoid_loss, image, chunk, scale, bias, counts, rank == own, use_reentrant=False)
            for rank, (chunk, counts) in enumerate(zip(texts, counted, strict=True))
        )
        assert isinstance(per_image, Tensor)
        return weighted_mean(per_image, valid)


def _cross_entropy(logits: Tensor, target: Tensor, answers: Tensor, label_smoothing: float) -> Tensor:
    """Return for each row the cross entropy over the columns that are answers, `(b,)`."""
    # Where nothing counts, a sum over no columns would be infinite, and its gradient not a number.
    answers = answers | ~answers.any()
    normalizer = logits.masked_fill(~answers, -torch.inf).logsumexp(1)
    expected = logits.gather(1, target[:, None]).squeeze(1)
    if label_smoothing:
        expected = expected.lerp((logits * answers).sum(1) / answers.sum(), label_smoothing)
    return normalizer - expected


def _sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, counts: Tensor, same_rows: bool) -> Tensor:
    """Return for each image the sum over some texts, `(b,)`; its own is among them where they are of `same_rows`."""
    logits = scale * image @ text.T + bias
    sign = 2 * torch.eye(len(image), device=image.device) - 1 if same_rows else logits.new_tensor(-1.0)
    return -(F.logsigmoid(sign * logits) * counts).sum(1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total.chunk(distributed.get_world_size())[distributed.get_rank()]
