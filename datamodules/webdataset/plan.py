"""Which sample of which source stands in which row of a global batch, for training and for evaluation.

Shapes: M rows of a global batch, K sources, S shards, n rows asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from datamodules.batch import Array
from datamodules.webdataset.order import ShardOrder


@dataclass(frozen=True, kw_only=True)
class SourceSize:
    """What a plan must know of a source.

    Args:
        name: In logs and errors.
        counts: Samples of each shard, `(S,)` integers.
        weight: Share of every batch, relative to the other sources. All sources have one, or none.
    """

    name: str
    counts: Array
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Places:
    """Samples and what decides their random changes, each array `(n,)` int64.

    Args:
        source: Number of the source.
        epoch: Of that source.
        position: In that epoch; with the source and the epoch it names a row of the run.
        shard: In the source.
        sample: In the shard.
    """

    source: Array
    epoch: Array
    position: Array
    shard: Array
    sample: Array


class Plan:
    """The rows of every global batch of a run, from (seed, epoch, step) alone.

    Without weights the sources are one big source. With weights each has the same number of rows in every global batch,
    spread evenly over it, and epochs of its own: a small source begins its next epoch, in another order, while a large
    one is still in its first.

    Args:
        sources: K of them.
        global_batch: M.
        seed: Of the run.
        lanes: Of each order, see `datamodules.webdataset.order.ShardOrder`.
        window_shards: The same.
        resampled: The same.
        epoch_samples: Samples of an epoch of the run; None takes as many as all sources have.

    Attributes:
        num_steps: Global batches of an epoch.

    Raises:
        ValueError: A source has no sample, an epoch does not fill a global batch, only some sources have weights, or a
            weight is not positive or so small that its source has no row.
    """

    def __init__(
        self,
        sources: Sequence[SourceSize],
        *,
        global_batch: int,
        seed: int,
        lanes: int = 64,
        window_shards: int = 8,
        resampled: bool = False,
        epoch_samples: int | None = None,
    ) -> None:
        self.sources = list(sources)
        self.global_batch, self.seed = global_batch, seed
        self.lanes, self.window_shards, self.resampled = lanes, window_shards, resampled
        self.epoch_samples = epoch_samples
        sizes = [int(source.counts.sum()) for source in self.sources]
        for source, size in zip(self.sources, sizes, strict=True):
            if size == 0:
                raise ValueError(f"Plan: source {source.name} has no samples, expected some. Check its shards.")
        total = sum(sizes) if epoch_samples is None else epoch_samples
        self.num_steps = total // global_batch
        if self.num_steps == 0:
            raise ValueError(
                f"Plan: an epoch of {total} samples does not fill a global batch of {global_batch}. Lower the batch "
                "size, or give more samples or more epoch_samples."
            )
        self.weights = self._weights()
        order = partial(_Stream, seed=seed, lanes=lanes, window_shards=window_shards, resampled=resampled)
        if self.weights is None:
            self.quotas = [global_batch]
            self._streams = [order(np.concatenate([source.counts for source in self.sources]), global_batch)]
        else:
            self.quotas = self._quotas(self.weights)
            pairs = zip(self.sources, self.quotas, strict=True)
            self._streams = [order(source.counts, quota, source=k) for k, (source, quota) in enumerate(pairs)]
        # Of each row.
        self._stream, self._column = _interleave(self.quotas)
        # First shard of each source where all are one.
        self._first = np.cumsum([0, *(len(source.counts) for source in self.sources)])[:-1]

    def rows(self, epoch: int, step: int, start: int, stop: int) -> Places:
        """Return rows `start` to `stop` of a global batch; the same whoever asks for whatever part of it.

        Args:
            epoch: Of the run.
            step: In the epoch.
            start: First row.
            stop: Behind the last row, at most M.
        """
        assert 0 <= step < self.num_steps, (step, self.num_steps)
        stream, column = self._stream[start:stop], self._column[start:stop]
        found = np.empty((5, len(stream)), dtype=np.int64)
        for number in np.unique(stream):
            rows = np.flatnonzero(stream == number)
            epochs, positions, shards, samples = self._streams[number].locate(
                epoch * self.num_steps + step, column[rows]
            )
            found[:, rows] = *self._named(int(number), shards), samples, epochs, positions
        source, shard, sample, epochs, positions = found
        return Places(source, epochs, positions, shard, sample)

    def substitute(self, places: Places, row: int, attempt: int) -> tuple[int, int, int]:
        """Return the sample that takes the place of a bad one, from the same few shards.

        Args:
            places: As `rows` returns them.
            row: Of the bad sample in `places`.
            attempt: From 1 on; each gives another sample.

        Returns:
            Source, shard and sample. The source may be another one where all are one big source.
        """
        number = 0 if self.weights is None else int(places.source[row])
        order = self._streams[number].order
        shards, samples = order.substitute(int(places.epoch[row]), places.position[row : row + 1], attempt)
        source, shard = self._named(number, shards)
        return int(source[0]), int(shard[0]), int(samples[0])

    def describe(self) -> dict[str, Any]:
        """Return all that decides the order beside the data, ready for JSON."""
        return {
            "seed": self.seed,
            "global_batch": self.global_batch,
            "lanes": self.lanes,
            "window_shards": self.window_shards,
            "resampled": self.resampled,
            "epoch_samples": self.epoch_samples,
            "weights": self.weights,
        }

    def report(self) -> str:
        """Return what training takes of each source, exactly, one source a line."""
        mode = "drawn with replacement" if self.resampled else "each sample at most once in an epoch of its source"
        head = (
            f"{self.num_steps} steps of {self.global_batch} samples an epoch, {mode}; "
            f"{self._streams[0].order.num_lanes} lanes" + ("" if self.weights is None else " in the first source") + "."
        )
        if self.weights is None:
            size = self._streams[0].order.num_samples
            seen = self.num_steps * self.global_batch
            names = ", ".join(f"{source.name} {int(source.counts.sum())}" for source in self.sources)
            return f"{head}\nOne big source of {size} samples ({names}): {seen / size:.6g} of its epochs an epoch."
        lines = [head]
        for k, (source, stream) in enumerate(zip(self.sources, self._streams, strict=True)):
            quota, asked = self.quotas[k], self.weights[k] / sum(self.weights)
            epochs = self.num_steps * stream.turns / stream.order.num_steps
            lines.append(
                f"{source.name}: {quota} of {self.global_batch} rows ({quota / self.global_batch:.6g}, asked for "
                f"{asked:.6g}), {stream.order.num_samples} samples, {epochs:.6g} of its epochs an epoch."
            )
        return "\n".join(lines)

    def _weights(self) -> list[float] | None:
        weights = [source.weight for source in self.sources]
        if all(weight is None for weight in weights):
            return None
        for source, weight in zip(self.sources, weights, strict=True):
            if weight is None or not 0 < weight < float("inf"):
                raise ValueError(
                    f"Plan: source {source.name} has weight={weight}, expected a positive number, as others have one. "
                    "Give every source a weight, or none."
                )
        return [float(weight) for weight in weights if weight is not None]

    def _quotas(self, weights: list[float]) -> list[int]:
        """Return whole rows by the method of the largest remainder."""
        exact = np.asarray(weights) / sum(weights) * self.global_batch
        quotas = np.floor(exact).astype(np.int64)
        largest = np.argsort(quotas - exact, kind="stable")
        quotas[largest[: self.global_batch - int(quotas.sum())]] += 1
        for source, quota in zip(self.sources, quotas, strict=True):
            if quota == 0:
                raise ValueError(
                    f"Plan: source {source.name} has weight={source.weight} of {sum(weights)}, which is no row of a "
                    f"global batch of {self.global_batch}. Raise its weight or the batch size, or leave it out."
                )
        return [int(quota) for quota in quotas]

    def _named(self, stream: int, shards: Array) -> tuple[Array, Array]:
        """Return source and shard in it of the shards of a stream."""
        if self.weights is not None:
            return np.full_like(shards, stream), shards
        # The first of several equal starts belongs to sources without shards.
        source = np.searchsorted(self._first, shards, side="right") - 1
        return source, shards - self._first[source]


class EvalPlan:
    """Every sample exactly once over all ranks, in the order of the shards; as many batches on each rank.

    Rank r of W has every W-th sample, from the r-th on.

    Args:
        counts: Samples of each shard, `(S,)` integers.
        batch_size: Rows of a batch of one rank.
        num_replicas: Number of ranks.
        rank: This rank.
    """

    def __init__(self, counts: Array, batch_size: int, num_replicas: int = 1, rank: int = 0) -> None:
        self._stops = np.cumsum(counts, dtype=np.int64)
        self.num_samples = int(self._stops[-1]) if len(self._stops) else 0
        self.batch_size, self.num_replicas, self.rank = batch_size, num_replicas, rank

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.num_replicas))

    def rows(self, number: int) -> tuple[Array, Array, Array]:
        """Return a batch of this rank.

        Args:
            number: In [0, len).

        Returns:
            Shards and samples in them, `(batch_size,)` int64, and which rows hold one, `(batch_size,)` bool. The others
            are behind the last sample and 0.
        """
        assert 0 <= number < len(self), (number, len(self))
        rows = number * self.batch_size + np.arange(self.batch_size)
        # As predictions of ranks are put together again, and so that ranks differ by one sample at most.
        places = rows * self.num_replicas + self.rank
        valid = places < self.num_samples
        places = np.where(valid, places, 0)
        shards = np.searchsorted(self._stops, places, side="right")
        starts = np.concatenate([[0], self._stops])
        return np.where(valid, shards, 0), np.where(valid, places - starts[shards], 0), valid


class _Stream:
    """An order whose epochs follow each other, cut into steps of the run.

    A source with fewer samples than its columns takes several turns a step, each of at most an epoch.
    """

    def __init__(self, counts: Array, columns: int, **options: Any) -> None:
        self.turns = -(-columns // int(counts.sum()))
        self.width = -(-columns // self.turns)
        self.order = ShardOrder(counts, global_batch=self.width, **options)

    def locate(self, step: int, columns: Array) -> tuple[Array, Array, Array, Array]:
        """Return epochs, positions, shards and samples, `(n,)` each, at a step counted over all epochs of the run."""
        epochs, steps = np.divmod(step * self.turns + columns // self.width, self.order.num_steps)
        found = np.empty((3, len(columns)), dtype=np.int64)
        for epoch, own in np.unique(np.stack([epochs, steps]), axis=1).T:
            here = np.flatnonzero((epochs == epoch) & (steps == own))
            found[:, here] = self.order.locate(int(epoch), int(own), columns[here] % self.width)
        shards, samples, positions = found
        return epochs, positions, shards, samples


def _interleave(quotas: Sequence[int]) -> tuple[Array, Array]:
    """Return the stream of each of M rows and its column there, such that any slice has about its share of each."""
    stream = np.repeat(np.arange(len(quotas)), quotas)
    column = np.concatenate([np.arange(quota) for quota in quotas])
    order = np.argsort((column + 0.5) / np.asarray(quotas)[stream], kind="stable")
    return stream[order], column[order]
