"""Which sample comes when: order, sharding over ranks, and a place to resume from.

The order of an epoch (`datamodules.orders`) is a function of (seed, epoch, the data, the global batch) alone. Rank r of
W takes every W-th sample, so that step k of the run sees the same images for every W with the same global batch.

Both samplers derive from torch's DistributedSampler because Lightning leaves such a sampler alone, whatever
`Trainer(use_distributed_sampler=...)` says. Any other would be wrapped: the wrapper pads the last shard with samples
that would then be evaluated twice.
"""

from collections.abc import Iterator
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from datamodules.orders import Order, Shuffled

# (epoch, index). The epoch travels with the index since a persistent worker process never learns of it otherwise.
SampleKey = tuple[int, int]

# First words of the seeds, one for each use. NumPy pads short seeds with zeros, so length alone keeps none apart.
ORDER, SAMPLE, REPLACEMENT = 0, 1, 2


class TrainSampler(DistributedSampler[SampleKey]):
    """Yield this rank's `(epoch, index)` pairs, in an order drawn anew each epoch.

    There are whole batches only, equally many on each rank. One iteration is as long as an epoch. It starts at `place`,
    so it may run into the next epoch.

    Args:
        dataset: Only its length is used.
        batch_size: Samples per rank and step. What does not fill a batch on every rank is left out of the epoch.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Of the order.
        order: Of the samples; each once and shuffled, unless it says otherwise.

    Attributes:
        place: Epoch and number of its samples, over all ranks, that are behind. None: the start of the epoch that
            `set_epoch` names.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        order: Order | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.order = Shuffled(len(dataset)) if order is None else order  # type: ignore[arg-type]  # Dataset declares no __len__
        self.size = len(self.order)
        self.global_batch = batch_size * num_replicas
        self.num_batches = self.size // self.global_batch
        self.num_samples = self.num_batches * batch_size
        self.place: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, start = self.place or (self.epoch, 0)
        left = self.num_batches
        while left > 0:
            order = self.order.indices(np.random.default_rng((ORDER, self.seed, epoch)), self.global_batch)
            count = min(left, (self.size - start) // self.global_batch)
            block = order[start : start + count * self.global_batch]
            for index in block[self.rank :: self.num_replicas]:
                yield epoch, int(index)
            left -= count
            epoch, start = epoch + 1, 0

    def advance(self) -> None:
        """Move `place` by one step of all ranks."""
        epoch, samples = self.place or (self.epoch, 0)
        self.move(epoch, samples + self.global_batch)

    def move(self, epoch: int, samples: int) -> None:
        """Set `place`; where less than a global batch is left of the epoch, it is the start of the next."""
        whole = self.size - samples >= self.global_batch
        self.place = (epoch, samples) if whole else (epoch + 1, 0)


class EvalSampler(DistributedSampler[int]):
    """Yield this rank's share in order, each sample exactly once over all ranks; ranks may differ by one sample."""

    def __init__(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)
        self.indices = range(rank, len(dataset), num_replicas)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class LoaderState(TypedDict):
    """Where training stands in the data: part of the checkpoint, the same on every rank."""

    epoch: int
    samples: int  # of this epoch, over all ranks, that the trainer has had
    seed: int
    size: int  # of an epoch
    order: NotRequired[str]  # as `Order.describe` has it; absent where shuffled


class TrainLoader(DataLoader[Any]):
    """A DataLoader whose batches are one stream: each iteration continues where the trainer stopped taking them.

    Lightning saves and restores that place. It counts the batches handed out, not those that workers have prefetched;
    after a resume the sampler leaves out what was seen, so nothing is decoded twice.

    Why a stream, and not "start epoch n": resumed with `max_steps` from the end of an epoch, Lightning 2.6 first runs
    an epoch of no batches, or of one, and counts it. The stream is not disturbed by where the trainer's epochs begin.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its private iterator class
        # As a generator this starts at the first batch. Lightning tells the sampler the epoch only after `iter()`.
        for batch in super().__iter__():
            # `Trainer(overfit_batches=...)` puts a sequential sampler here.
            if isinstance(self.sampler, TrainSampler):
                self.sampler.advance()
            yield batch

    def state_dict(self) -> LoaderState | dict[str, int]:
        """Return the place in the stream; empty when there is none yet."""
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler) or sampler.place is None:
            return {}
        epoch, samples = sampler.place
        state = LoaderState(epoch=epoch, samples=samples, seed=sampler.seed, size=sampler.size)
        if order := sampler.order.describe(sampler.global_batch):
            state["order"] = order
        return state

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue at the place that `state` names.

        Raises:
            ValueError: It lies inside an epoch of other data or of another order.
        """
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler) or not state:
            return
        order, mine = state.get("order", ""), sampler.order.describe(sampler.global_batch)
        if not state["samples"] or (state["seed"], state["size"], order) == (sampler.seed, sampler.size, mine):
            sampler.move(state["epoch"], state["samples"])
            return
        place = f"TrainLoader: the checkpoint stands at sample {state['samples']} of epoch {state['epoch']} of "
        if order == mine:
            raise ValueError(
                f"{place}{state['size']} samples shuffled with seed {state['seed']}; this run has {sampler.size} "
                f"samples and seed {sampler.seed}. Resume with the same data and seed, or start a new run from the "
                "weights."
            )
        raise ValueError(
            f"{place}an epoch in the order ({order or 'shuffled'}); this run has ({mine or 'shuffled'}). Resume with "
            "the same settings and global batch, from the end of an epoch, or start a new run from the weights."
        )


def loader_generator() -> torch.Generator:
    """Return a generator for a DataLoader's base seed, which would otherwise be drawn from torch's global generator.

    That draw would make dropout and mixup of a resumed run differ from those of an uninterrupted one.
    """
    return torch.Generator().manual_seed(0)
