"""Bytes of shards from files, http, fsspec and commands: right or refused, whatever the other side does."""

import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from faulty_server import Fault, FaultyServer

from datamodules.webdataset.cache import ShardCache
from datamodules.webdataset.retry import BusyError, Retry
from datamodules.webdataset.storage import Storage, TransportError

CONTENT = random.Random(0).randbytes(200_000)
SIZE = len(CONTENT)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with FaultyServer() as server:
        server.files["/a.tar"] = CONTENT
        yield server


def storage(cache=None, **options):
    return Storage(cache, **{"retries": 2, "backoff": 0.01, "timeout": 0.5, **options})


def read(source, url, start=1000, stop=150_000, size=SIZE, checksum=None):
    return source.read(url, start, stop, size=size, checksum=checksum)


def in_fork(action):
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(20)
    return process.exitcode


def test_local_shards_are_read_in_place(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    source = storage()
    for url in (str(tmp_path / "a.tar"), f"file://{tmp_path}/a.tar"):
        assert read(source, url) == CONTENT[1000:150_000]
        assert read(source, url, SIZE - 1, SIZE) == CONTENT[-1:]
    assert source.take_counts()["bytes"] == 2 * (149_000 + 1)


@pytest.mark.parametrize("content", [None, CONTENT[:-1], CONTENT + b"x"])
def test_local_shard_that_is_gone_or_has_another_size_is_refused_at_once(tmp_path, content):
    if content is not None:
        (tmp_path / "a.tar").write_bytes(content)
    source = storage()
    with pytest.raises(TransportError, match=r"a\.tar, bytes 1000-149999: "):
        read(source, str(tmp_path / "a.tar"))
    assert "retries" not in source.take_counts()


def test_more_local_shards_than_may_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.webdataset.backends.MAX_OPEN", 2)
    source = storage()
    for number in range(5):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 10)
    for number in [*range(5), *range(5)]:
        assert read(source, str(tmp_path / f"{number}.tar"), 2, 4, 10) == bytes([number]) * 2
    # A listed descriptor may be closed by the time that it is looked at: the listing's own is.
    files = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert sorted(file for file in files if file.startswith(str(tmp_path))) == [
        str(tmp_path / "3.tar"),
        str(tmp_path / "4.tar"),
    ]


def test_http_reads_ask_for_their_range_over_one_connection(server):
    source = storage()
    for start in (0, 7, 100_000):
        assert read(source, f"{server.url}/a.tar", start, start + 50) == CONTENT[start : start + 50]
    assert server.requests == [("/a.tar", (start, start + 50)) for start in (0, 7, 100_000)]
    assert server.num_connections == 1


PASSING = {
    "503": Fault(status=503),
    "429": Fault(status=429),
    "reset": Fault(after=70_000, then="reset"),
    "reset before the first byte": Fault(after=0, then="reset"),
    "end": Fault(after=70_000, then="close"),
    "stall": Fault(after=70_000, then="stall"),
    "trickle": Fault(pause=0.1, block=5_000),
    "more announced": Fault(extra=10),
    "less announced": Fault(extra=-10),
    "another range": Fault(shift=512),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_faults_that_pass_are_retried(server, fault):
    server.faults["/a.tar"] = [fault]
    source = storage()
    assert read(source, f"{server.url}/a.tar") == CONTENT[1000:150_000]
    assert len(server.requests) == 2
    assert source.take_counts()["retries"] == 1


LASTING = {
    "404": (Fault(status=404), "status 404"),
    "403": (Fault(status=403), "status 403"),
    "416": (Fault(status=416), "the index says 200000 bytes"),
    "another size": (Fault(total=SIZE + 1), "it has 200001 bytes, the index says 200000"),
    "no ranges": (Fault(ranges=False), "does not serve ranges"),
}


@pytest.mark.parametrize(("fault", "message"), LASTING.values(), ids=LASTING)
def test_faults_that_last_are_not_retried(server, fault, message):
    server.faults["/a.tar"] = [fault]
    with pytest.raises(TransportError, match=rf"/a\.tar, bytes 1000-149999: .*{message}"):
        read(storage(), f"{server.url}/a.tar")
    assert len(server.requests) == 1


def test_error_after_the_last_retry_names_url_range_attempts_and_cause(server):
    server.always["/a.tar"] = Fault(status=500)
    with pytest.raises(TransportError, match=rf"{server.url}/a\.tar, bytes 1000-149999: failed 3 times, .*status 500"):
        read(storage(), f"{server.url}/a.tar")
    assert len(server.requests) == 3


def test_server_that_does_not_listen_is_an_error():
    with FaultyServer() as gone:
        url = gone.url
    with pytest.raises(TransportError, match="failed 3 times, lastly with ConnectionRefusedError"):
        read(storage(), f"{url}/a.tar")


def test_waits_double_differ_by_read_and_repeat_exactly():
    retry = Retry(retries=5, backoff=1.0)
    error = OSError("reset")
    for number in range(1, 5):
        # Half of 2 ** (number - 1) seconds is fixed, the other half is jitter.
        assert 2.0 ** (number - 2) <= retry.wait("a", number, error) <= 2.0 ** (number - 1)
        assert retry.wait("a", number, error) == retry.wait("a", number, error) != retry.wait("b", number, error)
    assert retry.wait("a", 30, error) <= 60
    assert retry.wait("a", 1, BusyError("429", 7.0)) == 7.0
    assert retry.wait("a", 1, BusyError("429", 3600.0)) == 60


def test_server_says_how_long_to_wait(server, monkeypatch):
    waits = []
    monkeypatch.setattr("datamodules.webdataset.retry.time.sleep", waits.append)
    server.faults["/a.tar"] = [Fault(status=503, headers={"Retry-After": "9"})]
    assert read(storage(), f"{server.url}/a.tar") == CONTENT[1000:150_000]
    assert waits == [9.0]


def test_connection_that_was_idle_too_long_costs_no_retry(server):
    server.idle_timeout = 0.05
    source = storage(retries=0)
    read(source, f"{server.url}/a.tar")
    time.sleep(0.2)
    assert read(source, f"{server.url}/a.tar") == CONTENT[1000:150_000]
    assert server.num_connections == 2


def test_redirects_are_followed(server):
    server.files["/old.tar"] = b""
    server.faults["/old.tar"] = [Fault(status=302, headers={"Location": "/a.tar"})]
    assert read(storage(), f"{server.url}/old.tar") == CONTENT[1000:150_000]
    server.always["/old.tar"] = Fault(status=302, headers={"Location": "/old.tar"})
    with pytest.raises(TransportError, match="more than 5 redirects"):
        read(storage(), f"{server.url}/old.tar")


def test_proxy_of_the_environment_is_asked(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    assert read(storage(), "http://shards.invalid/a.tar") == CONTENT[1000:150_000]


def test_mirrors_come_after_the_first_url(server):
    server.files["/mirror/a.tar"] = CONTENT
    server.always["/a.tar"] = Fault(status=503)
    source = storage(retries=1, mirrors=[("http://other/", "http://none/"), (server.url, f"{server.url}/mirror")])
    assert read(source, f"{server.url}/a.tar") == CONTENT[1000:150_000]
    assert [path for path, _ in server.requests] == ["/a.tar", "/a.tar", "/mirror/a.tar"]
    del server.files["/mirror/a.tar"]
    with pytest.raises(TransportError, match=r"/a\.tar, .*status 503.* Then .*/mirror/a\.tar, .*status 404"):
        read(source, f"{server.url}/a.tar")


def test_fsspec_reads_other_schemes():
    import fsspec

    with fsspec.open("memory://folder/a.tar", "wb") as file:
        file.write(CONTENT)
    source = storage()
    assert read(source, "memory://folder/a.tar") == CONTENT[1000:150_000]
    with pytest.raises(TransportError, match="FileNotFoundError"):
        read(source, "memory://folder/b.tar")
    assert "retries" not in source.take_counts()
    with pytest.raises(TransportError, match="199000 of 299000 bytes came"):
        read(source, "memory://folder/a.tar", 1000, 300_000, 300_000)


def test_open_gives_files_to_seek_in(server, tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    for url in (str(tmp_path / "a.tar"), f"{server.url}/a.tar", f"pipe:cat {tmp_path}/a.tar"):
        with storage().open(url) as file:
            assert file.read(10) == CONTENT[:10]
            file.seek(-5, os.SEEK_END)
            assert file.read() == CONTENT[-5:]


def test_forked_and_spawned_processes_read_too(server, tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    source = storage(ShardCache(tmp_path / "cache", SIZE, fill="first"))
    direct = storage()
    urls = [f"{server.url}/a.tar", str(tmp_path / "a.tar")]
    for url in urls:
        read(source, url)
        read(direct, url)

    def check():
        for url in urls:
            assert read(source, url, 5, 9) == read(direct, url, 5, 9) == CONTENT[5:9]
        assert direct.take_counts()["bytes"] == 8

    assert [in_fork(check) for _ in range(3)] == [0, 0, 0]
    assert read(direct, urls[0], 3, 8) == CONTENT[3:8]
    (tmp_path / "storage").write_bytes(pickle.dumps([source, direct]))
    script = f"""
import pickle
for storage in pickle.load(open({str(tmp_path / "storage")!r}, "rb")):
    for url in {urls!r}:
        print(storage.read(url, 5, 9, size={SIZE}, checksum=None).hex())
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [CONTENT[5:9].hex()] * 4


def test_commands_need_a_cache(tmp_path):
    with pytest.raises(ValueError, match="give a cache"):
        read(storage(), "pipe:cat a.tar")


def test_commands_run_once_and_with_a_warning(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    url = f"pipe:echo run >> {tmp_path}/log; cat {tmp_path}/a.tar"
    source = storage(ShardCache(tmp_path / "cache", SIZE))
    with pytest.warns(UserWarning, match=r"output of commands \(pipe:\)"):
        assert read(source, url) == CONTENT[1000:150_000]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read(source, url, 3, 4) == CONTENT[3:4]
    assert (tmp_path / "log").read_text() == "run\n"


@pytest.mark.filterwarnings("ignore:Storage. shards are the output of commands")
@pytest.mark.parametrize("command", ["head -c 1000 {}; exit 3", "head -c 1000 {}", "cat {} {}"])
def test_commands_that_fail_or_bring_other_bytes_are_refused(tmp_path, command):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    url = "pipe:" + command.replace("{}", f"{tmp_path}/a.tar")
    with pytest.raises(TransportError, match="all 200000 bytes"):
        read(storage(ShardCache(tmp_path / "cache", SIZE)), url)
    assert not list((tmp_path / "cache").glob("*-*"))
