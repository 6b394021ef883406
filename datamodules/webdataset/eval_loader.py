"""Evaluation batches of a rank, and what could not be used of them."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from datamodules.webdataset.meters import Meter


class AllBatches(DistributedSampler[int]):
    """Yield the numbers of all batches of a dataset that holds one rank's.

    Lightning leaves samplers of this kind alone (see `datamodules.sampling`).
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)


class EvalLoader(DataLoader[Any]):
    """Evaluation batches of a rank; what could not be used is reported with the last one.

    Batches of images that differ in size have no blank rows, and where no sample is left, None stands for the batch.

    Args:
        dataset: Gives `(batch, meter)` by number.
        in_step: Whether all ranks take as many steps: then a neighbour comes once more in the place of None, as the
            metrics of detection and segmentation count an image of a rank once. Otherwise None is left out.
        report: Called with the counts of all batches.
        sampler: Of the numbers; None takes all. Lightning makes the loader again with one, to predict or to overfit.
        **loading: Further arguments of DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        report: Callable[[Meter], None],
        in_step: bool,
        sampler: Sampler[int] | None = None,
        **loading: Any,
    ) -> None:
        # By these names Lightning finds them when it makes the loader again.
        self.report, self.in_step = report, in_step
        sampler = AllBatches(dataset) if sampler is None else sampler
        super().__init__(dataset, sampler=sampler, **{**loading, "batch_size": None})

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its private iterator class
        total, last, owed = Meter(), None, 0
        for number, (batch, meter) in enumerate(super().__iter__(), 1):
            total += meter
            # Before it is handed out: a trainer asks for no batch behind the last.
            if number == len(self):
                self.report(total)
            if batch is not None:
                last, owed = batch, owed + 1
            elif self.in_step:
                owed += 1
            if last is not None:
                yield from [last] * owed
                owed = 0
        if owed:
            raise ValueError(
                f"EvalLoader: none of the {owed} evaluation batches of this rank has a usable sample. Check the "
                "shards, or evaluate with smaller batches or on fewer devices, so that each has some."
            )


def warn_of_bad(meter: Meter) -> None:
    """Warn of samples that an evaluation left out."""
    if bad := sum(meter.bad.values()):
        first = meter.entries[0] if meter.entries else None
        warnings.warn(
            f"{bad} of {bad + sum(meter.samples.values())} samples{f' of {first.source}' if first else ''} are bad and "
            "left out of the evaluation, on this rank. "
            + (f"The first: {first.name} ({first.cause}: {first.message})." if first else "The ledger lists them."),
            stacklevel=2,
        )
