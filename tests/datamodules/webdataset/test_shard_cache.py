"""A cache of shards that processes share: right bytes within the limit, whoever dies and whatever the disk does."""

import errno
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import threading
import time
import warnings
import zlib
from pathlib import Path

import pytest
from faulty_server import Fault, FaultyServer

from datamodules.webdataset.cache import ShardCache
from datamodules.webdataset.storage import Storage, TransportError

SIZE = 300_000
SHARDS = {f"/{number}.tar": random.Random(number).randbytes(SIZE) for number in range(6)}
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    # Less than a block is lost when a download breaks off; these shards have less than a usual block.
    monkeypatch.setattr("datamodules.webdataset.http.BLOCK", 10_000)
    with FaultyServer() as server:
        server.files.update(SHARDS)
        yield server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def storage(folder, shards=3, fill="first", **options):
    cache = ShardCache(folder, shards * SIZE, fill=fill)
    return Storage(cache, **{"retries": 2, "backoff": 0.01, "timeout": 2.0, **options})


def read(source, server, name="/0.tar", start=1000, stop=2000, checksum=True):
    known = zlib.crc32(SHARDS[name]) if checksum else None
    block = source.read(server.url + name, start, stop, size=SIZE, checksum=known)
    assert block == SHARDS[name][start:stop]


def kept(folder):
    return sorted(path for path in folder.iterdir() if path.name != "lock")


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def whole_downloads(server):
    return [path for path, asked in server.requests if asked == (0, SIZE)]


def test_one_download_serves_all_reads_of_all_runs(server, folder):
    source = storage(folder)
    for start in (0, 10, 200_000):
        read(source, server, start=start, stop=start + 9)
    read(storage(folder), server)
    assert server.requests == [("/0.tar", (0, SIZE))]
    counts = source.take_counts()
    assert (counts["misses"], counts["hits"], counts["bytes"]) == (1, 2, SIZE)
    assert source.take_counts() == {}


def test_background_reads_directly_until_the_shard_is_there(server, folder):
    source = storage(folder, fill="background")
    read(source, server)
    assert ("/0.tar", (1000, 2000)) in server.requests
    wait_for(lambda: folder.is_dir() and any(path.suffix == ".tar" for path in kept(folder)))
    before = len(server.requests)
    read(source, server)
    assert len(server.requests) == before
    assert whole_downloads(server) == ["/0.tar"]
    counts = source.take_counts()
    assert (counts["misses"], counts["hits"], counts["bytes"]) == (1, 1, SIZE + 1000)


def test_background_download_that_fails_leaves_direct_reads(server, folder, monkeypatch):
    source = storage(folder, fill="background", retries=0)
    # Only the download starts at byte 0.
    server.faults["/0.tar", 0] = [Fault(flip=True)]
    shown = []
    monkeypatch.setattr("datamodules.webdataset.cache.warnings.warn", lambda text, **_: shown.append(text))
    read(source, server)
    wait_for(lambda: shown)
    assert "CRC-32" in shown[0]
    read(source, server)
    assert whole_downloads(server) == ["/0.tar"]
    assert server.requests.count(("/0.tar", (1000, 2000))) == 2
    assert kept(folder) == []


@pytest.mark.parametrize("checksum", [True, False])
def test_download_goes_on_after_a_reset(server, folder, checksum):
    server.faults["/0.tar"] = [Fault(after=200_000, then="close")]
    read(storage(folder), server, checksum=checksum)
    assert server.requests == [("/0.tar", (0, SIZE)), ("/0.tar", (200_000, SIZE))]


def test_corrupt_bytes_are_refused_and_fetched_again(server, folder):
    server.faults["/0.tar"] = [Fault(flip=True)]
    source = storage(folder)
    read(source, server, start=SIZE - 10, stop=SIZE)
    assert whole_downloads(server) == ["/0.tar", "/0.tar"]
    assert source.take_counts()["retries"] == 1


def test_bytes_that_stay_corrupt_are_an_error_and_not_kept(server, folder):
    server.always["/0.tar"] = Fault(flip=True)
    with pytest.raises(TransportError, match=r"failed 3 times, lastly with .*CRC-32"):
        read(storage(folder), server)
    assert kept(folder) == []


def test_mirror_takes_over_a_download(server, folder):
    server.files["/mirror/0.tar"] = SHARDS["/0.tar"]
    server.always["/0.tar"] = Fault(after=100_000)
    read(storage(folder, retries=0, mirrors=[(server.url, f"{server.url}/mirror")]), server)
    assert server.requests[-1] == ("/mirror/0.tar", (100_000, SIZE))


def test_server_without_ranges_serves_the_cache(server, folder):
    server.always["/0.tar"] = Fault(ranges=False)
    server.faults["/0.tar"] = [Fault(ranges=False, after=100_000)]
    read(storage(folder), server)


def test_shards_used_longest_ago_make_room(server, folder):
    source = storage(folder, shards=3)
    for age, name in ((30, "/0.tar"), (20, "/1.tar"), (10, "/2.tar")):
        before = set(kept(folder)) if folder.exists() else set()
        read(source, server, name)
        (path,) = set(kept(folder)) - before
        os.utime(path, (time.time() - age,) * 2)
    read(source, server, "/0.tar")
    read(source, server, "/3.tar")
    server.requests.clear()
    for name in ("/0.tar", "/2.tar", "/3.tar"):
        read(source, server, name)
    assert server.requests == []
    read(source, server, "/1.tar")
    assert whole_downloads(server) == ["/1.tar"]


def test_shard_larger_than_the_limit_is_an_error(server, folder):
    source = Storage(ShardCache(folder, SIZE - 1))
    with pytest.raises(ValueError, match=f"/0.tar has {SIZE} bytes, more than max_bytes={SIZE - 1}"):
        read(source, server)


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_bytes": 1, "fill": "never"}])
def test_wrong_settings_are_named(folder, options):
    with pytest.raises(ValueError, match=r"ShardCache: (max_bytes=0|fill='never')"):
        ShardCache(folder, **options)


def test_processes_share_downloads_and_stay_within_the_limit(server, folder):
    """Four processes read all six shards in different orders through a cache for two and a half."""
    limit = 2 * SIZE + SIZE // 2
    server.always.update(dict.fromkeys(SHARDS, Fault(pause=0.002)))

    def work(seed):
        source = Storage(ShardCache(folder, limit, fill="first"), retries=2, backoff=0.01, timeout=5.0)
        order = random.Random(seed)
        for _ in range(20):
            read(source, server, order.choice(list(SHARDS)), order.randrange(1000), order.randrange(2000, SIZE))

    processes = [FORK.Process(target=work, args=(seed,)) for seed in range(4)]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        # One after the other, so that a shard renamed meanwhile may count twice, never not at all.
        sizes = {}
        for path in folder.glob("*-*"):
            try:
                found = path.stat()
                sizes[found.st_ino] = found.st_size
            except FileNotFoundError:
                continue
        largest = max(largest, sum(sizes.values()))
    assert [process.exitcode for process in processes] == [0] * 4
    assert SIZE < largest <= limit
    assert {path.suffix for path in kept(folder)} == {".tar"}


def test_processes_download_a_shard_once(server, folder):
    server.always["/0.tar"] = Fault(pause=0.02)

    def work():
        read(storage(folder), server)

    processes = [FORK.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.requests == [("/0.tar", (0, SIZE))]


@pytest.mark.parametrize("checksum", [True, False])
def test_download_of_a_killed_process_is_taken_over(server, folder, checksum):
    server.always["/0.tar"] = Fault(block=10_000, pause=0.02)

    def work():
        read(storage(folder), server, checksum=checksum)

    first, second = FORK.Process(target=work), FORK.Process(target=work)
    first.start()
    wait_for(lambda: any(path.stat().st_size > 50_000 for path in folder.glob("*.part")))
    second.start()
    time.sleep(0.2)
    assert first.is_alive()
    os.kill(first.pid, signal.SIGKILL)
    second.join(20)
    first.join(20)
    assert (first.exitcode, second.exitcode) == (-signal.SIGKILL, 0)
    (shard,) = kept(folder)
    assert shard.read_bytes() == SHARDS["/0.tar"]
    # Without a checksum nobody can tell whether what was left is whole, so it is not gone on with.
    (_, (resumed, _)) = server.requests[1]
    assert (resumed > 50_000) == checksum
    assert len(server.requests) == 2


def test_leftovers_of_killed_processes_are_removed_and_foreign_files_are_not(server, folder):
    folder.mkdir()
    (folder / f"{'0' * 32}-{3 * SIZE}.part").write_bytes(bytes(100))
    (folder / "notes.part").write_bytes(bytes(100))
    read(storage(folder), server)
    assert sorted(path.suffix for path in kept(folder)) == [".part", ".tar"]
    assert (folder / "notes.part").exists()


def test_shard_that_was_cut_by_others_is_fetched_again(server, folder):
    source = storage(folder)
    read(source, server)
    os.truncate(kept(folder)[0], SIZE - 1)
    read(source, server)
    assert whole_downloads(server) == ["/0.tar"] * 2


def test_another_version_of_a_shard_is_another_shard(server, folder):
    source = storage(folder)
    read(source, server)
    old = SHARDS["/0.tar"]
    server.files["/0.tar"] = new = old[::-1]
    block = source.read(server.url + "/0.tar", 5, 9, size=SIZE, checksum=zlib.crc32(new))
    assert block == new[5:9]


@pytest.mark.parametrize("fill", ["first", "background"])
def test_full_disk_costs_a_warning_and_direct_reads(server, folder, monkeypatch, fill):
    write = os.write

    def full(file, block):
        if Path(f"/proc/self/fd/{file}").readlink().suffix == ".part":
            if os.fstat(file).st_size > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            block = block[:70_000]
        return write(file, block)

    monkeypatch.setattr("datamodules.webdataset.cache.os.write", full)
    source = storage(folder, fill=fill)
    shown = []
    monkeypatch.setattr("datamodules.webdataset.cache.warnings.warn", lambda text, **_: shown.append(text))
    read(source, server)
    wait_for(lambda: shown)
    read(source, server)
    read(source, server, "/1.tar")
    assert len(shown) == 1
    assert "No space left on device" in shown[0]
    assert source.take_counts()["fallbacks"] >= 2
    assert kept(folder) == []
    assert len(whole_downloads(server)) == 1


def test_full_disk_is_tried_again_after_a_while(server, folder, monkeypatch):
    monkeypatch.setattr("datamodules.webdataset.cache.PAUSE", 0.0)
    folder.parent.joinpath("file").touch()
    folder.symlink_to(folder.parent / "file")
    source = storage(folder)
    with pytest.warns(UserWarning, match="cannot be used"):
        read(source, server)
    folder.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(source, server)
        read(source, server)
    assert source.take_counts()["hits"] == 1


def test_unusable_folder_costs_a_warning_and_direct_reads(server, folder):
    folder.touch()
    source = storage(folder)
    with pytest.warns(UserWarning, match=rf"the cache {folder} cannot be used: "):
        read(source, server)
    read(source, server)
    assert source.take_counts()["fallbacks"] == 2
    assert server.requests == [("/0.tar", (1000, 2000))] * 2


def test_command_in_an_unusable_folder_is_an_error(folder):
    folder.touch()
    with (
        pytest.warns(UserWarning, match="pipe:|cannot be used"),
        pytest.raises(TransportError, match="A command cannot be read without it"),
    ):
        storage(folder).read("pipe:true", 0, 1, size=SIZE, checksum=None)


def test_folder_deleted_between_reads_is_made_again(server, folder):
    source = storage(folder)
    read(source, server)
    shutil.rmtree(folder)
    read(source, server)
    read(source, server)
    assert whole_downloads(server) == ["/0.tar"] * 2


def test_folder_deleted_during_a_download_costs_a_warning(server, folder):
    server.faults["/0.tar"] = [Fault(block=10_000, pause=0.02)]

    def delete():
        wait_for(lambda: any(folder.glob("*.part")))
        shutil.rmtree(folder)

    thread = threading.Thread(target=delete)
    thread.start()
    with pytest.warns(UserWarning, match="was deleted during the download"):
        read(storage(folder), server)
    thread.join()


def test_evicted_shard_stays_readable_where_it_is_open(server, folder):
    source = storage(folder, shards=1)
    read(source, server)
    with kept(folder)[0].open("rb") as file:
        read(source, server, "/1.tar")
        assert not os.fstat(file.fileno()).st_nlink
        assert file.read() == SHARDS["/0.tar"]


@pytest.mark.filterwarnings("ignore:ShardCache. .* Its samples are read one by one")
def test_fork_during_a_background_download_holds_no_lock(server, folder):
    """A worker forked while its parent downloads lives longer than the parent's download."""
    server.faults["/0.tar", 0] = [Fault(after=100_000, then="stall")]
    source = storage(folder, fill="background", retries=0, timeout=0.5)
    read(source, server)
    wait_for(lambda: any(path.stat().st_size for path in folder.glob("*.part")))
    worker = FORK.Process(target=time.sleep, args=(20,))
    worker.start()
    wait_for(lambda: kept(folder) == [])
    read(storage(folder), server)
    assert worker.is_alive()
    worker.kill()
    worker.join()
    assert len(kept(folder)) == 1


def test_pickled_cache_has_the_same_shards(server, folder):
    source = storage(folder)
    read(source, server)
    read(pickle.loads(pickle.dumps(source)), server)
    assert len(server.requests) == 1
