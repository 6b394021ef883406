"""The promises of the datamodule over shards in real runs of several processes: keys, resume, evaluation, counts."""

import csv
import json
import random
import signal
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from shard_files import square, write_pairs
from shard_runs import Job, run

# Two epochs of 4 steps, and one step more.
STEPS, PER_EPOCH = 9, 4
# Numbers of the bad samples, and what is wrong with them.
BAD = {3: "decode", 14: "decode", 17: "text", 25: "text", 31: "parts", 40: "label"}
BROKEN: dict[int, dict[str, bytes | None]] = {
    3: {"jpg": square(3)[:300]},
    14: {"jpg": b"<html>not found</html>"},
    17: {"txt": None},
    25: {"txt": b"\xff\xfe\xfa"},
    31: {"jpg": None},
    40: {"cls": b"99"},
}


@dataclass
class Runs:
    """Finished runs, and the folders of their shards."""

    keys: list[str]
    plain: Path
    mixed: Path
    jobs: dict[str, Job]


def spread(job: dict[str, Any], world: int, num_workers: int) -> dict[str, Any]:
    data = {**job.get("data", {}), "num_workers": num_workers}
    return {**job, "world": world, "ranks": list(range(world)), "data": data}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    keys = write_pairs(folder / "plain", num_shards=6, per_shard=11)
    write_pairs(folder / "mixed" / "large", num_shards=6, per_shard=11, changed=BROKEN)
    write_pairs(folder / "mixed" / "small", num_shards=1, per_shard=6, first=900)
    unusable: dict[int, dict[str, bytes | None]] = {number: {"txt": None} for number in range(0, 66, 2)}
    write_pairs(folder / "bad", num_shards=6, per_shard=11, changed=unusable)
    sources = {name: [{"urls": str(folder / name)}] for name in ("plain", "bad")}
    mixed = [{"urls": str(folder / "mixed" / name), "weight": weight} for name, weight in (("large", 3), ("small", 1))]
    whole = {"train": sources["plain"], "val": [sources["plain"][0], mixed[0] | {"weight": None}]}
    # One report at the end, so that it is over the whole run.
    counted = {"train": mixed, "trainer": {"log_every_n_steps": STEPS}, "data": {"max_bad_share": 0.5}}
    stopped = {"train": sources["bad"], "trainer": {"log_every_n_steps": 2}, "data": {"max_bad_share": 0.1}}
    described = {
        "whole/1": spread(whole, 1, 0),
        "whole/2": spread(whole, 2, 1),
        "counted/1": spread(counted, 1, 0),
        "counted/2": spread(counted, 2, 1),
        "stopped/2": spread(stopped, 2, 0),
    }
    jobs = {name: Job(folder=str(folder / name), max_steps=STEPS, **job) for name, job in described.items()}
    run(*jobs.values())
    return Runs(keys, folder / "plain", folder / "mixed", jobs)


def check_epochs(keys: list[str], steps: dict[int, list[str]]) -> None:
    """Each key at most once in an epoch, and none from elsewhere."""
    for first in range(0, STEPS, PER_EPOCH):
        seen = [key for step in range(first, min(first + PER_EPOCH, STEPS)) for key in steps[step]]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(keys)


def check_same(job: Job, expected: Job) -> None:
    """Every step of a run has the keys of another run's, and its validation the same samples and sums."""
    assert job.status() == [0] * job.world
    assert job.steps() == expected.steps()
    for rank in job.ranks:
        metrics = job.result(rank)["metrics"]
        for name, value in expected.result(0)["metrics"].items():
            if name.startswith("val/"):
                # Counts are exact; pixels are the same numbers added in another order, in float64.
                assert metrics[name] == pytest.approx(value, rel=1e-9 if "pixels" in name else 0)
    assert [Counter(keys) for keys in job.evaluated()] == [Counter(keys) for keys in expected.evaluated()]


def test_two_processes_train_and_validate_on_the_samples_of_one(runs: Runs) -> None:
    one = runs.jobs["whole/1"]
    steps = one.steps()
    assert list(steps) == list(range(STEPS))
    assert {len(keys) for keys in steps.values()} == {16}
    check_epochs(runs.keys, steps)
    check_same(runs.jobs["whole/2"], one)
    good = [key for key in runs.keys if int(key) not in BAD]
    assert [sorted(keys) for keys in one.evaluated()] == [runs.keys, good]
    metrics = one.result(0)["metrics"]
    assert (metrics["val/count/dataloader_idx_0"], metrics["val/count/dataloader_idx_1"]) == (66, 66 - len(BAD))


def listed(job: Job) -> list[dict[str, Any]]:
    """Return the lines of the list of bad samples."""
    files = (Path(job.folder) / "bad_samples").glob("*.jsonl")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def spans(folder: Path) -> dict[str, int]:
    """Return the bytes of each sample in its shard, from its first header to the end of its last part."""
    starts: dict[str, int] = {}
    stops: dict[str, int] = {}
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key = member.name.partition(".")[0]
                starts.setdefault(key, member.offset)
                stops[key] = member.offset_data + member.size
    return {key: stops[key] - starts[key] for key in starts}


def test_bad_samples_are_replaced_alike_and_counted_over_ranks(runs: Runs) -> None:
    one, two = runs.jobs["counted/1"], runs.jobs["counted/2"]
    assert two.steps() == one.steps()
    for job in (one, two):
        entries = listed(job)
        names = {int(entry["name"].rpartition("/")[2]): entry["cause"] for entry in entries}
        # 12 of the 66 samples a step, nine times: all have come.
        assert names == BAD
        expected = Counter(f"data/bad/{entry['source']}/{entry['cause']}" for entry in entries)
        for rank in job.ranks:
            metrics = job.result(rank)["metrics"]
            assert {name: n for name, n in metrics.items() if name.startswith("data/bad/")} == expected
            assert metrics["data/bad"] == len(entries)
    assert Counter(entry["name"] for entry in listed(one)) == Counter(entry["name"] for entry in listed(two))


def test_meters_of_any_number_of_processes_tell_samples_bytes_and_mix(runs: Runs) -> None:
    size = spans(runs.mixed)
    for job in (runs.jobs["counted/1"], runs.jobs["counted/2"]):
        keys = [key for step in job.steps().values() for key in step]
        read = [*keys, *(entry["name"].rpartition("/")[2] for entry in listed(job))]
        for rank in job.ranks:
            metrics = job.result(rank)["metrics"]
            mix = metrics["data/samples/large"], metrics["data/samples/small"]
            assert mix == (12 * STEPS, 4 * STEPS) == tuple(sum(int(key) // 900 == k for key in keys) for k in (0, 1))
            # Both are over the same time, which cancels; what is logged is float32.
            num_bytes = metrics["data/megabytes_per_s"] / metrics["data/images_per_s"] * 1e6 * len(keys)
            assert num_bytes == pytest.approx(sum(size[key] for key in read), rel=1e-6)
            assert 0 < metrics["data/wait"] <= 1
            assert metrics["data/decode_ms"] > 0
            assert metrics["data/read_ms"] > 0
            # The epoch is that of the run: 72 samples, 4 steps.
            assert metrics["data/epoch"] == STEPS / PER_EPOCH


def test_too_many_bad_samples_stop_all_ranks_at_the_same_step(runs: Runs) -> None:
    job = runs.jobs["stopped/2"]
    assert job.status() == [0, 0]
    results = [job.result(rank) for rank in job.ranks]
    assert [result["error"] for result in results] == ["TooManyBadSamplesError"] * 2
    # Half of the samples are bad: ten are, at the first report.
    assert [result["step"] for result in results] == [2, 2]
    assert results[0]["message"] == results[1]["message"]
    assert "bad/text" in results[0]["message"]


def test_progress_is_in_the_log_file(runs: Runs) -> None:
    with (Path(runs.jobs["whole/2"].folder) / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["data/samples/plain"]]
    assert [float(row["data/samples/plain"]) for row in rows] == [16.0 * step for step in range(1, STEPS + 1)]


@pytest.mark.slow
def test_four_processes_equal_one(runs: Runs, tmp_path: Path) -> None:
    one = runs.jobs["whole/1"]
    parts = {"train": one.train, "val": one.val, "max_steps": STEPS}
    four = Job(folder=str(tmp_path / "4"), **spread(parts, 4, 1))
    halves = Job(folder=str(tmp_path / "2x2"), trainer={"accumulate_grad_batches": 2}, **spread(parts, 2, 0))
    run(four, halves)
    check_same(four, one)
    # Each rank has its rows of a step in two batches.
    check_same(halves, one)


@pytest.mark.slow
def test_overfitting_takes_the_same_batches_again_on_each_of_two_processes(runs: Runs, tmp_path: Path) -> None:
    one = runs.jobs["whole/1"]
    parts = {"train": one.train, "val": one.val[:1], "max_steps": 6, "trainer": {"overfit_batches": 2}}
    job = Job(folder=str(tmp_path / "overfit"), **spread(parts, 2, 0))
    run(job)
    assert job.status() == [0, 0]
    assert [job.result(rank)["error"] for rank in job.ranks] == [None, None]
    steps = job.steps()
    assert steps[0] != steps[1]
    assert all(len(steps[k]) == 16 and steps[k] == steps[k % 2] for k in range(6))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [((1, 2), (2, 0)), ((2, 2), (4, 1)), ((4, 1), (1, 2))], ids=["1to2", "2to4", "4to1"]
)
def test_a_killed_rank_ends_the_run_and_other_ranks_go_on_exactly(
    runs: Runs, tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    one = runs.jobs["whole/1"]
    parts = {"train": one.train, "max_steps": STEPS}
    # At some step; fixed, so that a failure can be looked into.
    step = random.Random(10 * before[0] + after[0]).randrange(3, STEPS)
    killed = Job(folder=str(tmp_path / "killed"), kill=(before[0] - 1, step), **spread(parts, *before))
    resumed = Job(folder=str(tmp_path / "resumed"), resume=killed.checkpoint(), **spread(parts, *after))
    run(killed, resumed)
    # The others notice by themselves that one is gone.
    assert killed.status().count(-signal.SIGKILL) == 1
    assert resumed.status() == [0] * after[0]
    expected, first, second = one.steps(), killed.steps(), resumed.steps()
    assert {k: first[k] for k in range(step)} == {k: expected[k] for k in range(step)}
    # Checkpoints come after every second step.
    assert list(second) == list(range(step - step % 2, STEPS))
    assert second == {k: expected[k] for k in second}
    check_epochs(runs.keys, {**first, **second})
