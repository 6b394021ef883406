"""Training and evaluation over http while the server fails: the samples of a local run, or replaced and counted."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faulty_server import Fault, FaultyServer
from shard_files import write_pairs

from datamodules.batch import ImageTextBatch
from datamodules.webdataset import settings
from datamodules.webdataset.image_text import ImageTextShards
from datamodules.webdataset.manifest import Manifest, make_manifest
from datamodules.webdataset.meters import Meter
from datamodules.webdataset.settings import Access, Shuffling
from datamodules.webdataset.sources import Shards
from datamodules.webdataset.storage import Storage

NUM_SHARDS, PER_SHARD = 6, 11
# Seconds: what a busy machine may take to answer itself, and what lies between attempts.
TIMEOUT, BACKOFF = 1.0, 0.01


@dataclass
class Served:
    """Shards in a folder and on a server, with an index of each."""

    server: FaultyServer
    local: Path
    index: Path
    urls: str

    def path(self, shard: int) -> str:
        return f"/{shard:05}.tar"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # The datamodule's own waits are for networks.
    monkeypatch.setattr(settings, "Storage", partial(Storage, backoff=BACKOFF))
    write_pairs(tmp_path / "shards", num_shards=NUM_SHARDS, per_shard=PER_SHARD)
    with FaultyServer() as server:
        server.files |= {f"/{path.name}": path.read_bytes() for path in (tmp_path / "shards").glob("*.tar")}
        urls = f"{server.url}/{{00000..{NUM_SHARDS - 1:05}}}.tar"
        yield Served(server, tmp_path / "shards", tmp_path / "index", urls)


def index(served: Served) -> Manifest:
    paths = [served.server.url + served.path(shard) for shard in range(NUM_SHARDS)]
    manifest = make_manifest(paths, served.index, name="shards")
    served.server.requests.clear()
    return manifest


def open_pairs(shards: Shards, *, access: Access | None = None, **options: Any) -> ImageTextShards:
    data = ImageTextShards(
        train=shards,
        val=shards,
        image_size=32,
        batch_size=22,
        shuffling=Shuffling(lanes=4, window_shards=2),
        access=access or Access(retries=2, timeout=TIMEOUT),
        **{"num_workers": 0, **options},
    )
    data.setup("fit")
    return data


def names(batch: ImageTextBatch) -> list[str]:
    return [key.rpartition("/")[2] for key in batch["key"]]


def take_epoch(data: ImageTextShards) -> tuple[list[ImageTextBatch], Meter]:
    """Return the batches of an epoch, which has all samples, and what was counted."""
    loader = data.train_dataloader()
    batches = list(loader)
    meter, _ = loader.take_meter()
    return batches, meter


def epoch(data: ImageTextShards) -> tuple[list[list[str]], Meter]:
    """Return the keys of those batches."""
    batches, meter = take_epoch(data)
    return [names(batch) for batch in batches], meter


def test_index_over_http_is_that_of_the_files(served: Served) -> None:
    over_http = index(served)
    local = open_pairs(Shards(urls=str(served.local))).train[0].open()
    assert over_http.digest == local.digest
    assert over_http.counts.tolist() == local.counts.tolist()
    for shard in range(NUM_SHARDS):
        mine, theirs = over_http.index(shard), local.index(shard)
        assert [(mine.key(i), mine.span(i)) for i in range(len(mine))] == [
            (theirs.key(i), theirs.span(i)) for i in range(len(theirs))
        ]


def test_shards_of_a_server_without_an_index_are_refused_with_the_command_that_makes_it(served: Served) -> None:
    with pytest.raises(FileNotFoundError, match=r"internimage shards index http://.*--out .*index"):
        open_pairs(Shards(urls=served.urls, index=served.index))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_faults_that_pass_change_no_key_and_no_pixel(served: Served, num_workers: int) -> None:
    expected, _ = take_epoch(open_pairs(Shards(urls=str(served.local))))
    manifest = index(served)
    passing = [
        [Fault(status=503), Fault(status=503)],
        [Fault(after=300, then="reset"), Fault(after=0, then="reset")],
        [Fault(after=300, then="stall")],
        [Fault(extra=10), Fault(extra=-10)],
        [Fault(shift=512), Fault(after=300, then="close")],
        [Fault(status=429, headers={"Retry-After": "0"})],
    ]
    # The first samples of a shard meet them when they are asked for.
    for shard, faults in enumerate(passing):
        for i in range(2):
            start, _ = manifest.index(shard).span(i)
            served.server.faults[served.path(shard), start] = list(faults)
    num_faults = sum(len(faults) for faults in served.server.faults.values())
    data = open_pairs(Shards(urls=served.urls, index=served.index), num_workers=num_workers)
    found, meter = take_epoch(data)
    assert [names(batch) for batch in found] == [names(batch) for batch in expected]
    assert all(a["image"].equal(b["image"]) for a, b in zip(found, expected, strict=True))
    assert not meter.bad
    assert meter.storage["retries"] == num_faults
    # One for each sample and one for each fault.
    assert len(served.server.requests) == NUM_SHARDS * PER_SHARD + num_faults


def test_evaluation_over_a_failing_server_misses_no_sample(served: Served) -> None:
    index(served)
    for shard in range(NUM_SHARDS):
        served.server.faults[served.path(shard)] = [Fault(status=503), Fault(after=100, then="reset")]
    loader = open_pairs(Shards(index=served.index)).val_dataloader()
    keys = [key for batch in loader for key, ok in zip(names(batch), batch["valid"], strict=True) if ok]
    assert keys == [f"{number:06}" for number in range(NUM_SHARDS * PER_SHARD)]


LASTING = {
    "404": (Fault(status=404), "status 404"),
    "503": (Fault(status=503), "failed 3 times"),
    "reset": (Fault(after=200, then="reset"), "failed 3 times"),
    "length": (Fault(extra=-10), "failed 3 times"),
    "another shard": (Fault(total=1), "the shard was changed"),
    "no ranges": (Fault(ranges=False), "does not serve ranges"),
}


@pytest.mark.parametrize(("fault", "message"), LASTING.values(), ids=LASTING)
def test_samples_of_a_shard_out_of_reach_are_replaced_and_counted(served: Served, fault: Fault, message: str) -> None:
    expected, _ = epoch(open_pairs(Shards(urls=str(served.local))))
    index(served)
    served.server.always[served.path(2)] = fault
    found, meter = epoch(open_pairs(Shards(urls=served.urls, index=served.index)))
    gone = {f"{number:06}" for number in range(2 * PER_SHARD, 3 * PER_SHARD)}
    # What can be read comes at its place; in the places of the others come samples that can be read too.
    assert len(found) == 3
    for mine, theirs in zip(found, expected, strict=True):
        assert [a for a, b in zip(mine, theirs, strict=True) if b not in gone] == [b for b in theirs if b not in gone]
        assert not gone & set(mine)
    assert set(meter.bad) == {(0, "transport")}
    assert {entry.name.rpartition("/")[2] for entry in meter.entries} == gone
    assert meter.bad[0, "transport"] == len(meter.entries) >= PER_SHARD
    assert all(message in entry.message for entry in meter.entries)
    assert meter.samples == {0: NUM_SHARDS * PER_SHARD}


def test_a_cache_keeps_the_keys_and_reads_each_shard_once(served: Served, tmp_path: Path) -> None:
    expected, _ = epoch(open_pairs(Shards(urls=str(served.local))))
    index(served)
    for shard in range(NUM_SHARDS):
        served.server.faults[served.path(shard)] = [Fault(after=4000, then="reset"), Fault(status=503)]
    access = Access(retries=2, timeout=TIMEOUT, cache=tmp_path / "cache", fill="first")
    data = open_pairs(Shards(urls=served.urls, index=served.index), access=access)
    found, meter = epoch(data)
    assert found == expected
    assert meter.storage["misses"] == NUM_SHARDS
    assert meter.storage["hits"] == NUM_SHARDS * (PER_SHARD - 1)
    assert meter.storage["bytes"] == sum(len(content) for content in served.server.files.values())
    served.server.requests.clear()
    again, _ = epoch(open_pairs(Shards(urls=served.urls, index=served.index), access=access))
    assert again == expected
    assert served.server.requests == []


def test_a_mirror_takes_the_place_of_a_server_that_is_gone(served: Served) -> None:
    expected, _ = epoch(open_pairs(Shards(urls=str(served.local))))
    index(served)
    served.server.files |= {f"/mirror{path}": content for path, content in served.server.files.items()}
    for shard in range(0, NUM_SHARDS, 2):
        served.server.always[served.path(shard)] = Fault(status=404)
    mirrors = ((f"{served.server.url}/", f"{served.server.url}/mirror/"),)
    data = open_pairs(Shards(index=served.index), access=Access(retries=0, timeout=TIMEOUT, mirrors=mirrors))
    found, meter = epoch(data)
    assert found == expected
    assert not meter.bad
