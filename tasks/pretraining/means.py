"""Means over the samples of all processes, some of which do not count.

Shapes: n samples of this process.
"""

import torch
from torch import Tensor, distributed


def weighted_mean(value: Tensor, weight: Tensor) -> Tensor:
    """Return this process's part of the mean over all processes of `value`, where each counts `weight`.

    The mean of the parts over processes is the mean, and so are gradients, which are averaged over processes.

    Args:
        value: `(n,)`.
        weight: `(n,)`, bool or numbers that are not negative, without gradient.

    Returns:
        Scalar; 0 where nothing counts.
    """
    total = weight.sum()
    num_processes = 1
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        num_processes = distributed.get_world_size()
    return (value * weight).sum() * num_processes / torch.where(total > 0, total, 1)


@torch.no_grad()
def second_moment(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean of t t^T over the vectors t of all processes.

    Args:
        tokens: `(n, C)` float32.
        weight: `(n,)` float32, not negative.

    Returns:
        `(C, C)`, the same in all processes; 0 where nothing counts.
    """
    moment = (tokens * weight[:, None]).T @ tokens
    packed = torch.cat([moment.flatten(), weight.sum()[None]])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(packed)
    total = packed[-1]
    return packed[:-1].view_as(moment) / torch.where(total > 0, total, 1)
