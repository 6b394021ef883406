"""Rows of global batches: the same however they are split, exact quotas of the sources, every evaluated sample once."""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from datamodules.webdataset.plan import EvalPlan, Places, Plan, SourceSize

WEIGHTED = {"large": (np.full(30, 41), 6.0), "middle": (np.array([90, 0, 31]), 3.0), "small": (np.array([7]), 1.5)}


def make(sources: dict[str, tuple[np.ndarray, float | None]], **changes: object) -> Plan:
    sizes = [SourceSize(name=name, counts=counts, weight=weight) for name, (counts, weight) in sources.items()]
    options = {"global_batch": 24, "seed": 5, "lanes": 4, "window_shards": 2} | changes
    return Plan(sizes, **options)  # type: ignore[arg-type]


def one_big_source(**changes: object) -> Plan:
    return make({name: (counts, None) for name, (counts, _) in WEIGHTED.items()}, **changes)


def table(places: Places) -> list[tuple[int, ...]]:
    """Return (source, epoch, position, shard, sample) of each row."""
    fields = (places.source, places.epoch, places.position, places.shard, places.sample)
    return [tuple(row) for row in np.stack(fields, axis=1).tolist()]


def steps_of(plan: Plan, epochs: Sequence[int]) -> list[list[tuple[int, ...]]]:
    pairs = ((epoch, step) for epoch in epochs for step in range(plan.num_steps))
    return [table(plan.rows(epoch, step, 0, plan.global_batch)) for epoch, step in pairs]


@pytest.mark.parametrize(
    "plan", [one_big_source(), make(WEIGHTED), make(WEIGHTED, resampled=True)], ids=["1", "w", "r"]
)
@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 3), (4, 2), (8, 1), (24, 1)])
def test_a_global_batch_is_the_same_for_any_ranks_and_micro_batches(plan: Plan, world: int, accumulation: int) -> None:
    size = plan.global_batch // (world * accumulation)
    for epoch, step in ((0, 0), (3, 17), (1000, plan.num_steps - 1)):
        whole = table(plan.rows(epoch, step, 0, plan.global_batch))
        parts = []
        for rank in range(world):
            for micro in range(accumulation):
                start = rank * plan.global_batch // world + micro * size
                parts += table(plan.rows(epoch, step, start, start + size))
        assert parts == whole


def test_sources_without_weights_are_one_whose_samples_come_at_most_once() -> None:
    plan = one_big_source()
    counts = [counts for counts, _ in WEIGHTED.values()]
    rows = [row for step in steps_of(plan, [0]) for row in step]
    total = sum(int(each.sum()) for each in counts)
    assert len(rows) == total // 24 * 24
    samples = Counter((source, shard, sample) for source, _, _, shard, sample in rows)
    assert max(samples.values()) == 1
    assert all(sample < counts[source][shard] for source, shard, sample in samples)
    assert {row[0] for row in rows} == {0, 1, 2}


def test_weighted_sources_have_the_same_rows_in_every_step() -> None:
    plan = make(WEIGHTED)
    # 24 rows by 6 : 3 : 1.5 are 13.71, 6.86 and 3.43: the two largest remainders are rounded up.
    assert plan.quotas == [14, 7, 3]
    for step in steps_of(plan, [0, 1]):
        assert Counter(row[0] for row in step) == {0: 14, 1: 7, 2: 3}


def test_quotas_are_the_largest_remainders_of_the_weights() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        weights, rows = random.uniform(0.5, 3, size=5), int(random.integers(32, 200))
        plan = make({str(k): (np.full(3, 100), float(weight)) for k, weight in enumerate(weights)}, global_batch=rows)
        exact = weights / weights.sum() * rows
        remainders = exact - np.floor(exact)
        up = np.array(plan.quotas) > np.floor(exact)
        assert sum(plan.quotas) == rows
        assert np.abs(plan.quotas - exact).max() < 1
        assert not up.any() or up.all() or remainders[up].min() >= remainders[~up].max()


def test_any_slice_of_a_batch_has_about_the_share_of_each_source() -> None:
    plan = make(WEIGHTED, global_batch=240, epoch_samples=240)
    sources = np.array([row[0] for row in steps_of(plan, [0])[0]])
    for start in range(0, 240, 30):
        found = np.bincount(sources[start : start + 30], minlength=3)
        # Each end of a slice may cut one row more or less than its share off each source.
        assert np.abs(found - 30 * np.array(plan.quotas) / 240).max() <= 2


def test_each_source_has_epochs_of_its_own_in_which_a_sample_comes_at_most_once() -> None:
    rows = [row for step in steps_of(make(WEIGHTED), range(3)) for row in step]
    samples = Counter((source, epoch, shard, sample) for source, epoch, _, shard, sample in rows)
    assert max(samples.values()) == 1
    positions = Counter(row[:3] for row in rows)
    assert max(positions.values()) == 1
    last = {source: max(row[1] for row in rows if row[0] == source) for source in range(3)}
    num_steps = 1358 // 24 * 3
    assert last == {
        0: (num_steps - 1) // (1230 // 14),
        1: (num_steps - 1) // (121 // 7),
        2: (num_steps - 1) // (7 // 3),
    }
    orders = {tuple(row[3:] for row in rows if row[:2] == (2, epoch)) for epoch in range(20)}
    assert len(orders) > 10


def test_a_source_smaller_than_its_rows_repeats_within_a_step() -> None:
    plan = make({"large": (np.full(9, 50), 1.0), "tiny": (np.array([2, 3]), 1.0)})
    for step in steps_of(plan, [0, 1]):
        tiny = [row for row in step if row[0] == 1]
        assert len(tiny) == 12
        # 12 rows of 5 samples are three turns of four.
        assert sorted(Counter(row[1] for row in tiny).values()) == [4, 4, 4]
        assert len({(epoch, shard, sample) for _, epoch, _, shard, sample in tiny}) == 12
    rows = [row for step in steps_of(plan, [0, 1]) for row in step]
    assert len({row[:3] for row in rows}) == len(rows)


def test_the_report_says_what_training_takes() -> None:
    plan = make(WEIGHTED)
    rows = [row for step in steps_of(plan, [0]) for row in step]
    taken = Counter(row[0] for row in rows)
    lines = plan.report().splitlines()
    assert lines[0].startswith("56 steps of 24 samples an epoch, each sample at most once in an epoch of its source")
    assert lines[3] == "small: 3 of 24 rows (0.125, asked for 0.142857), 7 samples, 28 of its epochs an epoch."
    # An epoch of `small` is two steps of three rows.
    assert taken[2] / (2 * 3) == 28
    assert "One big source of 1358 samples (large 1230, middle 121, small 7)" in one_big_source().report()


def test_epochs_of_the_run_are_as_long_as_told_and_lose_nothing() -> None:
    plan, longer = one_big_source(epoch_samples=100), one_big_source()
    assert plan.num_steps == 4
    assert steps_of(plan, range(28)) == [*steps_of(longer, [0, 1])]


@pytest.mark.parametrize("plan", [one_big_source(), make(WEIGHTED)], ids=["one", "weighted"])
def test_a_substitute_exists_and_is_the_same_for_every_reader(plan: Plan) -> None:
    counts = [counts for counts, _ in WEIGHTED.values()]
    whole, part = plan.rows(2, 9, 0, 24), plan.rows(2, 9, 8, 16)
    for row in range(8):
        own = (int(part.source[row]), int(part.shard[row]), int(part.sample[row]))
        found = [plan.substitute(part, row, attempt) for attempt in (1, 2, 3)]
        assert found == [plan.substitute(whole, row + 8, attempt) for attempt in (1, 2, 3)]
        assert len({own, *found}) == 4
        for source, shard, sample in found:
            assert 0 <= sample < counts[source][shard]
            assert plan.weights is None or source == own[0]


def test_what_decides_the_order_is_described() -> None:
    described = json.loads(json.dumps(make(WEIGHTED, epoch_samples=480).describe()))
    assert described == {
        "seed": 5,
        "global_batch": 24,
        "lanes": 4,
        "window_shards": 2,
        "resampled": False,
        "epoch_samples": 480,
        "weights": [6.0, 3.0, 1.5],
    }


@pytest.mark.parametrize(
    ("sources", "changes", "message"),
    [
        ({"a": (np.array([0, 0]), None)}, {}, "source a has no samples"),
        ({"a": (np.array([9]), None)}, {}, "9 samples does not fill a global batch of 24"),
        ({"a": (np.array([90]), None)}, {"epoch_samples": 20}, "20 samples does not fill a global batch of 24"),
        ({"a": (np.array([90]), 1.0), "b": (np.array([90]), None)}, {}, "source b has weight=None"),
        ({"a": (np.array([90]), 1.0), "b": (np.array([90]), -1.0)}, {}, "source b has weight=-1.0"),
        ({"a": (np.array([90]), 99.0), "b": (np.array([90]), 1.0)}, {}, "source b has weight=1.0 of 100.0, .* no row"),
    ],
)
def test_impossible_plans_are_refused(
    sources: dict[str, tuple[np.ndarray, float | None]], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(sources, **changes)


@pytest.mark.parametrize("seed", range(30))
def test_evaluation_sees_every_sample_once_in_order_over_all_ranks(seed: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(0, 9, size=int(random.integers(1, 12)))
    batch_size, world = int(random.integers(1, 9)), int(random.integers(1, 6))
    plans = [EvalPlan(counts, batch_size, world, rank) for rank in range(world)]
    lengths = {len(plan) for plan in plans}
    assert lengths == {-(-int(counts.sum()) // (batch_size * world))}
    expected = [(shard, sample) for shard, count in enumerate(counts) for sample in range(count)]
    for rank, plan in enumerate(plans):
        seen = []
        for number in range(len(plan)):
            shards, samples, valid = plan.rows(number)
            assert len(shards) == len(samples) == len(valid) == batch_size
            seen += list(zip(shards[valid].tolist(), samples[valid].tolist(), strict=True))
        # As predictions of the ranks are put together: each has every `world`-th.
        assert seen == expected[rank::world]
