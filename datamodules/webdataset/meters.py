"""What reading costs and loses: counted where it happens, carried along with the batches, summed over ranks and logged.

The counts of a batch travel with it, so that those of prefetched batches count when the trainer has had them.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.webdataset.ledger import BadEntry, Ledger
from datamodules.webdataset.records import CAUSES, Cause

# So many bad samples say nothing yet about their share.
FEW = 10
NUM_NAMED = 3
# Counts of `Storage`, in the order in which ranks add them up.
STORAGE_COUNTS = ("bytes", "hits", "misses", "retries", "fallbacks", "seconds")


@dataclass
class Meter:
    """Counts of one batch, or of many.

    Args:
        samples: Delivered samples by number of the source.
        bad: Samples that were replaced, or left out of an evaluation, by number of the source and cause.
        entries: The same one by one, as far as this process met them first.
        storage: Counts of the storage.
        decode_seconds: Time for decoding and changing images, over all workers.
    """

    samples: Counter[int] = field(default_factory=Counter)
    bad: Counter[tuple[int, Cause]] = field(default_factory=Counter)
    entries: list[BadEntry] = field(default_factory=list)
    storage: Mapping[str, float] = field(default_factory=dict)
    decode_seconds: float = 0.0

    def __add__(self, other: Self) -> Self:
        names = self.storage.keys() | other.storage.keys()
        return type(self)(
            self.samples + other.samples,
            self.bad + other.bad,
            self.entries + other.entries,
            {name: self.storage.get(name, 0.0) + other.storage.get(name, 0.0) for name in names},
            self.decode_seconds + other.decode_seconds,
        )


class TooManyBadSamplesError(RuntimeError):
    """More samples are bad than the datamodule allows."""


@runtime_checkable
class MeteredLoader(Protocol):
    """A training loader that counts."""

    def take_meter(self) -> tuple[Meter | None, float]:
        """Return the counts since the last call, and the seconds that the trainer waited for batches."""


class DataMeters(Callback):
    """Log throughput, waiting, decoding, the cache, bad samples and the mix of sources; stop when too much is bad.

    Every `trainer.log_every_n_steps` steps the ranks add up their counts. `data/images_per_s` and `data/wait` also show
    in the progress bar. The datamodule of shards puts this callback into its trainer.

    Args:
        names: Of the sources.
        max_bad_share: Share of the samples that may be bad before that is an error, on all ranks at the same step.
        ledger: Where bad samples are written.
        steps_per_epoch: Optimizer steps.

    Raises:
        TooManyBadSamplesError: Past `max_bad_share`.
    """

    def __init__(self, names: Sequence[str], max_bad_share: float, ledger: Ledger, steps_per_epoch: int) -> None:
        self.names, self.max_bad_share, self.ledger = list(names), max_bad_share, ledger
        self.steps_per_epoch = steps_per_epoch
        self.samples: Counter[int] = Counter()
        self.bad: Counter[tuple[int, Cause]] = Counter()
        self._started = self._validating = 0.0
        self._step = -1
        self._named = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = max(1, getattr(trainer, "log_every_n_steps", 1))
        if trainer.global_step % every or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        loader = trainer.train_dataloader
        if isinstance(loader, MeteredLoader):
            meter, waited = loader.take_meter()
            now = time.perf_counter()
            elapsed, self._started = now - self._started, now
            self._report(trainer, pl_module, meter or Meter(), waited, elapsed)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The time of a validation is not that of the steps around it.
        self._started += time.perf_counter() - self._validating

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._keep(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep(trainer)
        if self.bad:
            rank_zero_warn(f"{self.account()} They are listed in {self.ledger.folder}.")

    def account(self) -> str:
        """Say how many samples were bad, by source and cause."""
        seen, bad = sum(self.samples.values()), sum(self.bad.values())
        parts = [f"{self.names[source]}/{cause} {count}" for (source, cause), count in sorted(self.bad.items())]
        return f"{bad} of {seen + bad} samples were bad and replaced: {', '.join(parts) or 'none'}."

    def _report(
        self, trainer: Trainer, pl_module: LightningModule, meter: Meter, waited: float, elapsed: float
    ) -> None:
        self._write(meter)
        total, waited = self._over_ranks(trainer, pl_module, meter, waited)
        storage, samples = total.storage, sum(total.samples.values())
        self.samples += total.samples
        self.bad += total.bad
        reads = storage["hits"] + storage["misses"]
        numbers = {
            "data/megabytes_per_s": storage["bytes"] / 1e6 / elapsed,
            "data/decode_ms": 1e3 * total.decode_seconds / max(samples, 1),
            "data/read_ms": 1e3 * storage["seconds"] / max(samples, 1),
            "data/epoch": trainer.global_step / self.steps_per_epoch,
            "data/bad": float(sum(self.bad.values())),
        }
        if reads:
            numbers["data/cache_hits"] = storage["hits"] / reads
        numbers |= {f"data/{name}": storage[name] for name in ("retries", "fallbacks") if storage[name]}
        numbers |= {f"data/samples/{name}": float(self.samples[number]) for number, name in enumerate(self.names)}
        numbers |= {
            f"data/bad/{self.names[source]}/{cause}": float(count) for (source, cause), count in self.bad.items()
        }
        shown = {
            "data/images_per_s": samples / elapsed,
            "data/wait": waited / (elapsed * trainer.world_size),
        }
        # Already over all ranks; every rank logs the same.
        pl_module.log_dict(shown, prog_bar=True, batch_size=1)
        pl_module.log_dict(numbers, batch_size=1)
        self._check()

    def _over_ranks(
        self, trainer: Trainer, pl_module: LightningModule, meter: Meter, waited: float
    ) -> tuple[Meter, float]:
        """Return the counts of all ranks, without the entries, and the seconds that they waited."""
        sources = range(len(self.names))
        keys = [(source, cause) for source in sources for cause in CAUSES]
        row = [float(meter.samples[source]) for source in sources]
        row += [float(meter.bad[key]) for key in keys]
        row += [meter.storage.get(name, 0.0) for name in STORAGE_COUNTS]
        row += [meter.decode_seconds, waited]
        device = pl_module.device
        numbers = torch.tensor(row, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        numbers = trainer.strategy.reduce(numbers, reduce_op="sum")
        values = iter(numbers.tolist())
        samples = Counter({source: round(next(values)) for source in sources})
        bad = Counter({key: count for key in keys if (count := round(next(values)))})
        storage = {name: next(values) for name in STORAGE_COUNTS}
        return Meter(samples, bad, [], storage, next(values)), next(values)

    def _check(self) -> None:
        seen, bad = sum(self.samples.values()), sum(self.bad.values())
        if bad >= FEW and bad > self.max_bad_share * (seen + bad):
            raise TooManyBadSamplesError(
                f"{self.account()} At most max_bad_share={self.max_bad_share} may be. {self.ledger.folder} lists them: "
                "repair the shards or leave them out, or raise the share."
            )

    def _keep(self, trainer: Trainer) -> None:
        """Write what was counted since the last report; without the other ranks, which may be gone."""
        loader = trainer.train_dataloader
        if isinstance(loader, MeteredLoader):
            meter, _ = loader.take_meter()
            self._write(meter or Meter())

    def _write(self, meter: Meter) -> None:
        self.ledger.append(meter.entries)
        for entry in meter.entries[: max(0, NUM_NAMED - self._named)]:
            self._named += 1
            rank_zero_warn(f"{entry.name} is bad ({entry.cause}: {entry.message}); another sample takes its place.")
