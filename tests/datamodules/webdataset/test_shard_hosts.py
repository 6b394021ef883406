"""Two hosts, as network namespaces, read shards from a server that fails: the samples of one process, and none lost."""

import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from faulty_server import Fault, FaultyServer
from shard_files import write_pairs
from shard_runs import Job, command, environment, run

from datamodules.webdataset.manifest import make_manifest

T = TypeVar("T")

MISSING = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or bool(MISSING), reason="needs root, ip and unshare for network namespaces"),
]

STEPS, NUM_SHARDS = 9, 6
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces, joined by a cable."""
    names = [f"shards{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            created = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if created.returncode:
                pytest.skip(f"no network namespaces here: {created.stderr.strip()}")
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            # `ip netns exec` puts it in the place of /etc/hosts.
            Path("/etc/netns", name).mkdir(parents=True)
            lines = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(ADDRESSES, names, strict=True))]
            Path("/etc/netns", name, "hosts").write_text("\n".join(lines) + "\n")
        yield names
    finally:
        for name in names:
            if Path("/run/netns", name).exists():
                for process in ip("netns", "pids", name).split():
                    os.kill(int(process), signal.SIGKILL)
                ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


def inside(host: str, action: Callable[[], T]) -> T:
    """Return what `action` returns on a host: sockets that it opens belong there."""
    found: list[T] = []

    def enter() -> None:
        # A thread's namespace is its own; this one ends with it.
        with Path("/run/netns", host).open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")
        found.append(action())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return found[0]


class Peak:
    """The most bytes that were in a folder while it was looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_bytes = folder, 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            sizes = 0
            for path in self.folder.rglob("*"):
                try:
                    sizes += path.stat().st_size if path.is_file() else 0
                except FileNotFoundError:
                    continue
            self.num_bytes = max(self.num_bytes, sizes)


def run_on(hosts: list[str], jobs: list[Job]) -> None:
    """Run one job on each host at the same time."""
    running = []
    for host, job in zip(hosts, jobs, strict=True):
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        # Like a host, it has a name of its own.
        entered = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', host]
        log = (Path(job.folder) / f"{host}.txt").open("w")
        words = [*entered, *command([job], Path(job.folder) / f"{host}.json")]
        running.append((subprocess.Popen(words, env=environment(), stdout=log, stderr=log), log))
    deadline = time.monotonic() + 240
    for process, log in running:
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            process.kill()
            log.close()
        assert code == 0, Path(log.name).read_text()[-4000:]


@pytest.mark.parametrize("fill", ["background", "first"])
def test_two_hosts_with_caches_see_the_samples_of_one_process(hosts: list[str], tmp_path: Path, fill: str) -> None:
    shards = tmp_path / "shards"
    keys = write_pairs(shards, num_shards=NUM_SHARDS, per_shard=11)
    paths = sorted(shards.glob("*.tar"))
    one = Job(folder=str(tmp_path / "one"), train=[{"urls": str(shards)}], val=[{"urls": str(shards)}], max_steps=STEPS)
    run(one)
    limit = 3 * max(path.stat().st_size for path in paths)
    with inside(hosts[0], lambda: FaultyServer(ADDRESSES[0])) as server:
        server.files |= {f"/{path.name}": path.read_bytes() for path in paths}
        faults = [
            Fault(status=503),
            Fault(after=900, then="reset"),
            Fault(after=900, then="stall"),
            Fault(extra=-10),
            Fault(extra=10),
            Fault(after=900, then="close"),
        ]
        for number, path in enumerate(paths):
            # Each shard fails in three ways before it comes.
            server.faults[f"/{path.name}"] = [faults[(number + k) % len(faults)] for k in range(3)]
        urls = [f"{server.url}/{path.name}" for path in paths]
        index = tmp_path / "index"
        # The server cannot be reached from here; the files that it serves can.
        make_manifest(urls, index, name="shards", open_file=lambda url: (shards / Path(url).name).open("rb"))
        both = Job(
            folder=str(tmp_path / "two"),
            train=[{"index": str(index)}],
            val=[{"index": str(index)}],
            world=2,
            ranks=[0, 1],
            max_steps=STEPS,
            data={"num_workers": 1},
            trainer={"num_nodes": 2, "devices": 1},
        )
        parts = [on_host(both, rank, tmp_path / f"cache{rank}", limit, fill) for rank in both.ranks]
        with Peak(tmp_path / "cache0") as first, Peak(tmp_path / "cache1") as second:
            run_on(hosts, parts)
        assert not any(server.faults.values())
    assert [part.status() for part in parts] == [[0], [0]]
    assert both.steps() == one.steps()
    assert [sorted(part) for part in both.evaluated()] == [keys]
    for rank in both.ranks:
        metrics = both.result(rank)["metrics"]
        assert metrics["val/count"] == len(keys)
        # The same numbers added in another order, in float64.
        assert metrics["val/pixels"] == pytest.approx(one.result(0)["metrics"]["val/pixels"], rel=1e-9)
        assert metrics["data/bad"] == 0
        assert "data/fallbacks" not in metrics
        assert metrics["data/samples/shards"] == 16 * STEPS
    for peak in (first, second):
        assert 0 < peak.num_bytes <= limit


def on_host(job: Job, rank: int, cache: Path, limit: int, fill: str) -> Job:
    access: dict[str, Any] = {"cache": str(cache), "cache_bytes": limit, "fill": fill, "timeout": 1.0}
    meet = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500", "NODE_RANK": str(rank), "LOCAL_RANK": "0"}
    return replace(job, ranks=[rank], access=access, environment={**meet, "GLOO_SOCKET_IFNAME": "eth0"})
