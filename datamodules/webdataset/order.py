"""In which order an epoch of shards takes its samples: from seed, epoch and step alone, and at once for any step.

The shards of an epoch, shuffled, form one long row of N samples. L lanes cut it into as many segments, and each step
takes some samples of every lane, so that a batch mixes L places of the row. Within a lane, windows of a few shards are
shuffled, so that a reader needs few shards at a time. Windows are permuted by a bijection that is computed where it is
needed (`datamodules.webdataset.bijection`): a step costs the same wherever it is in the epoch.

Shapes: S shards, N samples, M columns (samples of a global batch), L lanes, n samples asked for.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from datamodules.batch import Array
from datamodules.webdataset.bijection import make_key, permute

# First words of the keys, one for each use.
SHARDS, WINDOWS, SUBSTITUTES = 0, 1, 2
# Epochs whose row of shards a process keeps.
NUM_KEPT = 4


@dataclass(frozen=True, slots=True)
class _Row:
    """The shards of one epoch.

    Args:
        shards: Numbers in the order of the row.
        starts: First place of each.
    """

    shards: Array
    starts: Array


@dataclass(frozen=True, slots=True)
class _Windows:
    """Where places stand, each array `(n,)`.

    Args:
        start: First place of the window.
        size: Of the window.
        key: Of its permutation.
    """

    start: Array
    size: Array
    key: Array


class ShardOrder:
    """The order of one source.

    Each sample comes at most once in an epoch. Fewer than M are left out of it, others each time.

    Args:
        counts: Samples of each shard, `(S,)` integers.
        global_batch: M.
        seed: Of the run.
        source: Number of the source; sources of the same shards are shuffled differently.
        lanes: Upper limit of L; there are fewer where a lane would have less than a window, or not a column.
        window_shards: Shards, of mean size, among which samples are shuffled.
        resampled: Draw shards with replacement; an epoch is as long as otherwise.

    Attributes:
        num_steps: Steps of an epoch, N // M.
        num_lanes: L.

    Raises:
        ValueError: The samples do not fill a global batch.
    """

    def __init__(
        self,
        counts: Array,
        *,
        global_batch: int,
        seed: int,
        source: int = 0,
        lanes: int = 64,
        window_shards: int = 8,
        resampled: bool = False,
    ) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self._counts.sum())
        self.num_steps = self.num_samples // global_batch
        if self.num_steps == 0:
            raise ValueError(
                f"ShardOrder: the shards hold {self.num_samples} samples, less than a global batch of {global_batch}. "
                "Lower the batch size, or give more shards."
            )
        self.global_batch, self.seed, self.source, self.resampled = global_batch, seed, source, resampled
        num_shards = int(np.count_nonzero(self._counts))
        self.num_lanes = max(1, min(lanes, num_shards // window_shards, global_batch))
        # First column of each lane, rounded up.
        self._first = -(-np.arange(self.num_lanes + 1) * global_batch // self.num_lanes)
        widths = np.diff(self._first)
        # Windows of a lane differ by one sample at most: a short last one would hardly be shuffled.
        window = window_shards * self.num_samples / num_shards
        self._num_windows = np.maximum(np.rint(self.num_steps * widths / window), 1).astype(np.int64)
        self._rows: OrderedDict[int, _Row] = OrderedDict()

    def locate(self, epoch: int, step: int, columns: Array) -> tuple[Array, Array, Array]:
        """Return what stands in columns of a global batch.

        Args:
            epoch: Of this source.
            step: In [0, num_steps).
            columns: `(n,)` integers in [0, M).

        Returns:
            Number of the shard, of the sample in it, and position in the epoch, each `(n,)` int64. No two samples of an
            epoch have the same position, which is below N.
        """
        assert 0 <= step < self.num_steps, (step, self.num_steps)
        lane = np.searchsorted(self._first, columns, side="right") - 1
        width = self._first[lane + 1] - self._first[lane]
        positions = self.num_steps * self._first[lane] + step * width + columns - self._first[lane]
        windows = self._windows(epoch, positions)
        places = permute(positions - windows.start, windows.size, windows.key)
        return *self._at(epoch, windows.start + places), positions

    def substitute(self, epoch: int, positions: Array, attempt: int) -> tuple[Array, Array]:
        """Return samples of the same window instead of those at some positions.

        Args:
            epoch: Of this source.
            positions: `(n,)`, as `locate` returns them.
            attempt: From 1 on. Each gives another sample, until the window has no more.

        Returns:
            Number of the shard and of the sample in it, each `(n,)` int64. They may come in the epoch once more, at
            their own place.
        """
        windows = self._windows(epoch, positions)
        places = permute(positions - windows.start, windows.size, windows.key)
        others = np.maximum(windows.size - 1, 1)
        key = make_key(SUBSTITUTES, self.seed, self.source, epoch, positions)
        places = (places + 1 + permute((attempt - 1) % others, others, key)) % windows.size
        return self._at(epoch, windows.start + places)

    def _windows(self, epoch: int, positions: Array) -> _Windows:
        segments = self.num_steps * self._first
        lane = np.searchsorted(segments, positions, side="right") - 1
        start, length, number = segments[lane], segments[lane + 1] - segments[lane], self._num_windows[lane]
        # Window w starts at floor(w * length / number) of its lane; this inverts that.
        window = ((positions - start + 1) * number - 1) // length
        first, last = window * length // number, (window + 1) * length // number
        key = make_key(WINDOWS, self.seed, self.source, epoch, lane, window)
        return _Windows(start + first, last - first, key)

    def _at(self, epoch: int, places: Array) -> tuple[Array, Array]:
        row = self._row(epoch)
        # Shards without samples start where the next one does, and are passed over.
        index = np.searchsorted(row.starts, places, side="right") - 1
        return row.shards[index], places - row.starts[index]

    def _row(self, epoch: int) -> _Row:
        row = self._rows.pop(epoch, None)
        if row is None:
            shards = self._drawn(epoch) if self.resampled else self._shuffled(epoch)
            row = _Row(shards, np.cumsum(self._counts[shards]) - self._counts[shards])
        self._rows[epoch] = row
        if len(self._rows) > NUM_KEPT:
            self._rows.popitem(last=False)
        return row

    def _shuffled(self, epoch: int) -> Array:
        num_shards = len(self._counts)
        return permute(np.arange(num_shards), num_shards, make_key(SHARDS, self.seed, self.source, epoch))

    def _drawn(self, epoch: int) -> Array:
        """Return shards drawn with replacement that hold N samples or more."""
        length = len(self._counts)
        while True:
            key = make_key(SHARDS, self.seed, self.source, epoch, np.arange(length))
            shards = (key % np.uint64(len(self._counts))).astype(np.int64)
            if self._counts[shards].sum() >= self.num_samples:
                return shards
            length *= 2
