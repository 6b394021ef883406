"""The order of one source: samples come at most once, by seed and counts alone, at the same cost everywhere."""

from collections import Counter

import numpy as np
import pytest

from datamodules.webdataset import bijection
from datamodules.webdataset.order import ShardOrder

# Some shards are empty, one is much larger than the rest.
UNEVEN = np.array([17, 0, 40, 3, 0, 250, 31, 12, 60, 1, 33, 28, 19, 44, 7, 55])
EVEN = np.full(64, 50)


def epoch_of(order: ShardOrder, epoch: int) -> list[tuple[int, int, int]]:
    """Return (shard, sample, position) of every column of every step."""
    columns = np.arange(order.global_batch)
    steps = [np.stack(order.locate(epoch, step, columns), axis=1) for step in range(order.num_steps)]
    return [tuple(row) for row in np.concatenate(steps).tolist()]


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize(
    "counts", [UNEVEN, EVEN, np.array([5]), np.array([1] * 40)], ids=["uneven", "even", "1", "ones"]
)
@pytest.mark.parametrize(("global_batch", "lanes", "window_shards"), [(1, 64, 8), (5, 4, 2), (5, 64, 1), (4, 3, 1000)])
def test_an_epoch_has_whole_batches_of_existing_samples(
    counts: np.ndarray, global_batch: int, lanes: int, window_shards: int, resampled: bool
) -> None:
    order = ShardOrder(
        counts, global_batch=global_batch, seed=3, lanes=lanes, window_shards=window_shards, resampled=resampled
    )
    rows = epoch_of(order, 2)
    assert order.num_steps == counts.sum() // global_batch
    assert len(rows) == order.num_steps * global_batch
    assert all(0 <= sample < counts[shard] for shard, sample, _ in rows)
    positions = {position for _, _, position in rows}
    assert len(positions) == len(rows)
    assert positions <= set(range(counts.sum()))
    if not resampled:
        assert len({row[:2] for row in rows}) == len(rows)


def test_the_few_samples_that_an_epoch_leaves_out_are_others_each_time() -> None:
    order = ShardOrder(EVEN, global_batch=300, seed=0)
    everything = {(shard, sample) for shard in range(64) for sample in range(50)}
    left_out = [everything - {row[:2] for row in epoch_of(order, epoch)} for epoch in range(3)]
    assert [len(each) for each in left_out] == [3200 % 300] * 3
    assert left_out[0] != left_out[1]
    assert left_out[1] != left_out[2]


def test_any_part_of_a_batch_is_that_part_of_the_whole() -> None:
    order = ShardOrder(UNEVEN, global_batch=24, seed=1, lanes=4, window_shards=2)
    whole = np.stack(order.locate(5, 7, np.arange(24)))
    columns = np.array([23, 0, 11, 11, 5])
    assert np.array_equal(np.stack(order.locate(5, 7, columns)), whole[:, columns])


def test_no_step_needs_another_step_or_an_earlier_epoch() -> None:
    used = ShardOrder(UNEVEN, global_batch=24, seed=1)
    for epoch in range(6):
        epoch_of(used, epoch)
    fresh = ShardOrder(UNEVEN, global_batch=24, seed=1)
    assert np.array_equal(np.stack(used.locate(3, 9, np.arange(24))), np.stack(fresh.locate(3, 9, np.arange(24))))


def test_seed_epoch_and_source_each_shuffle_anew() -> None:
    def first(seed: int, source: int, epoch: int) -> tuple[tuple[int, int, int], ...]:
        return tuple(epoch_of(ShardOrder(EVEN, global_batch=32, seed=seed, source=source), epoch)[:64])

    assert len({first(0, 0, 0), first(1, 0, 0), first(0, 1, 0), first(0, 0, 1), first(0, 1, 1)}) == 5


def test_the_shards_of_an_epoch_are_read_a_window_at_a_time() -> None:
    order = ShardOrder(EVEN, global_batch=16, seed=0, lanes=4, window_shards=4)
    assert order.num_lanes == 4
    rows = np.array(epoch_of(order, 0)).reshape(order.num_steps, 4, 4, 3)
    # A lane of 800 samples has 4 windows of 4 shards, each read for 50 steps.
    for lane in range(4):
        for window in range(4):
            assert len(np.unique(rows[50 * window : 50 * window + 50, lane, :, 0])) == 4
    assert len(np.unique(rows[0, :, :, 0])) >= 4


def test_samples_of_a_window_are_well_mixed() -> None:
    order = ShardOrder(EVEN, global_batch=16, seed=0, lanes=2, window_shards=32)
    rows = np.array(epoch_of(order, 0)).reshape(order.num_steps, 2, 8, 3)[:, 0].reshape(-1, 3)
    counts = Counter(zip(rows[:-1, 0].tolist(), rows[1:, 0].tolist(), strict=True))
    same = sum(count for (one, other), count in counts.items() if one == other)
    # Of 1,600 samples of 32 shards the next one is of the same shard with probability 49 / 1599; five deviations.
    expected = 1599 * 49 / 1599
    assert same == pytest.approx(expected, abs=5 * expected**0.5)


@pytest.mark.parametrize(
    ("lanes", "window_shards", "global_batch", "expected"),
    [(64, 8, 16, 8), (4, 8, 16, 4), (64, 100, 16, 1), (64, 1, 5, 5)],
)
def test_lanes_are_fewer_where_shards_or_columns_are_few(
    lanes: int, window_shards: int, global_batch: int, expected: int
) -> None:
    order = ShardOrder(EVEN, global_batch=global_batch, seed=0, lanes=lanes, window_shards=window_shards)
    assert order.num_lanes == expected


def test_resampled_epochs_draw_shards_with_replacement() -> None:
    counts = np.full(2000, 4)
    order = ShardOrder(counts, global_batch=100, seed=0, resampled=True)
    assert order.num_steps == ShardOrder(counts, global_batch=100, seed=0).num_steps
    times = np.bincount([shard for shard, _, _ in epoch_of(order, 0)], minlength=2000)
    # A shard is missed with probability 1 / e; the share of missed ones deviates by sqrt((1/e - 2/e^2) / S); five.
    assert (times == 0).mean() == pytest.approx(np.exp(-1), abs=5 * ((np.exp(-1) - 2 * np.exp(-2)) / 2000) ** 0.5)
    assert times.max() > 4


def test_a_substitute_is_another_sample_of_the_same_window_for_every_reader() -> None:
    order = ShardOrder(EVEN, global_batch=16, seed=0, lanes=4, window_shards=4)
    shards, samples, positions = order.locate(1, 60, np.arange(16))
    rows = np.array(epoch_of(order, 1)).reshape(order.num_steps, 4, 4, 3)
    # Step 60 is in the second window of each lane.
    windows = [{tuple(row[:2]) for row in rows[50:100, lane].reshape(-1, 3).tolist()} for lane in range(4)]
    seen = [{(int(shards[column]), int(samples[column]))} for column in range(16)]
    for attempt in range(1, 200):
        together = np.stack(order.substitute(1, positions, attempt), axis=1)
        fresh = ShardOrder(EVEN, global_batch=16, seed=0, lanes=4, window_shards=4)
        assert np.array_equal(np.stack(fresh.substitute(1, positions[[5]], attempt), axis=1), together[[5]])
        for column, row in enumerate(together.tolist()):
            assert tuple(row) in windows[column // 4]
            seen[column].add(tuple(row))
    # The window has 200 samples: each attempt gave one more of them.
    assert [len(each) for each in seen] == [200] * 16


def test_the_only_sample_of_a_window_has_no_other_substitute() -> None:
    order = ShardOrder(np.array([1]), global_batch=1, seed=0)
    shards, samples = order.substitute(0, np.array([0]), 1)
    assert (shards.tolist(), samples.tolist()) == ([0], [0])


def test_samples_that_do_not_fill_a_batch_are_an_error() -> None:
    with pytest.raises(ValueError, match="hold 10 samples, less than a global batch of 11"):
        ShardOrder(np.array([4, 6]), global_batch=11, seed=0)


def test_a_late_step_of_a_late_epoch_costs_what_the_first_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = 0

    def count(words: np.ndarray) -> np.ndarray:
        nonlocal mixed
        mixed += words.size
        return original(words)

    original = bijection.mix_array
    monkeypatch.setattr(bijection, "mix_array", count)

    def cost(epoch: int, step: int) -> int:
        nonlocal mixed
        order = ShardOrder(np.full(43_000, 10_000), global_batch=256, seed=0)
        order.locate(epoch, step, np.arange(256))
        first, mixed = mixed, 0
        order.locate(epoch, step, np.arange(256))
        second, mixed = mixed, 0
        # The first look at an epoch shuffles its shards, once; after that a batch costs nothing of their number.
        assert second < 20 * bijection.ROUNDS * 256
        return first

    # Numbers that fall outside the range are permuted again, by chance a few more or fewer: 2 % of 43,000 is far more
    # than five deviations.
    assert cost(10**6, 10**6) == pytest.approx(cost(0, 0), rel=0.02)
