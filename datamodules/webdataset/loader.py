"""Loaders of whole batches: the place of training in the order, its state, and the counts that batches carry.

Both samplers derive from torch's DistributedSampler because Lightning leaves such a sampler alone (see
`datamodules.sampling`).
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from datamodules.webdataset.meters import Meter
from datamodules.webdataset.plan import Plan


class StepKey(NamedTuple):
    """One batch of a rank: the number of a micro batch of an optimizer step."""

    epoch: int
    step: int
    micro: int


class StepSampler(DistributedSampler[StepKey]):
    """Yield the keys of a rank's micro batches, which are the same on all ranks.

    One iteration is as long as an epoch. It starts at `place`, so it may run into the next epoch.

    Args:
        num_steps: Optimizer steps of an epoch.
        accumulation: Micro batches of a step.

    Attributes:
        place: The next batch that the trainer will have. None: the start of the epoch that `set_epoch` names.
    """

    def __init__(self, num_steps: int, accumulation: int = 1) -> None:
        # All that torch asks of a dataset is its length.
        super().__init__(range(num_steps * accumulation), num_replicas=1, rank=0)  # type: ignore[arg-type]
        self.num_steps, self.accumulation = num_steps, accumulation
        self.place: StepKey | None = None

    def __len__(self) -> int:
        return self.num_steps * self.accumulation

    def __iter__(self) -> Iterator[StepKey]:
        key = self._next()
        for _ in range(len(self)):
            yield key
            key = self._after(key)

    def advance(self) -> None:
        """Move `place` on by one batch."""
        self.place = self._after(self._next())

    def _next(self) -> StepKey:
        return self.place or StepKey(self.epoch, 0, 0)

    def _after(self, key: StepKey) -> StepKey:
        if key.micro + 1 < self.accumulation:
            return key._replace(micro=key.micro + 1)
        if key.step + 1 < self.num_steps:
            return StepKey(key.epoch, key.step + 1, 0)
        return StepKey(key.epoch + 1, 0, 0)


class ShardLoader(DataLoader[Any]):
    """Training batches as one stream: each iteration continues where the trainer stopped taking them.

    Lightning saves and restores that place. It counts the batches handed out, not those that workers have prefetched;
    after a resume nothing of what was seen is read. Why a stream: see `datamodules.sampling.TrainLoader`.

    Args:
        dataset: Gives `(batch, meter)` by `StepKey`.
        plan: The order, which is part of the state.
        digest: Of the data, which is part of the state.
        accumulation: Batches of an optimizer step.
        num_replicas: Number of ranks, each of which has as many batches.
        sampler: What `Trainer(overfit_batches=...)` puts in the place of the stream.
        **loading: Further arguments of DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        plan: Plan,
        digest: str,
        accumulation: int = 1,
        num_replicas: int = 1,
        sampler: Sampler[Any] | None = None,
        **loading: Any,
    ) -> None:
        # By these names Lightning finds them when it makes the loader again.
        self.plan, self.digest, self.accumulation, self.num_replicas = plan, digest, accumulation, num_replicas
        self._meter, self._waited = Meter(), 0.0
        self.steps = StepSampler(plan.num_steps, accumulation)
        sampler = self.steps if sampler is None else sampler
        super().__init__(dataset, sampler=sampler, **{**loading, "batch_size": None})

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its private iterator class
        # As a generator this starts at the first batch: Lightning tells the sampler the epoch only after `iter()`.
        batches = super().__iter__()
        while True:
            started = time.perf_counter()
            try:
                batch, meter = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            self._meter += meter
            self.steps.advance()
            yield batch

    def take_meter(self) -> tuple[Meter, float]:
        """Return the counts since the last call, and the seconds that the trainer waited for batches."""
        taken = self._meter, self._waited
        self._meter, self._waited = Meter(), 0.0
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the order and what decides the order; empty when there is no place yet."""
        if (place := self.steps.place) is None:
            return {}
        return {**place._asdict(), **self._split(), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the place of a state; nothing is done for an empty one.

        Raises:
            ValueError: The state is of another order, or stands inside a step that was split in another way.
        """
        if not state:
            return
        place = StepKey(state["epoch"], state["step"], state["micro"])
        where = f"ShardLoader: the checkpoint stands at step {place.step} of epoch {place.epoch} of a run with"
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ValueError(
                    f"{where} {name}={state.get(name)}, this run has {name}={mine}. Resume with the same, or start a "
                    "new run from the weights."
                )
        for name, mine in self._split().items():
            # Ranks have had the first rows of their parts: other ranks, or other batches, would not go on from there.
            if place.micro and state[name] != mine:
                raise ValueError(
                    f"{where} {name}={state[name]}, behind {place.micro} of the batches of that step; this run has "
                    f"{name}={mine}. Resume with the same, or from a checkpoint between two steps."
                )
        self.steps.place = place

    def _split(self) -> dict[str, int]:
        return {"accumulation": self.accumulation, "num_replicas": self.num_replicas}

    def _identity(self) -> dict[str, Any]:
        return {"data": self.digest, **self.plan.describe()}
