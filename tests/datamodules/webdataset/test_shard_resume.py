"""The order of samples, by key: the same for any split, and gone on with after a kill on any other."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from shard_data import Ranks, global_batches, names, open_pairs
from shard_files import write_pairs

from datamodules.webdataset.settings import Shuffling
from datamodules.webdataset.sources import Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("pairs")
    return folder, write_pairs(folder, num_shards=6, per_shard=11)


@pytest.mark.parametrize(
    ("world", "accumulation", "num_workers"), [(2, 1, 0), (4, 1, 0), (1, 2, 0), (2, 4, 0), (1, 1, 2)]
)
def test_a_step_sees_the_same_samples_however_it_is_split(
    shards: tuple[Path, list[str]], world: int, accumulation: int, num_workers: int
) -> None:
    folder, _ = shards
    # Two epochs of 4 steps, and one step more.
    expected = global_batches(folder, 9, world=1, accumulation=1, num_workers=0)
    assert global_batches(folder, 9, world=world, accumulation=accumulation, num_workers=num_workers) == expected


def test_an_epoch_has_each_sample_at_most_once_and_the_next_another_order(shards: tuple[Path, list[str]]) -> None:
    folder, keys = shards
    loader = open_pairs(train=Shards(urls=str(folder)), batch_size=16).train_dataloader()
    epochs = [[name for batch in loader for name in names(batch)] for _ in range(2)]
    assert len(loader) == 4
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 64
        assert set(epoch) <= set(keys)
    assert epochs[0] != epochs[1]


# Hands out batches with two workers alive, says after each what a checkpoint would hold, and is killed.
KILLED = """
import json, os, signal, sys
sys.path[:0] = sys.argv[2:]
from shard_data import endless, open_pairs
from datamodules.webdataset.sources import Shards

loader = open_pairs(train=Shards(urls=sys.argv[1]), batch_size=16, num_workers=2).train_dataloader()
stream = endless(loader)
for _ in range(6):
    next(stream)
    print(json.dumps(loader.state_dict()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def states(shards: tuple[Path, list[str]]) -> list[str]:
    root = Path(__file__).parents[3]
    paths = [str(path) for path in (root, root / "tests/golden")]
    command = [sys.executable, "-c", KILLED, str(shards[0]), *paths]
    killed = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    return killed.stdout.splitlines()


@pytest.mark.parametrize(("world", "num_workers", "stopped"), [(1, 0, 2), (2, 0, 3), (4, 0, 5), (1, 2, 6)])
def test_a_run_goes_on_with_the_next_sample_on_other_ranks_and_workers(
    shards: tuple[Path, list[str]], states: list[str], world: int, num_workers: int, stopped: int
) -> None:
    folder, _ = shards
    uninterrupted = global_batches(folder, 9, world=1, accumulation=1, num_workers=0)
    state = states[stopped - 1]
    assert len(state) < 1024
    parts = []
    for rank in range(world):
        options = {"batch_size": 16 // world, "num_workers": num_workers}
        data = open_pairs(Ranks(rank, world), train=Shards(urls=str(folder)), **options)
        loader = data.train_dataloader()
        loader.load_state_dict(json.loads(state))
        parts.append(names(next(iter(loader))))
    assert [name for part in parts for name in part] == uninterrupted[stopped]


# Workers make batches of which nobody takes any, until the pipe is full; then the process is killed.
FULL = """
import os, signal, sys, time
sys.path[:0] = sys.argv[2:]
from shard_data import open_pairs
from datamodules.webdataset.sources import Shards

options = {"batch_size": 1, "num_workers": 2, "prefetch_factor": 40}
loader = open_pairs(train=Shards(urls=sys.argv[1]), **options).train_dataloader()
iterator = iter(loader)
next(iterator)
time.sleep(2)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_process_that_trains(shards: tuple[Path, list[str]]) -> None:
    root = Path(__file__).parents[3]
    paths = [str(path) for path in (root, root / "tests/golden")]
    # The workers hold the other end of the pipe: it is read to its end when they are gone.
    killed = subprocess.run(
        [sys.executable, "-c", FULL, str(shards[0]), *paths], stdout=subprocess.PIPE, timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"seed": 7}, "seed"), ({"batch_size": 8}, "global_batch"), ({"shuffling": Shuffling(lanes=1)}, "lanes")],
)
def test_another_run_is_refused_by_name(shards: tuple[Path, list[str]], changes: dict[str, Any], field: str) -> None:
    folder, _ = shards
    loader = open_pairs(train=Shards(urls=str(folder)), batch_size=16).train_dataloader()
    next(iter(loader))
    other = open_pairs(**{"train": Shards(urls=str(folder)), "batch_size": 16, **changes}).train_dataloader()
    with pytest.raises(ValueError, match=field):
        other.load_state_dict(loader.state_dict())


def test_other_shards_are_refused(shards: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = shards
    write_pairs(tmp_path / "pairs", num_shards=6, per_shard=12)
    loader = open_pairs(train=Shards(urls=str(folder)), batch_size=16).train_dataloader()
    next(iter(loader))
    other = open_pairs(train=Shards(urls=str(tmp_path / "pairs")), batch_size=16).train_dataloader()
    with pytest.raises(ValueError, match="data"):
        other.load_state_dict(loader.state_dict())
