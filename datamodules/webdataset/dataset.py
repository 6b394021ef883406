"""Whole batches by their place in the order: read, replaced where a sample is bad, written once, counted."""

import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset

from datamodules.webdataset.formats import Builder, Format
from datamodules.webdataset.ledger import BadEntry
from datamodules.webdataset.loader import StepKey
from datamodules.webdataset.meters import Meter
from datamodules.webdataset.plan import EvalPlan, Plan
from datamodules.webdataset.reader import Reader
from datamodules.webdataset.records import BadSample, Draw, mix

# So many bad samples in a row, drawn from all over a window, are no accident at any share worth training with.
MAX_ATTEMPTS = 10


class BadShardsError(RuntimeError):
    """No good sample could be found for a place."""


class BatchDataset(Dataset[tuple[Any, Meter]]):
    """What training and evaluation share: one sample read into one row.

    Args:
        reader: Of the samples.
        form: Of the batches.
        seed: Of random changes.
    """

    def __init__(self, reader: Reader, form: Format, seed: int) -> None:
        self.reader, self.form, self.seed = reader, form, seed

    def fill(self, builder: Builder, row: int, where: tuple[int, int, int], draw: Draw, meter: Meter) -> bool:
        """Write the sample `(source, shard, sample)` into a row; if it is bad, count it and return False."""
        try:
            raw = self.reader.read(*where)
            started = time.perf_counter()
            builder.write(row, raw, draw, where[0], self.reader.name(*where))
            meter.decode_seconds += time.perf_counter() - started
        except BadSample as error:
            self._count(where, error, meter)
            return False
        meter.samples[where[0]] += 1
        return True

    def close(self, meter: Meter) -> Meter:
        """Add what the storage counted."""
        return replace(meter, storage=self.reader.storage.take_counts())

    def _count(self, where: tuple[int, int, int], error: BadSample, meter: Meter) -> None:
        source, shard, sample = where
        manifest = self.reader.manifests[source]
        meter.bad[source, error.cause] += 1
        if where not in self.reader.known:
            name = self.reader.name(*where)
            entry = BadEntry(manifest.name, manifest.digest, shard, sample, name, error.cause, str(error))
            meter.entries.append(entry)


class TrainBatches(BatchDataset):
    """Training batches, by (epoch, step, micro batch).

    Args:
        reader: Of the samples.
        form: Of the batches.
        seed: Of random changes.
        plan: Which sample stands where.
        batch_size: Samples of a micro batch of this rank.
        first_row: Of this rank in the global batch.
        accumulation: Micro batches of a step.
    """

    def __init__(
        self,
        reader: Reader,
        form: Format,
        seed: int,
        *,
        plan: Plan,
        batch_size: int,
        first_row: int,
        accumulation: int,
    ) -> None:
        super().__init__(reader, form, seed)
        self.plan, self.batch_size, self.first_row, self.accumulation = plan, batch_size, first_row, accumulation

    def __len__(self) -> int:
        return self.plan.num_steps * self.accumulation

    def __getitem__(self, key: StepKey | int) -> tuple[Any, Meter]:
        # A number where `Trainer(overfit_batches=...)` puts a sampler of its own.
        epoch, step, micro = (0, *divmod(key, self.accumulation)) if isinstance(key, int) else key
        start = self.first_row + micro * self.batch_size
        places = self.plan.rows(epoch, step, start, start + self.batch_size)
        builder, meter = self.form.builder(self.batch_size), Meter()
        for row in range(self.batch_size):
            source, shard, sample = int(places.source[row]), int(places.shard[row]), int(places.sample[row])
            draw = Draw(self.seed, source, int(places.epoch[row]), int(places.position[row]))
            for attempt in range(1, MAX_ATTEMPTS + 1):
                if self.fill(builder, row, (source, shard, sample), draw, meter):
                    break
                source, shard, sample = self.plan.substitute(places, row, attempt)
                # Other random changes too, should those be what went wrong.
                draw = replace(draw, seed=mix(self.seed ^ attempt))
            else:
                last = "; ".join(f"{entry.name}: {entry.cause}, {entry.message}" for entry in meter.entries[-3:])
                raise BadShardsError(
                    f"{MAX_ATTEMPTS} samples in a row are bad at step {step} of epoch {epoch} ({_account(meter)}). The "
                    f"last: {last or 'listed as bad by an earlier run'}. Check the shards, the network, and what the "
                    "datamodule expects of a sample."
                )
        return builder.finish(torch.ones(self.batch_size, dtype=torch.bool)), self.close(meter)


class EvalBatches(BatchDataset):
    """Evaluation batches, by number. A bad sample stays out: its row is marked invalid.

    Args:
        reader: Of the samples of one source.
        form: Of the batches.
        plan: Which sample stands where.
    """

    def __init__(self, reader: Reader, form: Format, *, plan: EvalPlan) -> None:
        super().__init__(reader, form, seed=0)
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> tuple[Any, Meter]:
        shards, samples, valid = self.plan.rows(number)
        builder, meter = self.form.builder(len(valid)), Meter(samples=Counter())
        for row in range(len(valid)):
            if valid[row]:
                draw = Draw(0, 0, 0, int(samples[row]))
                valid[row] = self.fill(builder, row, (0, int(shards[row]), int(samples[row])), draw, meter)
        return builder.finish(torch.from_numpy(valid)), self.close(meter)


def _account(meter: Meter) -> str:
    return ", ".join(f"{cause} {count}" for (_, cause), count in sorted(meter.bad.items()))
